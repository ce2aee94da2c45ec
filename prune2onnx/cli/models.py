"""The verbs that turn one ONNX file into another, or read it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prune2onnx.cli.options import (
    Fraction,
    GroupedCommand,
    Pruned,
    Size,
    Zeros,
    choice_of,
    input_options,
    input_options_of,
    input_shape_option,
    max_bytes_option,
    tokenizer_option,
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
from prune2onnx.cli.tables import curve_table, layers_table, shrink_table
from prune2onnx.files import keep_inputs
from prune2onnx.runs.defaults import MAX_DROP, MAX_REL_ERROR, Int8Options, PackOptions
from prune2onnx.shrinking.structure import BLOCK

if TYPE_CHECKING:
    from prune2onnx.commands.pack import PackResult

_PATH = click.Path(path_type=Path)
_source = click.argument("source", type=_PATH, metavar="IN.onnx")
_target = click.argument("target", type=_PATH, metavar="OUT.onnx")
_external = click.option(
    "--external", metavar="NAME", help="write large weights to a data file NAME beside OUT.onnx"
)


@click.command(cls=GroupedCommand)
@click.argument("source", type=_PATH, metavar="IN")
@click.argument("target", type=_PATH, metavar="[OUT]", required=False)
@click.option("-o", "--output", type=_PATH, help="the same as OUT")
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
    type=_PATH,
    metavar="PAGE.html",
    help="write a web page, too: bytes and error of each weight, budgets, and the curve",
)
@input_options
@_external
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
        _write_report(page, source, target, result)
    must_meet(result.missed, target, "give a larger budget, or more --examples")


def _write_report(page: Path, source: Path, target: Path, result: PackResult) -> None:
    from prune2onnx.files import write_whole
    from prune2onnx.graph.file import file_nbytes
    from prune2onnx.runs.pages.packed import Packed, packed_page

    packed = Packed(
        source.name,
        target.name,
        result.nbytes_before,
        file_nbytes(target),
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


@click.command(cls=GroupedCommand)
@_source
@_target
@_external
@max_bytes_option
def unpack(source: Path, target: Path, external: str | None, max_bytes: int) -> None:
    """Unpack IN.onnx into a file with dense weights, equal bit for bit."""
    from prune2onnx.commands.unpack import unpack_file

    for path in unpack_file(source, target, external, max_bytes):
        say(f"{path}: {path.stat().st_size:,} bytes")


@click.command(cls=GroupedCommand)
@_source
@_target
@click.option(
    "--gather-inputs", is_flag=True, help="drop unused inputs of the first layers by a Gather"
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    default=BLOCK,
    show_default=True,
    help="keep a multiple of so many channels in a convolution, since other numbers may be slower "
    "in onnxruntime; 1: the smallest file",
)
@input_options
@_external
@click.option("--json", "as_json", is_flag=True, help="print the changes as JSON on stdout")
def shrink(
    source: Path,
    target: Path,
    gather_inputs: bool,
    multiple: int,
    data: str | None,
    input_shapes: tuple[str, ...],
    tokenizer: Path | None,
    external: str | None,
    as_json: bool,
) -> None:
    """Remove dead channels and neurons from IN.onnx; OUT.onnx has the same outputs.

    A channel is dead if no weight reads it, or if it is constant and can be added to the next
    layer's bias. Outputs are compared in onnxruntime before anything is written.
    """
    from prune2onnx.commands.shrink import shrink_file

    result = shrink_file(
        source,
        target,
        gather_inputs=gather_inputs,
        multiple=multiple,
        external=external,
        inputs=input_options_of(data, input_shapes, tokenizer, source),
    )
    if as_json:
        print_json(result.to_dict())
        return
    for note in result.notes:
        say(note)
    if result.rows:
        console.print(shrink_table(result))
    for line in result.reasons():
        say(line)
    if not result.rows:
        say(f"{target}: nothing could be removed; the model is the same")
        return
    sizes = f"{result.nbytes_before:,} bytes before, {result.nbytes:,} now"
    branches = f", {result.bypassed} branches that added only zeros" if result.bypassed else ""
    say(f"{target}: removed {result.removed} channels and neurons{branches}; {sizes}")
    if result.difference is not None:
        say(f"outputs differ by at most {result.difference:.1e}")


@click.command(cls=GroupedCommand)
@click.argument("file", type=_PATH, metavar="FILE.onnx")
@click.option("--json", "as_json", is_flag=True, help="print the weights as JSON on stdout")
@max_bytes_option
def inspect(file: Path, as_json: bool, max_bytes: int) -> None:
    """Show how each weight of an ONNX file is stored, and its size in other forms."""
    from prune2onnx.commands.unpack import require_memory
    from prune2onnx.graph.file import file_nbytes
    from prune2onnx.packing.inspection import inspect as run
    from prune2onnx.packing.unpack import read

    model = read(file, max_bytes, lazily=True)
    require_memory(f"decoding {file.name}", model)
    found = run(model, max_bytes)
    print_weights(
        found.rows,
        file,
        file_nbytes(file),
        as_json,
        load=found.load.to_dict(),
        load_warning=found.load_warning or None,
        warning=found.warning,
    )
    print_load(found.load, file, found.load_warning, as_json)
    if found.warning:
        click.echo(f"prune2onnx: {file}: {found.warning}", err=True)


@click.command(cls=GroupedCommand)
@_source
@_target
@click.option(
    "--data",
    required=True,
    help="examples: a data set with labels, as for compress; npz:FILE with an array per input; "
    "text:FILE with one a line; or random, for a try",
)
@tokenizer_option
@input_shape_option
@click.option(
    "--max-drop",
    type=float,
    help="points of validation error that int8 may add (accuracy loss); layers stay float until "
    f"that is met  [default: {MAX_DROP}, where there are labels]",
)
@click.option(
    "--max-rel-error",
    type=float,
    help="the same for models that are no classifiers, and without labels: how far the outputs may "
    f"move, relative to their norm  [default: {MAX_REL_ERROR}, where there are no labels]",
)
@click.option(
    "--examples",
    type=int,
    default=Int8Options.examples,
    show_default=True,
    help="calibration examples, for the ranges of activations",
)
@click.option(
    "--method",
    type=choice_of(Int8Options, "method"),
    default=Int8Options.method,
    show_default=True,
    help="calibration method, for the ranges of activations",
)
@click.option(
    "--compute",
    type=choice_of(Int8Options, "compute"),
    default=Int8Options.compute,
    show_default=True,
    help="what matrices and tables compute in. static: int8 with fixed ranges, as convolutions; "
    "int8, int8-weights, int4: as for pack, with ranges of each input; float32: only convolutions "
    "are quantized; auto: what is fastest on this machine",
)
@click.option(
    "--keep", multiple=True, metavar="WEIGHT", help="keep the layer with this weight in float"
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="random seed of the validation split"
)
@click.option("--json", "as_json", is_flag=True, help="print the layers as JSON on stdout")
def quantize(
    source: Path,
    target: Path,
    data: str,
    input_shapes: tuple[str, ...],
    tokenizer: Path | None,
    max_drop: float | None,
    max_rel_error: float | None,
    examples: int,
    method: Any,
    compute: Any,
    keep: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Quantize IN.onnx to int8 by onnxruntime's quantizer, in layers where accuracy allows it.

    Transformers are faster with --compute int8: convolutions have fixed ranges, matrices those of
    each input.

    \b
    prune2onnx quantize model.onnx int8.onnx --data folder:images
    prune2onnx quantize vit.onnx int8.onnx --data folder:images --compute int8
    prune2onnx pack int8.onnx small.onnx --strip
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.commands.quantize import quantize_file

    result = quantize_file(
        source,
        target,
        input_options_of(data, input_shapes, tokenizer, source),
        Int8Options(examples, method, max_drop, max_rel_error, keep, compute),
        seed=seed,
    )
    if as_json:
        print_json(result.to_dict())
        return
    console.print(layers_table(result))
    if result.unit == "points":
        error = f"validation error {result.error:.2f} %, {result.float_error:.2f} % in float32"
    else:
        error = f"relative error of the outputs {result.error:.3g}"
    say(
        f"{target}: {result.nbytes:,} bytes, {result.nbytes_before:,} in float32; {error}; an "
        f"inference takes {result.timing.ratio:.2f} of the time"
    )
    for note in result.notes:
        say(note)


@click.command(cls=GroupedCommand)
@click.argument("file", type=_PATH, metavar="FILE.onnx")
@click.option("--data", required=True, help="data set, as for compress")
@click.option(
    "--layer",
    metavar="NAME",
    help="a value, node or weight of the graph  [default: the input of the last layer]",
)
@click.option("-o", "--output", required=True, type=_PATH, help=".npz file to write")
@click.option("--json", "as_json", is_flag=True, help="print name and shapes as JSON on stdout")
def features(file: Path, data: str, layer: str | None, output: Path, as_json: bool) -> None:
    """Write the output of a layer of FILE.onnx for each example, as features for other models.

    The file has x_train, y_train, x_test and y_test, as --data npz:FILE reads them.

    \b
    prune2onnx features runs/digits/model.onnx --data digits -o features.npz
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.commands.features import features_file

    name, shapes = features_file(file, output, data, layer=layer)
    if as_json:
        found = {"layer": name, "shapes": {key: list(shape) for key, shape in shapes.items()}}
        print_json(found)
        return
    shapes_text = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
    say(f"{output}: {name}: {shapes_text}")
