"""The command line: `main` and its verbs; an error is one line and an exit status.

Tables and progress go to stderr; with --json, stdout gets the report and nothing else. Exit status:
0 done, 1 failed, 2 wrong usage, 3 a budget was missed, 4 onnxruntime disagrees with the reference,
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import click
from google.protobuf.message import EncodeError

import prune2onnx
from prune2onnx.cli import interrupts, measuring, models, packing, pages, training
from prune2onnx.errors import (
    DataWarning,
    LowMemoryWarning,
    Prune2OnnxError,
    PruningWarning,
    RenamedWarning,
    one_line,
)

_WARNINGS = (RenamedWarning, DataWarning, PruningWarning, LowMemoryWarning)

_LESS_MEMORY = {
    "pack": "--load balanced, without --portable and lossy options, takes the least",
    "compress": "a smaller --batch-size takes less",
    "sweep": "a smaller --batch-size takes less",
    "validate": "inspect and unpack take less",
    "benchmark": "one file at a time, or a smaller --batch, takes less",
    "quantize": "fewer --examples take less",
}
"""Verb -> which of its options, or which other verb, takes less memory."""


class _Verbs(click.Group):
    """Turns our errors into one line on stderr and an exit status, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interrupts.raising(), warnings.catch_warnings():
                for ours in _WARNINGS:
                    warnings.simplefilter("once", ours)  # trials prune one network many times
                warnings.showwarning = partial(_show_warning, warnings.showwarning)
                return super().invoke(ctx)
        except Prune2OnnxError as error:
            click.echo(f"prune2onnx: {error}", err=True)
            ctx.exit(error.exit_status)
        except (KeyboardInterrupt, click.Abort):
            click.echo("prune2onnx: interrupted", err=True)
            ctx.exit(interrupts.STATUS)
        except BrokenPipeError:
            # the reader of our output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except (MemoryError, EncodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            less = _LESS_MEMORY.get(ctx.invoked_subcommand or "", "end other programs")
            what = one_line(error) if error.args else "the system gives no more"
            click.echo(f"prune2onnx: out of memory: {what}; {less}", err=True)
            ctx.exit(1)


def _show_warning(
    show: Callable[..., None], message: Warning | str, *details: Any, **more: Any
) -> None:
    """Shows our warnings as one line, without their place in the code."""
    if isinstance(message, _WARNINGS):
        click.echo(f"prune2onnx: {message}", err=True)
    else:
        show(message, *details, **more)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(prune2onnx.__version__, prog_name="prune2onnx")
def main() -> None:
    """Compress a network by pruning, quantization and coding into one ONNX file.

    Any onnxruntime opens it.
    """


for _verb in (
    training.compress,
    training.sweep,
    training.search,
    packing.pack,
    models.unpack,
    models.shrink,
    models.quantize,
    models.inspect,
    models.features,
    measuring.validate,
    measuring.benchmark,
    pages.report,
    pages.demo,
):
    main.add_command(_verb)
