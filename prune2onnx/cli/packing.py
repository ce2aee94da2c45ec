"""The verb pack: an ONNX file, or a folder with one, made smaller."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prune2onnx.cli.options import (
    PATH,
    Fraction,
    GroupedCommand,
    Pruned,
    Size,
    Zeros,
    choice_of,
    external_option,
    input_options,
    input_options_of,
)
from prune2onnx.cli.output import (
    console,
    must_meet,
    print_json,
    print_load,
    print_weights,
    say,
    weights_json,
    weights_progress,
)
from prune2onnx.cli.tables import curve_table
from prune2onnx.files import keep_inputs
from prune2onnx.runs.defaults import PackOptions

if TYPE_CHECKING:
    from prune2onnx.commands.pack import PackResult


@click.command(cls=GroupedCommand)
@click.argument("source", type=PATH, metavar="IN")
@click.argument("target", type=PATH, metavar="[OUT]", required=False)
@click.option("-o", "--output", type=PATH, help="the same as OUT")
@click.option(
    "--load",
    type=choice_of(PackOptions, "load"),
    default=PackOptions.load,
    show_default=True,
    help="small: the fewest bytes; balanced: the same up to half a million elements, beyond at "
    "most 2 % more, and a session opens in a fraction of the time and memory; fast: no entropy "
    "code",
)
@click.option(
    "--format",
    "form",
    type=choice_of(PackOptions, "form"),
    default=PackOptions.form,
    show_default=True,
    help="form of the weights: packed codes them; sparse-initializer writes ONNX's own sparse "
    "tensors, which are far larger",
)
@click.option(
    "--strip", is_flag=True, help="remove doc strings, default attributes and long internal names"
)
@click.option("--shrink", is_flag=True, help="remove dead channels and neurons, as shrink does")
@click.option(
    "--anonymize", is_flag=True, help="rename weights to the shortest names, for a smaller file"
)
@click.option(
    "--portable",
    is_flag=True,
    help="write the decoder into the graph, without functions, so that OpenVINO reads it, too",
)
@click.option("--bits", type=float, help="lossy: about so many bits per weight on average, 1 to 8")
@click.option(
    "--compute",
    type=choice_of(PackOptions, "compute"),
    default=PackOptions.compute,
    show_default=True,
    help="lossy: what matrices and tables are while a session runs. int8: activations are rounded, "
    "too; int8-weights and int4: kernels of onnxruntime that read narrow weights; auto: what is "
    "fastest on this machine, with at most --max-error, or 5 %",
)
@click.option(
    "--prune",
    type=Pruned(),
    help="lossy: fraction of the weights to make zero, 0 to 1; with --data also N:M, N of M "
    "neighbours stay; RxC:F, in blocks of R outputs and C inputs; or channels:F, which removes "
    "whole channels, neurons and attention heads, F of the weights",
)
@click.option(
    "--max-rel-error",
    type=Fraction(),
    help="lossy: largest relative error (L2) of each weight; with --data (which may be "
    "'random'), of the outputs",
)
@click.option("--target-size", type=Size(), help="lossy, with --data: the most bytes of OUT.onnx")
@click.option(
    "--max-error",
    type=Fraction(),
    help="lossy, with --data: largest relative error of the outputs on held-out examples, such as "
    "1%",
)
@click.option(
    "--max-drop",
    type=float,
    help="lossy, with --data with labels: most points of error to add on held-out examples",
)
@click.option(
    "--examples",
    type=click.IntRange(1),
    default=PackOptions.examples,
    show_default=True,
    help="examples of --data to calibrate lossy weights with",
)
@click.option(
    "--curve", is_flag=True, help="with --data: also try other sizes, and show the errors of each"
)
@click.option(
    "--report",
    "page",
    type=PATH,
    metavar="PAGE.html",
    help="write a web page, too: bytes and error of each weight, budgets, and the curve",
)
@input_options
@external_option
@click.option("--json", "as_json", is_flag=True, help="print the weights as JSON on stdout")
def pack(
    source: Path,
    target: Path | None,
    output: Path | None,
    load: Any,
    form: Any,
    strip: bool,
    shrink: bool,
    anonymize: bool,
    portable: bool,
    bits: float | None,
    compute: Any,
    prune: Zeros | None,
    max_rel_error: float | None,
    target_size: int | None,
    max_error: float | None,
    max_drop: float | None,
    examples: int,
    curve: bool,
    page: Path | None,
    data: str | None,
    input_shapes: tuple[str, ...],
    tokenizer: Path | None,
    external: str | None,
    as_json: bool,
) -> None:
    """Pack IN.onnx into a smaller OUT.onnx that any onnxruntime opens.

    Lossless, unless an option says lossy. With examples (--data), lossy weights are calibrated:
    much smaller at the same error. A folder as on the Hugging Face hub (config.json,
    tokenizer.json, onnx/model.onnx) becomes one that transformers.js and optimum open.

    \b
    prune2onnx pack model.onnx small.onnx
    prune2onnx pack model.onnx small.onnx --bits 6
    prune2onnx pack model.onnx small.onnx --data folder:images --max-error 5%
    prune2onnx pack model.onnx small.onnx --compute int8 --bits 5
    prune2onnx pack model_dir -o small_dir --data text:sentences.txt --max-error 5%
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.commands.pack import pack_file
    from prune2onnx.graph.file import file_nbytes

    options = PackOptions(
        load=load,
        form=form,
        strip=strip,
        shrink=shrink,
        bits=bits,
        max_rel_error=max_rel_error,
        target_size=target_size,
        max_error=max_error,
        max_drop=max_drop,
        examples=examples,
        curve=curve,
        inputs=input_options_of(data, input_shapes, tokenizer, source),
        external=external,
        anonymize=anonymize,
        portable=portable,
        compute=compute,
        **vars(prune or Zeros()),
    )
    if (target is None) == (output is None):
        raise click.UsageError("give OUT once, behind IN or with -o")
    target = target or output
    assert target is not None
    if page is not None:
        if source.is_dir():
            raise click.UsageError("--report is for a file; a folder gets a README.md with figures")
        keep_inputs([source, target], [page])
    if source.is_dir():
        _pack_folder(source, target, options, as_json)
        return
    with weights_progress() as progress:
        result = pack_file(source, target, options, progress=progress)
    for note in result.notes:
        say(note)
    nbytes = file_nbytes(target)
    print_weights(result.rows, target, nbytes, as_json, result.errors, **_facts(result))
    _show_rest(result, target, as_json)
    if page is not None:
        _write_report(page, source.name, target.name, nbytes, result)
    must_meet(result.missed, target, "give a larger budget, or more --examples")


