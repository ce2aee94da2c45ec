"""Output of the verbs: lines, tables and progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from prune2onnx.cli.tables import weights_table
from prune2onnx.errors import BudgetError, MismatchError, printable
from prune2onnx.packing.load_cost import Prediction
from prune2onnx.packing.rows import WeightRow
from prune2onnx.runs.history import Callbacks, Epoch, Step, TrialStart
from prune2onnx.runs.report import Goal, Report
from prune2onnx.tasks.quantity import ERROR, Quantity

console = Console(stderr=True)
if not console.is_terminal:  # a log has no width: wide enough that no column is cut
    console = Console(stderr=True, width=160)


_LINE_SECONDS = 10.0


def say(text: str) -> None:
    """Prints a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Prints data as JSON on stdout."""
    click.echo(json.dumps(content, indent=2))


def print_weights(
    rows: tuple[WeightRow, ...],
    file: Path,
    nbytes: int,
    as_json: bool,
    errors: Mapping[str, float] | None = None,
    **facts: Any,
) -> None:
    """Prints how the weights of a file are stored: a table, or JSON with further facts.

    Args:
        rows: the weights.
        file: that they are in.
        nbytes: its size.
        as_json: whether JSON is printed.
        errors: what lossy packing has changed, by weight.
        facts: further ones.
    """
    if as_json:
        print_json(weights_json(rows, file, nbytes, errors, **facts))
        return
    console.print(weights_table(rows, nbytes, errors or {}))
    if before := facts.get("before"):
        say(f"{before:,} bytes before, {nbytes:,} now: {before / nbytes:.2f} times smaller")


def weights_json(
    rows: tuple[WeightRow, ...],
    file: Path,
    nbytes: int,
    errors: Mapping[str, float] | None = None,
    *,
    hows: Mapping[str, str] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """What `print_weights` prints as JSON; `hows`: how each weight has changed."""
    weights = [row.to_dict() for row in rows]
    for weight in weights:
        for key, known in (("relative_error", errors), ("how", hows)):
            if weight["name"] in (known or {}):
                weight[key] = (known or {})[weight["name"]]
    known = {key: value for key, value in facts.items() if value is not None}
    return {"file": str(file), "nbytes": nbytes, **known, "weights": weights}


def print_load(load: Prediction | None, file: Path, warning: str, as_json: bool) -> None:
    """Prints what a load is predicted to take, or a warning that says so, on stderr."""
    if warning:
        click.echo(f"prune2onnx: {file}: warning: {warning}", err=True)
    elif load is not None and not as_json:
        say(f"a load takes {load}; prune2onnx validate measures it")


def must_meet(missed: Sequence[Goal], file: Path, advice: str) -> None:
    """Checks that no budget was missed.

    Raises:
        BudgetError: one was; the text says by how much, and the advice.
    """
    if missed:
        raise BudgetError(f"{file}: {'; '.join(map(str, missed))}; {advice}")


def must_fold(report: Report, file: Path) -> None:
    """Checks that onnxruntime folds the decoders.

    Raises:
        MismatchError: it does not.
    """
    if report.folded:
        return
    runtime = f"{file}: onnxruntime {report.environment['onnxruntime']}"
    if not report.unfolded:
        raise MismatchError(
            f"{runtime} leaves other operators than in the unpacked file; outputs are correct, but "
            "inferences may take longer; pack it again, as the last step"
        )
    raise MismatchError(
        f"{runtime} does not fold the decoders of {printable(report.left)}; outputs are correct, "
        "but these weights are decoded at every inference; pack it again, as the last step, or "
        "use prune2onnx unpack where it runs"
    )


@contextmanager
def progress(metric: Quantity = ERROR) -> Iterator[Callbacks]:
    """A bar per phase with loss, density and the metric; lines if stderr is no terminal."""
    bars: dict[str, Any] = {}
    errors: dict[str, str] = {}
    trial = ""
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=24),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=console, disable=not console.is_terminal)

    def bar(phase: str, epochs: int) -> Any:
        if phase not in bars:
            name = f"{trial}{phase}"
            bars[phase] = shown.add_task(name, total=epochs, epoch=0, epochs=epochs, facts="")
            errors[phase] = ""
        return bars[phase]

    def facts(now: Step | Epoch) -> str:
        added = f" + penalty {now.penalty:.4g}" if now.penalty else ""
        density = f"density {100 * now.density:6.2f} %{errors[now.phase]}"
        return f"loss {now.loss:.4f}{added}  {density}"

    def on_step(step: Step) -> None:
        shown.update(
            bar(step.phase, step.epochs),
            completed=step.epoch - 1 + step.step / step.steps,
            epoch=step.epoch,
            facts=facts(step),
        )

    def on_epoch(epoch: Epoch) -> None:
        task = bar(epoch.phase, epoch.epochs)
        errors[epoch.phase] = f"  validation {metric.name} {metric.text(epoch.value)}"
        text = facts(epoch)
        shown.update(task, completed=epoch.epoch, epoch=epoch.epoch, facts=text)
        if not console.is_terminal and epoch.epoch in _milestones(epoch.epochs):
            say(f"{trial}{epoch.phase:<8} epoch {epoch.epoch}/{epoch.epochs}  {text}")

    def on_trial(start: TrialStart) -> None:
        nonlocal trial
        trial = f"trial {start.number}: "
        bars.clear()  # each trial has bars of its own
        say(str(start))

    with shown:
        yield Callbacks(on_step, on_epoch, on_trial)


@contextmanager
def weights_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the weight, bytes and time left; a line every 10 s if stderr is no terminal."""
    columns = (
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    shown = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = shown.add_task("", total=None)
    began = said = time.monotonic()
    before = 0

    def tell(name: str, done: int, total: int) -> None:
        nonlocal began, said, before
        now = time.monotonic()
        if done <= before:  # another pass
            began = now
            shown.reset(task)
        shown.update(task, description=name, completed=done, total=total)
        if not console.is_terminal and now - said >= _LINE_SECONDS:
            said = now
            left = ""
            if before and done > before:
                left = f"about {(now - began) * (total - done) / done:,.0f} s left  "
            say(f"{done / total:4.0%}  {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {left}{name}")
        before = done

    with shown:
        yield tell


def _milestones(epochs: int) -> set[int]:
    """The epochs that a log reports: about ten per phase, the last one included."""
    return {1, epochs, *range(max(1, epochs // 10), epochs, max(1, epochs // 10))}
