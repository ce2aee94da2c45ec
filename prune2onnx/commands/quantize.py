"""`quantize`: read, calibrate, quantize to int8, compare errors and time, write."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prune2onnx.commands.source import read
from prune2onnx.data import load_data
from prune2onnx.errors import RecipeError
from prune2onnx.graph.file import save
from prune2onnx.graph.protobuf import nbytes
from prune2onnx.runs.defaults import Int8Options
from prune2onnx.runtime.benchmark import Timing
from prune2onnx.runtime.int8 import Layer
from prune2onnx.runtime.int8_choice import choose


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize_file` wrote.

    Attributes:
        layers: each layer, int8 or float, and why.
        float_error: error of the file that was read, percent of the validation split.
        error: error of the file that was written.
        timing: of one example, against the float model.
        notes: further remarks, in words.
        nbytes_before: size of the float model, unpacked.
        nbytes: size of what was written, external data included.
        files: the files that were written.
    """

    layers: tuple[Layer, ...]
    float_error: float
    error: float
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
    data: str,
    options: Int8Options | None = None,
    *,
    seed: int = 0,
) -> QuantizeResult:
    """Writes a file in int8; layers stay float where int8 adds more error than allowed.

    Args:
        source: a classifier with one input, float32; a packed one is unpacked first.
        target: the file to write, not packed.
        data: the source of examples (`load_data`): ranges are taken from its training split,
            errors from its validation split; its test split is not used.
        options: how it is quantized.
        seed: of the splits.

    Raises:
        RecipeError: a number out of range, or an unknown source, method or weight.
        Prune2OnnxError: the file cannot be read or quantized, or does not take the data.
    """
    options = options or Int8Options()
    if options.examples < 1 or options.max_drop < 0:
        raise RecipeError(
            f"{options.examples} examples, an accuracy loss of {options.max_drop}; expected 1 or "
            "more, and 0 or more"
        )
    given = read(source)
    before = given.normal.model
    chosen = choose(before, load_data(data, seed=seed), options)
    notes = list(chosen.notes)
    if given.is_packed:
        notes.append("the file was packed; the result is not: pack it as the last step")
    result = chosen.made.model
    files = save(result, target, source=source)
    assert chosen.made.float_error is not None and chosen.made.error is not None  # measured
    return QuantizeResult(
        chosen.made.layers,
        chosen.made.float_error,
        chosen.made.error,
        chosen.timing,
        tuple(notes),
        nbytes(before),
        nbytes(result),
        files,
    )
