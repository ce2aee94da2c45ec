"""Whether int8 is faster: a model quantized within an allowed loss of accuracy, and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from prune2onnx.data import Data
from prune2onnx.errors import RecipeError
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
from prune2onnx.runtime.calibration import PART, batches_of, error_on, parted
from prune2onnx.runtime.compare import output_error
from prune2onnx.runtime.inputs import Inputs, inputs_of
from prune2onnx.runtime.int8 import Int8, quantize_int8
from prune2onnx.runtime.session import session
from prune2onnx.tasks.quantity import PERCENT
from prune2onnx.tasks.task import CLASSIFICATION, Task

_SECONDS = 1.0
_FEW = 8  # examples for ranges where only the file's size matters
_RANDOM = 16  # sets of random inputs
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


def labelled(
    model: ModelProto, data: Data, options: Int8Options, task: Task = CLASSIFICATION
) -> Examples:
    """Ranges from a data set's training split, errors from its validation split.

    The error is the percent of examples that a classifier gets wrong, or the metric of another
    task, or, with `max_rel_error`, that of the outputs.

    Raises:
        Prune2OnnxError: the model has several inputs.
    """
    opened = session(model)
    calibration = batches_of(opened, data, data.train, options.examples)
    if options.max_rel_error is None:
        allowed = MAX_DROP if options.max_drop is None else options.max_drop
        unit = "points" if task.metric.unit == PERCENT else f"of {task.metric.name}"
        return Examples(calibration, error_on(data, task), allowed, unit)
    held = batches_of(opened, data, data.validation, options.examples)
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
        model, session(model), inputs, count=_RANDOM, examples=options.examples * PART
    )
    others, held = parted(found)
    if inputs.data == "random":  # ranges that a few of them miss would say nothing of the model
        others = found
    return _by_outputs(model, others[: options.examples], held[:_MOST_HELD_OUT], options, inputs)


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


def all_int8(model: ModelProto, data: Data) -> ModelProto:
    """A model with all its layers in int8, stripped, for its size: its ranges are not exact."""
    return strip(
        quantize_int8(model, batches_of(session(model), data, data.train, _FEW)).model
    ).model


def int8_error(model: ModelProto, data: Data, task: Task = CLASSIFICATION) -> float:
    """The metric of a model with all its layers in int8 on the validation split; less is better.

    For a classifier, the percent of examples that it gets wrong.
    """
    taken = batches_of(session(model), data, data.train, Int8Options.examples)
    return error_on(data, task)(quantize_int8(model, taken).model)


def timed(before: ModelProto, after: ModelProto, inputs: InputOptions = RANDOM_INPUTS) -> Timing:
    """Times inferences of one example, against the model before."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        for path, model in zip(paths, (before, after), strict=True):
            save(model, path)
        return timings(paths, seconds=_SECONDS, inputs=inputs)[1]
