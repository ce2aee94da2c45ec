"""`quantize`: read, calibrate, quantize to int8, compare errors and time, write."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from prune2onnx.commands.source import read
from prune2onnx.data import load_data
from prune2onnx.errors import RecipeError
from prune2onnx.graph.file import save
from prune2onnx.graph.protobuf import nbytes
from prune2onnx.runs.defaults import InputOptions, Int8Options
from prune2onnx.runtime.benchmark import Timing
from prune2onnx.runtime.inputs import has_labels
from prune2onnx.runtime.int8 import Layer
from prune2onnx.runtime.int8_choice import Examples, choose, labelled, unlabelled
from prune2onnx.runtime.session import session


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize_file` wrote.

    Attributes:
        layers: each layer, int8 or float, and why.
        float_error: error of the file that was read, percent of the validation split; 0 where the
            outputs' error counts.
        error: error of the file that was written; of outputs ||Y' - Y|| / ||Y||, the worst output.
        unit: of the errors: "points", or "of the outputs".
        timing: of one example, against the float model.
        notes: further remarks, in words.
        nbytes_before: size of the float model, unpacked.
        nbytes: size of what was written, external data included.
        files: the files that were written.
    """

    layers: tuple[Layer, ...]
    float_error: float
    error: float
    unit: str
    timing: Timing
    notes: tuple[str, ...]
    nbytes_before: int
    nbytes: int
    files: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"files": [str(path) for path in self.files]}


def quantize_file(
    source: Path,
    target: Path,
    inputs: InputOptions,
    options: Int8Options | None = None,
    *,
    seed: int = 0,
) -> QuantizeResult:
    """Writes a file in int8; layers stay float where int8 adds more error than allowed.

    Args:
        source: float32; a packed one is unpacked first.
        target: the file to write, not packed.
        inputs: the source of examples (`load_data`): ranges are taken from its training split,
            errors from its validation split; its test split is not used. Or `npz:FILE` with an
            array per input and no labels, `text:FILE`, or "random": then it is the outputs' error
            that counts.
        options: how it is quantized.
        seed: of the splits.

    Raises:
        RecipeError: a number out of range, or an unknown source, method or weight.
        Prune2OnnxError: the file cannot be read or quantized, or does not take the data.
    """
    options = options or Int8Options()
    _check(options)
    given = read(source)
    before = given.normal.model
    examples, notes = _examples(before, inputs, options, seed)
    chosen = choose(before, examples, options)
    notes += chosen.notes
    if given.is_packed:
        notes.append("the file was packed; the result is not: pack it as the last step")
    result = chosen.made.model
    files = save(result, target, source=source)
    assert chosen.made.float_error is not None and chosen.made.error is not None  # measured
    return QuantizeResult(
        chosen.made.layers,
        chosen.made.float_error,
        chosen.made.error,
        examples.unit,
        chosen.timing,
        tuple(notes),
        nbytes(before),
        nbytes(result),
        files,
    )


def _check(options: Int8Options) -> None:
    if options.examples < 1:
        raise RecipeError(f"{options.examples} calibration examples, expected 1 or more")
    if options.max_drop is not None and options.max_rel_error is not None:
        raise RecipeError("--max-drop and --max-rel-error: give one of them")
    for name in ("max_drop", "max_rel_error"):
        if not (getattr(options, name) or 0) >= 0:
            option = name.replace("_", "-")
            raise RecipeError(f"--{option} {getattr(options, name)}, expected 0 or more")


def _examples(
    model: ModelProto, inputs: InputOptions, options: Int8Options, seed: int
) -> tuple[Examples, list[str]]:
    """What the model is quantized on, and remarks on it."""
    data = inputs.data or "random"
    if data == "random":
        note = "ranges are from random inputs: fit for a try of size and speed, not for use"
        return unlabelled(model, InputOptions(data, inputs.shapes), options), [note]
    if not has_labels(data, session(model)):
        return unlabelled(model, inputs, options), []
    if inputs.shapes:
        raise RecipeError("--input-shape is for --data random; leave it out")
    return labelled(model, load_data(data, seed=seed), options), []