def _write_report(page: Path, source: str, target: str, nbytes: int, result: PackResult) -> None:
    from prune2onnx.files import write_whole
    from prune2onnx.runs.pages.packed import Packed, packed_page

    packed = Packed(
        source,
        target,
        result.nbytes_before,
        nbytes,
        rows=result.rows,
        errors=result.errors,
        hows=result.hows,
        goals=result.goals,
        curve=result.curve,
        notes=result.notes,
        load=str(result.load or ""),
        warning=result.warning,
    )
    write_whole(page, packed_page(packed))
    say(f"{page}: the figures as a page")


def _facts(result: PackResult) -> dict[str, Any]:
    """What JSON has of a packed file, beside its weights."""
    return {
        "before": result.nbytes_before,
        "hows": result.hows or None,
        "notes": result.notes,
        "load": result.load and result.load.to_dict(),
        "load_warning": result.warning or None,
        "goals": [goal.to_dict() for goal in result.goals] or None,
        "curve": [point.to_dict() for point in result.curve] or None,
        "layers": [asdict(layer) for layer in result.layers] or None,
    }


def _show_rest(result: PackResult, file: Path, as_json: bool) -> None:
    """Prints a load, other sizes and budgets, below the weights."""
    print_load(result.load, file, result.warning, as_json)
    if result.curve and not as_json:
        console.print(curve_table(result.curve))
    for goal in result.goals:
        say(str(goal))


def _pack_folder(source: Path, target: Path, options: PackOptions, as_json: bool) -> None:
    from prune2onnx.commands.folder import pack_folder

    with weights_progress() as progress:
        result = pack_folder(source, target, options, progress)
    found = []
    for file in result.files:
        path, packed = target / file.name, file.packed
        for note in packed.notes:
            say(f"{path}: {note}")
        if as_json:
            found.append(
                weights_json(packed.rows, path, file.nbytes, packed.errors, **_facts(packed))
                | {"source": str(file.source), "error": file.error}
                | ({"ratio": file.timing.ratio} if file.timing else {})
            )
        else:
            print_weights(
                packed.rows, path, file.nbytes, False, packed.errors, before=packed.nbytes_before
            )
        _show_rest(packed, path, as_json)
    for note in result.notes:
        say(note)
    if as_json:
        copied = [str(path) for path in result.copied]
        print_json({"folder": str(target), "files": found, "copied": copied})
    models = "1 model" if len(result.files) == 1 else f"{len(result.files)} models"
    say(f"{target}: {models}, {len(result.copied)} other files, and a README.md with the figures")
    for file in result.files:
        must_meet(
            file.packed.missed, target / file.name, "give a larger budget, or more --examples"
        )
