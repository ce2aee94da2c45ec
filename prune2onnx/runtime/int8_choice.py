"""Whether int8 is faster: a model quantized within an allowed loss of accuracy, and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.data import Data, batches, first
from prune2onnx.graph.file import save
from prune2onnx.graph.strip import strip
from prune2onnx.runs.defaults import Int8Options
from prune2onnx.runtime.benchmark import Timing, timings
from prune2onnx.runtime.compare import error_percent, scores
from prune2onnx.runtime.inputs import in_batches
from prune2onnx.runtime.int8 import Int8, quantize_int8
from prune2onnx.runtime.session import session

_SECONDS = 1.0
_FEW = 8  # examples for ranges where only the file's size matters


@dataclass(frozen=True)
class Choice:
    """A model in int8, compared with itself in float32.

    Attributes:
        made: the int8 model, with both errors on validation data.
        timing: of one example, against the float model.
        is_faster: whether int8 saves time on this machine, beyond noise.
        notes: the reasons against int8, in words.
    """

    made: Int8
    timing: Timing
    is_faster: bool
    notes: tuple[str, ...]


def choose(
    model: ModelProto,
    data: Data,
    options: Int8Options | None = None,
    *,
    steps: Mapping[str, float] | None = None,
) -> Choice:
    """Quantizes as many layers as accuracy allows, and measures the time that this saves.

    Args:
        model: float32, with one input.
        data: ranges are taken from its training split, errors from its validation split.
        options: how it is quantized.
        steps: weight -> its step, where it is known.
    """
    options = options or Int8Options()
    made = quantize_int8(
        model,
        calibration_of(model, data, options.examples),
        method=options.method,
        evaluate=error_on(data),
        max_drop=options.max_drop,
        keep=options.keep,
        steps=steps,
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
    opened = session(model)
    name = opened.get_inputs()[0].name
    taken = first(data.train, examples)
    return [{name: part} for x in taken for part, _ in in_batches(opened, x)]


def all_int8(model: ModelProto, data: Data) -> ModelProto:
    """A model with all its layers in int8, stripped, for its size: its ranges are not exact."""
    return strip(quantize_int8(model, calibration_of(model, data, _FEW)).model).model


def int8_error(model: ModelProto, data: Data) -> float:
    """Percent of the validation split that a model gets wrong with all its layers in int8."""
    return error_on(data)(
        quantize_int8(model, calibration_of(model, data, Int8Options.examples)).model
    )


def error_on(data: Data) -> Callable[[ModelProto], float]:
    """A function: a model -> the percent of the validation split that it gets wrong."""
    held = list(batches(data.validation))

    def error(model: ModelProto) -> float:
        return error_percent(*scores(session(model), held))

    return error


def timed(before: ModelProto, after: ModelProto) -> Timing:
    """Times inferences of one example, against the model before."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        for path, model in zip(paths, (before, after), strict=True):
            save(model, path)
        return timings(paths, seconds=_SECONDS)[1]
