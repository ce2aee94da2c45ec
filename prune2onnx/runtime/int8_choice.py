"""Whether int8 is faster: a model quantized within an allowed loss of accuracy, and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from onnx import ModelProto

from prune2onnx.data import Data
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.file import save
from prune2onnx.graph.strip import strip
from prune2onnx.packing.compute.narrow import Compute, narrowed
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


_NARROW: tuple[Compute, ...] = ("int8", "int8-weights", "int4")
_TRIED: tuple[Compute | Literal["static"], ...] = ("static", *_NARROW)


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
        options: how it is quantized; "auto": in the way that takes the least time here; where
            none takes less than float32, the model stays as it is.
        steps: weight -> its step, where it is known.

    Raises:
        Prune2OnnxError: there is nothing to quantize, or onnxruntime cannot quantize it.
    """
    options = options or Int8Options()
    if options.compute != "auto":
        return _chosen(model, examples, options, options.compute, steps)
    found: dict[str, Choice] = {}
    notes = []
    for compute in _TRIED:
        try:
            choice = found[compute] = _chosen(model, examples, options, compute, steps)
        except Prune2OnnxError as error:
            notes.append(f"{compute}: {error}")
            continue
        assert choice.timing.ratio is not None and choice.made.error is not None
        notes.append(
            f"{compute}: {choice.timing.ratio:.2f} of the time of float32, "
            f"error {choice.made.error:.3g}"
        )
    faster = {name: one for name, one in found.items() if one.is_faster}
    if not found:
        raise Prune2OnnxError("; ".join(notes))
    if not faster:
        first = next(iter(found.values()))
        layers = [
            replace(layer, is_int8=False, compute="float32", reason="float32 is as fast here")
            for layer in first.made.layers
        ]
        made = Int8(model, tuple(layers), first.made.float_error, first.made.float_error)
        timing = timed(model, model, examples.inputs)
        return Choice(made, timing, False, (*notes, "no narrower type is faster on this machine"))
    name = min(faster, key=lambda name: faster[name].timing.ratio or 1.0)
    return replace(faster[name], notes=(*notes, *faster[name].notes, f"chosen: {name}"))


def _chosen(
    model: ModelProto,
    examples: Examples,
    options: Int8Options,
    compute: Compute | Literal["static"],
    steps: Mapping[str, float] | None,
) -> Choice:
    made = quantize_int8(
        model,
        examples.calibration,
        method=options.method,
        evaluate=examples.evaluate,
        max_drop=examples.allowed,
        unit=examples.unit,
        keep=options.keep,
        steps=steps,
        compute=compute,
    )
    timing = timed(model, made.model, examples.inputs)
    assert timing.ratio is not None  # it is the second file
    is_faster = timing.ratio < 1 and not timing.is_noise
    narrow = "int8" if compute in ("static", "float32") else compute
    notes = []
    if not any(layer.is_int8 for layer in made.layers):
        notes.append(f"no layer could be {narrow} within the allowed error")
        tried = ", ".join(f"{error:.3g} with {floats}" for floats, error in made.tried)
        notes.append(
            f"tried with some of the {len(made.layers)} layers in float: an error of {tried}; at "
            f"most {made.float_error or 0.0:.3g} + {examples.allowed:g} {examples.unit} is allowed"
        )
    elif timing.is_noise:
        notes.append(f"{narrow} is no faster than float32 on this machine")
    elif not is_faster:
        notes.append(f"{narrow} takes {timing.ratio:.2f} times as long as float32 on this machine")
    return Choice(made, timing, is_faster, tuple(notes))


def all_int8(
    model: ModelProto,
    data: Data,
    examples: int = Int8Options.examples,
    compute: Compute | Literal["static"] = "static",
) -> ModelProto:
    """A model with all its layers in int8, stripped.

    Args:
        model: float32.
        data: ranges are taken from its training split.
        examples: how many; where only the size matters, a few.
        compute: of matrices; "static": int8 too.
    """
    taken = batches_of(session(model), data, data.train, examples)
    return strip(quantize_int8(model, taken, compute=compute).model).model


def fastest(
    model: ModelProto,
    error: Callable[[ModelProto], float] | None = None,
    limit: float = MAX_REL_ERROR,
    inputs: InputOptions = RANDOM_INPUTS,
) -> tuple[Compute, list[str]]:
    """The type of matrices that takes the least time here, and what was measured, in words.

    float32 where none takes less, beyond noise.

    Args:
        model: float32.
        error: a model -> the relative error of its outputs; None: it does not count.
        limit: the most that is allowed.
        inputs: for timing.
    """
    best: Compute = "float32"
    least = 1.0
    notes: list[str] = []
    for compute in _NARROW:
        made = narrowed(model, compute)
        if all(layer.reason for layer in made.layers):
            if not notes:  # int8 has the most kernels
                return best, ["no matrix can compute in a narrower type"]
            notes.append(f"{compute}: no layer has a kernel for it")
            continue
        try:
            found = None if error is None else error(made.model)
            if found is not None and found > limit:
                notes.append(
                    f"{compute}: the outputs' error would be {found:.2%}, more than {limit:.2%}"
                )
                continue
            timing = timed(model, made.model, inputs)
        except Prune2OnnxError as failed:
            notes.append(f"{compute}: this onnxruntime does not run it: {failed}")
            continue
        ratio = timing.ratio or 1.0
        of_outputs = "" if found is None else f", error of the outputs {found:.2%}"
        notes.append(f"{compute}: {ratio:.2f} of the time of float32{of_outputs}")
        if ratio < least and not timing.is_noise:
            best, least = compute, ratio
    return best, notes


def timed(before: ModelProto, after: ModelProto, inputs: InputOptions = RANDOM_INPUTS) -> Timing:
    """Times inferences of one example, against the model before."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        for path, model in zip(paths, (before, after), strict=True):
            save(model, path)
        return timings(paths, seconds=_SECONDS, inputs=inputs)[1]
