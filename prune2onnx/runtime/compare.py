"""Outputs of models on inputs or data: compared with a reference's, and counted as errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.errors import MismatchError, Prune2OnnxError, first_line
from prune2onnx.runs.report import Paired
from prune2onnx.runtime.session import input_text, random_inputs, run_once, session

Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]

# float32 sums in another order differ: relative to the largest score, and enough for deep networks
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


def outputs_of(model: onnx.ModelProto, inputs: Sequence[dict[str, NDArray[Any]]]) -> list[Any]:
    """All outputs of a model for several inputs, in one list.

    Raises:
        Prune2OnnxError: onnxruntime cannot open the model, or fails on the inputs.
    """
    opened = session(model)
    return [out for each in inputs for out in run_once(opened, each, Path("the model"))]


def check_same(name: str, model: onnx.ModelProto, reference: onnx.ModelProto) -> float:
    """Compares a model with the one that it was made from, on random inputs.

    Returns:
        The largest difference of an output.

    Raises:
        MismatchError: they differ by more than rounding explains.
        UnrunnableError: onnxruntime cannot run the reference either.
    """
    inputs = [random_inputs(session(model), seed) for seed in range(2)]
    wanted = outputs_of(reference, inputs)
    got = outputs_of(model, inputs)
    return max((check_outputs(name, a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def max_abs_diff(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference of two outputs of one shape."""
    return float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0))


def check_outputs(name: str, got: NDArray[Any], want: NDArray[Any]) -> float:
    """Compares outputs with a reference's within float tolerance; returns the largest difference.

    Raises:
        MismatchError: they differ by more than rounding explains.
        Prune2OnnxError: an output is no tensor of numbers.
    """
    for one in (got, want):
        if not isinstance(one, np.ndarray) or one.dtype.kind not in "fiub":
            raise Prune2OnnxError(
                f"{name}: an output is a {type(one).__name__}, expected a tensor of numbers; "
                "validate the model without the nodes after the scores"
            )
    if got.shape != want.shape:
        raise MismatchError(f"{name}: output shape {got.shape}, the reference's is {want.shape}")
    same_special = np.array_equal(np.isfinite(got), np.isfinite(want))
    finite = np.isfinite(want)
    difference = max_abs_diff(got[finite], want[finite]) if same_special else float("inf")
    allowed = _ABSOLUTE + _RELATIVE * float(np.max(np.abs(want[finite]), initial=0.0))
    if difference > allowed:
        raise MismatchError(
            f"{name}: outputs differ from the reference's by up to {difference:.3g}, "
            f"at most {allowed:.3g} is rounding; do not ship this file"
        )
    return difference


def scores(
    opened: ort.InferenceSession, batches: Batches
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Runs a classifier over a data set.

    Returns:
        (its first output [n, classes], labels [n]).
    """
    out, labels = answers(opened, batches)
    if out.ndim != 2:
        raise Prune2OnnxError(
            f"the model's first output has shape {list(out.shape)}, expected [n, classes]"
        )
    return out, labels


def answers(
    opened: ort.InferenceSession, batches: Batches
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Runs a model with one input over a data set.

    Returns:
        (its first output [n, ...], labels [n]).
    """
    name = opened.get_inputs()[0].name
    outputs, labels = [], []
    for x, y in batches:
        try:
            outputs.append(opened.run(None, {name: x})[0])
        except Exception as error:
            raise Prune2OnnxError(
                f"the model does not take the data: {first_line(error)}; its input is "
                f"{input_text(opened)}, the data's examples are {list(x.shape[1:])}"
            ) from error
        shape = np.shape(outputs[-1])
        if shape[:1] != x.shape[:1]:
            raise Prune2OnnxError(
                f"an output of shape {list(shape)} for {len(x)} examples, expected one per example"
            )
        labels.append(y)
    return np.concatenate(outputs), np.concatenate(labels)


def error_percent(outputs: NDArray[Any], labels: NDArray[np.int64]) -> float:
    """Percent of examples for which the highest score is not that of the label."""
    return 100 * float(np.mean(outputs.argmax(1) != labels))


def paired(dense: NDArray[Any], compressed: NDArray[Any], labels: NDArray[np.int64]) -> Paired:
    """Counts the examples that each of two networks gets right, from their scores [n, classes]."""
    right, also_right = dense.argmax(1) == labels, compressed.argmax(1) == labels
    counts = (right & also_right, right & ~also_right, ~right & also_right, ~right & ~also_right)
    return Paired(*(int(count.sum()) for count in counts))


def output_error(
    model: ModelProto, inputs: list[dict[str, NDArray[Any]]]
) -> Callable[[ModelProto], float]:
    """A function that measures a model's outputs Y' against those of `model`: ||Y' - Y|| / ||Y||.

    Y is one output for all inputs together; of several outputs, the worst counts.
    """
    wanted = outputs_of(model, inputs)
    count = len(wanted) // len(inputs)

    def evaluate(other: ModelProto) -> float:
        distance, norm = np.zeros(count), np.zeros(count)
        for index, (got, want) in enumerate(zip(outputs_of(other, inputs), wanted, strict=True)):
            if want.dtype.kind == "f":
                off = got.astype(np.float64) - want
                distance[index % count] += float(np.square(off).sum())
                norm[index % count] += float(np.square(want.astype(np.float64)).sum())
        return float(np.sqrt(distance / np.where(norm > 0, norm, 1)).max(initial=0.0))

    return evaluate
