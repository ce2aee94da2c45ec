"""From a file to an int8 file: read, calibrate, quantise, compare errors and time, write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto
from rich.table import Table
from rich.text import Text

from prune2onnx.benchmark import Timing, timings
from prune2onnx.data import Data, batches, first, load_data
from prune2onnx.errors import RecipeError, printable
from prune2onnx.inline import is_packed
from prune2onnx.int8 import MAX_DROP, Int8, Layer, quantize_int8
from prune2onnx.intake import plain
from prune2onnx.onnxfile import load, nbytes, save
from prune2onnx.pack import unpack
from prune2onnx.running import session
from prune2onnx.validate import error_percent, scores

_SECONDS = 1.0


@dataclass(frozen=True)
class Done:
    """What `quantize_file` wrote.

    Attributes:
        layers: each layer, int8 or float, and why.
        float_error: percent of the validation split, of the file that was read.
        error: of what was written.
        timing: an inference of one example, beside the float model's.
        notes: what there is to know besides, in words.
        nbytes_before: of the float model, unpacked.
        nbytes: of what was written, external data included.
        files: those written.
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

    def table(self) -> Table:
        """A line for each layer."""
        table = Table("weight", "operator", "computes in", "disturbance", "why", title="layers")
        for layer in self.layers:
            known = "" if layer.disturbance is None else f"{layer.disturbance:.1e}"
            kind = "int8" if layer.is_int8 else "float32"
            name = Text(printable(layer.weight))
            table.add_row(name, layer.op, kind, known, layer.reason)
        return table


def quantize_file(
    source: Path,
    target: Path,
    data: str,
    *,
    examples: int = 512,
    method: str = "minmax",
    max_drop: float = MAX_DROP,
    keep: Collection[str] = (),
    seed: int = 0,
) -> Done:
    """Writes a file in int8; layers stay float where it adds more error than allowed.

    Args:
        source: a classifier of one input, float32; a packed one is unpacked first.
        target: the file to write, not packed.
        data: where examples come from (`load_data`): ranges are taken from its training split,
            errors from its validation split; its test split is not looked at.
        examples: of the training split.
        method: "minmax", "entropy" or "percentile".
        max_drop: points of error that int8 may add.
        keep: weights of layers that stay float.
        seed: of the splits.

    Raises:
        RecipeError: a number out of range, or an unknown source, method or weight.
        Prune2OnnxError: the file cannot be read or quantised, or does not take the data.
    """
    if examples < 1 or max_drop < 0:
        raise RecipeError(f"{examples} examples, a drop of {max_drop}: expected 1 and 0 or more")
    given = load(source)
    before = plain(unpack(given)).model
    chosen = choose(before, load_data(data, seed=seed), examples, method, max_drop, keep)
    notes = list(chosen.notes)
    if is_packed(given):
        notes.append("the file was packed; the result is not: pack it as the last step")
    result = chosen.made.model
    files = save(result, target)
    assert chosen.made.float_error is not None and chosen.made.error is not None  # measured
    return Done(
        chosen.made.layers,
        chosen.made.float_error,
        chosen.made.error,
        chosen.timing,
        tuple(notes),
        nbytes(before),
        nbytes(result),
        files,
    )


@dataclass(frozen=True)
class Choice:
    """A model in int8, beside itself in float.

    Attributes:
        made: it, with the errors on validation data.
        timing: an inference of one example, beside the float model's.
        is_faster: whether int8 saves time on this machine, beyond noise.
        notes: what there is to know, in words.
    """

    made: Int8
    timing: Timing
    is_faster: bool
    notes: tuple[str, ...]


def choose(
    model: ModelProto,
    data: Data,
    examples: int = 512,
    method: str = "minmax",
    max_drop: float = MAX_DROP,
    keep: Collection[str] = (),
) -> Choice:
    """Quantises what accuracy allows, and measures what that saves; see `quantize_file`."""
    made = quantize_int8(
        model,
        calibration_of(model, data, examples),
        method=method,
        evaluate=error_on(data),
        max_drop=max_drop,
        keep=keep,
    )
    timing = timed(model, made.model)
    assert timing.ratio is not None  # it is the second file
    is_faster = timing.ratio < 1 and not timing.is_noise
    notes = []
    if not any(layer.is_int8 for layer in made.layers):
        notes.append("no layer could be int8 within the allowed error")
    elif timing.is_noise:
        notes.append("int8 is no faster than float32 on this machine")
    elif not is_faster:
        notes.append(f"int8 takes {timing.ratio:.2f} times as long as float32 on this machine")
    return Choice(made, timing, is_faster, tuple(notes))


def calibration_of(model: ModelProto, data: Data, examples: int) -> list[dict[str, NDArray[Any]]]:
    """The first examples of the training split, in batches, as inputs of a model."""
    name = session(model).get_inputs()[0].name
    return [{name: x} for x in first(data.train, examples)]


def int8_error(model: ModelProto, data: Data, examples: int = 512) -> float:
    """Percent of the validation split that a model gets wrong with all its layers in int8."""
    return error_on(data)(quantize_int8(model, calibration_of(model, data, examples)).model)


def error_on(data: Data) -> Callable[[ModelProto], float]:
    """Percent of the validation split that a model gets wrong."""
    held = list(batches(data.validation))

    def error(model: ModelProto) -> float:
        return error_percent(*scores(session(model), held))

    return error


def timed(before: ModelProto, after: ModelProto) -> Timing:
    """An inference of one example, beside the model before."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        for path, model in zip(paths, (before, after), strict=True):
            save(model, path)
        return timings(paths, seconds=_SECONDS)[1]
