"""Whether int8 is faster: a model quantized within an allowed loss of accuracy, and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.data import Data, batches, first
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.file import save
from prune2onnx.graph.strip import strip
from prune2onnx.runs.defaults import (
    MAX_DROP,
    MAX_REL_ERROR,
    RANDOM_INPUTS,
    InputOptions,
    Int8Options,
)
from prune2onnx.runtime.benchmark import Timing, timings
from prune2onnx.runtime.compare import error_percent, output_error, scores
from prune2onnx.runtime.inputs import Inputs, in_batches, inputs_of
from prune2onnx.runtime.int8 import Int8, quantize_int8
from prune2onnx.runtime.session import input_text, session

_SECONDS = 1.0
_FEW = 8  # examples for ranges where only the file's size matters
_RANDOM = 16  # sets of random inputs
_HELD_OUT = 5  # one in so many examples without labels measures the error
_MOST_HELD_OUT = 128


@dataclass(frozen=True)
class Examples:
    """What a model is quantized on.

    Attributes:
        calibration: inputs, for the ranges of activations.
        evaluate: a model -> its error, on other examples.
        allowed: how much int8 may add to it.
        unit: of the error: "points", or "of the outputs".
        inputs: for timing.
    """

    calibration: list[Inputs]
    evaluate: Callable[[ModelProto], float]
    allowed: float
    unit: str = "points"
    inputs: InputOptions = field(default=RANDOM_INPUTS)


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


def labelled(model: ModelProto, data: Data, options: Int8Options) -> Examples:
    """Ranges from a data set's training split, errors from its validation split.

    The error is the percent of examples that a classifier gets wrong, or, with `max_rel_error`,
    that of the outputs.

    Raises:
        Prune2OnnxError: the model has several inputs.
    """
    calibration = calibration_of(model, data, options.examples)
    if options.max_rel_error is None:
        allowed = MAX_DROP if options.max_drop is None else options.max_drop
        return Examples(calibration, error_on(data), allowed)
    opened = session(model)
    name = opened.get_inputs()[0].name
    held = [
        {name: part}
        for x in first(data.validation, options.examples)
        for part, _ in in_batches(opened, x)
    ]
    return _by_outputs(model, calibration, held, options)


def unlabelled(model: ModelProto, inputs: InputOptions, options: Int8Options) -> Examples:
    """Ranges from most of the examples, the error of the outputs from every fifth one.

    Of random inputs, all give ranges.

    Args:
        model: with any number of inputs.
        inputs: an archive with an array per input, or random ones.
        options: how it is quantized.

    Raises:
        RecipeError: the options ask for an error that needs labels.
        UnrunnableError: no random inputs were found on which it runs.
        Prune2OnnxError: the data cannot be read, or do not fit the model.
    """
    if options.max_drop is not None:
        raise RecipeError(
            f"--max-drop {options.max_drop:g} counts wrong labels, and --data {inputs.data} has "
            "none; limit the error of the outputs by --max-rel-error"
        )
    found = inputs_of(
        model, session(model), inputs, count=_RANDOM, examples=options.examples * _HELD_OUT
    )
    held = found[::_HELD_OUT][:_MOST_HELD_OUT]
    others = [one for at, one in enumerate(found) if at % _HELD_OUT] or held
    if inputs.data == "random":  # ranges that a few of them miss would say nothing of the model
        others = found
    return _by_outputs(model, others[: options.examples], held, options, inputs)


def _by_outputs(
    model: ModelProto,
    calibration: list[Inputs],
    held: list[Inputs],
    options: Int8Options,
    inputs: InputOptions = RANDOM_INPUTS,
) -> Examples:
    allowed = MAX_REL_ERROR if options.max_rel_error is None else options.max_rel_error
    return Examples(calibration, output_error(model, held), allowed, "of the outputs", inputs)


def choose(
    model: ModelProto,
    examples: Examples,
    options: Int8Options | None = None,
    *,
    steps: Mapping[str, float] | None = None,
) -> Choice:
    """Quantizes as many layers as accuracy allows, and measures the time that this saves.

    Args:
        model: float32.
        examples: what it is calibrated and measured on.
        options: how it is quantized.
        steps: weight -> its step, where it is known.
    """
    options = options or Int8Options()
    made = quantize_int8(
        model,
        examples.calibration,
        method=options.method,
        evaluate=examples.evaluate,
        max_drop=examples.allowed,
        unit=examples.unit,
        keep=options.keep,
        steps=steps,
    )
    timing = timed(model, made.model, examples.inputs)
    assert timing.ratio is not None  # it is the second file
    is_faster = timing.ratio < 1 and not timing.is_noise
    notes = []
    if not any(layer.is_int8 for layer in made.layers):
        notes.append("no layer could be int8 within the allowed error")
        tried = ", ".join(f"{error:.3g} with {floats}" for floats, error in made.tried)
        notes.append(
            f"tried with some of the {len(made.layers)} layers in float: an error of {tried}; at "
            f"most {made.float_error or 0.0:.3g} + {examples.allowed:g} {examples.unit} is allowed"
        )
    elif timing.is_noise:
        notes.append("int8 is no faster than float32 on this machine")
    elif not is_faster:
        notes.append(f"int8 takes {timing.ratio:.2f} times as long as float32 on this machine")
    return Choice(made, timing, is_faster, tuple(notes))


def calibration_of(model: ModelProto, data: Data, examples: int) -> list[dict[str, NDArray[Any]]]:
    """The first examples of the training split, in batches, as inputs of a model.

    Raises:
        Prune2OnnxError: the model has several inputs.
    """
    opened = session(model)
    if len(opened.get_inputs()) > 1:
        raise Prune2OnnxError(
            f"the model's inputs are {input_text(opened)}, and {data.name} has one array of "
            "examples; give --data npz:FILE with an array for each input, by its name"
        )
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


def timed(before: ModelProto, after: ModelProto, inputs: InputOptions = RANDOM_INPUTS) -> Timing:
    """Times inferences of one example, against the model before."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        for path, model in zip(paths, (before, after), strict=True):
            save(model, path)
        return timings(paths, seconds=_SECONDS, inputs=inputs)[1]
