"""The verbs that turn one ONNX file into another, or read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune2onnx.cli.options import (
    PATH,
    GroupedCommand,
    choice_of,
    external_option,
    input_options,
    input_options_of,
    input_shape_option,
    max_bytes_option,
    tokenizer_option,
)
from prune2onnx.cli.output import (
    console,
    print_json,
    print_load,
    print_weights,
    say,
)
from prune2onnx.cli.tables import layers_table, shrink_table
from prune2onnx.runs.defaults import MAX_DROP, MAX_REL_ERROR, Int8Options
from prune2onnx.shrinking.structure import BLOCK

_source = click.argument("source", type=PATH, metavar="IN.onnx")
_target = click.argument("target", type=PATH, metavar="OUT.onnx")


@click.command(cls=GroupedCommand)
@_source
@_target
@external_option
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
@external_option
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
@click.argument("file", type=PATH, metavar="FILE.onnx")
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
@click.argument("file", type=PATH, metavar="FILE.onnx")
@click.option("--data", required=True, help="data set, as for compress")
@click.option(
    "--layer",
    metavar="NAME",
    help="a value, node or weight of the graph  [default: the input of the last layer]",
)
@click.option("-o", "--output", required=True, type=PATH, help=".npz file to write")
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
