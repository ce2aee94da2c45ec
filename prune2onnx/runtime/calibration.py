"""Examples to calibrate with, and others, held out, that show what calibration did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnxruntime as ort
from onnx import ModelProto

from prune2onnx.data import Data, batches, first, load_data
from prune2onnx.data.examples import MapDataset
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.defaults import InputOptions
from prune2onnx.runtime.compare import error_percent, judged, output_error, results, scores
from prune2onnx.runtime.inputs import (
    Inputs,
    fed,
    has_labels,
    in_batches,
    inputs_of,
    random_inputs,
)
from prune2onnx.runtime.session import session
from prune2onnx.tasks.task import CLASSIFICATION, Task

PART = 5  # one in so many examples without splits is held out
_MOST_HELD_OUT = 512
_RANDOM = 4  # sets of random inputs


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Examples of a model.

    Attributes:
        batches: inputs by name, to calibrate with.
        error: a model -> the relative error of its outputs on examples that are held out.
        wrong: a model -> the percent of held-out examples that it gets wrong; None without labels.
        labelled: how many examples that is a percent of.
    """

    batches: list[Inputs]
    error: Callable[[ModelProto], float]
    wrong: Callable[[ModelProto], float] | None = None
    labelled: int = 0


def calibration_data(
    model: ModelProto, options: InputOptions, examples: int, size: int = 64
) -> CalibrationData:
    """Reads examples of a data set, of an archive or of text, and holds others out.

    Of a data set with labels, the training split calibrates and the validation split is held out;
    of others, some are held out.

    Args:
        model: what runs on them; outputs are compared with its own.
        options: with data, not random ones.
        examples: how many to calibrate with.
        size: of a batch, where the model leaves that open.

    Raises:
        RecipeError: input shapes are given, too.
        Prune2OnnxError: the data cannot be read, do not fit, or are too few.
    """
    assert options.data is not None
    opened = session(model)
    if not has_labels(options.data, opened):
        wanted = examples + min(-(-examples // (PART - 1)), _MOST_HELD_OUT)
        for each in (size, 1):  # one by one where all are in one batch
            found = inputs_of(model, opened, options, count=0, examples=wanted, batch=each)
            if len(found) >= PART:
                break
        if len(found) < 2:
            raise Prune2OnnxError(
                f"{options.data}: one example; calibration needs some, and others to hold out"
            )
        taken, held = parted(found)
        return CalibrationData(taken, output_error(model, held))
    if options.shapes:
        raise RecipeError("--input-shape is for random inputs, and --data gives others; give one")
    data = load_data(options.data)
    held = batches_of(opened, data, data.validation, _MOST_HELD_OUT)
    wrong = error_on(data) if len(opened.get_outputs()[0].shape or ()) == 2 else None
    return CalibrationData(
        batches_of(opened, data, data.train, examples),
        output_error(model, held),
        wrong,
        len(data.validation),
    )


def random_error(model: ModelProto, options: InputOptions) -> Callable[[ModelProto], float]:
    """A function: a model -> the relative error of its outputs on random inputs.

    Raises:
        UnrunnableError: as for `random_inputs`.
    """
    return output_error(model, random_inputs(model, range(_RANDOM), shapes=options.shapes))


def parted(found: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Examples to calibrate with, and one in `PART`, the first included, held out."""
    held = list(found[::PART])
    return [one for at, one in enumerate(found) if at % PART] or held, held


def batches_of(
    opened: ort.InferenceSession, data: Data, split: MapDataset, examples: int
) -> list[Inputs]:
    """The first examples of a split, in batches, as inputs of a model that is opened.

    Raises:
        Prune2OnnxError: the model has other inputs than the data.
    """
    return [fed(opened, part) for x in first(split, examples) for part, _ in in_batches(opened, x)]


def error_on(data: Data, task: Task = CLASSIFICATION) -> Callable[[ModelProto], float]:
    """A function: a model -> its metric on the validation split, lower is better.

    For a classifier, the percent of examples that it gets wrong.
    """
    held = list(batches(data.validation))

    def error(model: ModelProto) -> float:
        if task is CLASSIFICATION:
            return error_percent(*scores(session(model), held))
        values = judged(task, *results(session(model), held))
        return task.metric.badness(next(iter(values.values())))

    return error
