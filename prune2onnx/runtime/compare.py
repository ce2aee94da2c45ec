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
from prune2onnx.graph.shapes import values_in
from prune2onnx.graph.walk import attribute, in_model, nodes_in
from prune2onnx.runs.defaults import RANDOM_INPUTS, InputOptions
from prune2onnx.runs.report import Paired
from prune2onnx.runtime.inputs import (
    fed,
    in_batches,
    inputs_of,
    random_operators,
    says_something,
)
from prune2onnx.runtime.session import (
    UnrunnableError,
    input_text,
    require_memory,
    run,
    run_once,
    session,
)
from prune2onnx.tasks.metrics import measured
from prune2onnx.tasks.structure import described, stacked
from prune2onnx.tasks.task import Task, misfit

_COMPARED = 8  # examples

Batches = Iterable[tuple[Any, Any]]

# float32 sums in another order differ: relative to the largest score, and enough for deep networks
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5
# a network in a coarser type loses several of its steps on the way
_ROUNDINGS = 8
_ROUNDING: dict[int, float] = {
    onnx.TensorProto.FLOAT16: 2.0**-10,
    onnx.TensorProto.BFLOAT16: 2.0**-7,
    onnx.TensorProto.FLOAT8E4M3FN: 2.0**-3,
    onnx.TensorProto.FLOAT8E5M2: 2.0**-2,
}


def run_all(
    model: ModelProto | ort.InferenceSession, batches: Sequence[dict[str, NDArray[Any]]]
) -> list[list[Any]]:
    """The outputs of a model, or of one that is opened, for each batch of inputs.

    Raises:
        Prune2OnnxError: onnxruntime cannot open the model, or fails on the inputs.
    """
    opened = session(model) if isinstance(model, ModelProto) else model
    return [run_once(opened, each, Path("the model")) for each in batches]


def outputs_of(
    model: onnx.ModelProto | ort.InferenceSession, inputs: Sequence[dict[str, NDArray[Any]]]
) -> list[Any]:
    """All outputs of a model, or of one that is opened, for several inputs, in one list.

    Raises:
        Prune2OnnxError: onnxruntime cannot open the model, or fails on the inputs.
    """
    return [output for outputs in run_all(model, inputs) for output in outputs]


def compared(
    name: str, model: ModelProto, reference: ModelProto, options: InputOptions = RANDOM_INPUTS
) -> tuple[float | None, list[str]]:
    """`check_same`, for verbs that go on where nothing can be compared.

    Returns:
        The largest difference of an output, or None, and a note that says why.

    Raises:
        MismatchError: they differ by more than rounding explains.
    """
    try:
        return check_same(name, model, reference, options), []
    except UnrunnableError as error:
        return None, [f"not run in onnxruntime: {error}"]


def check_same(
    name: str,
    model: ModelProto,
    reference: ModelProto,
    options: InputOptions = RANDOM_INPUTS,
) -> float:
    """Compares a model with the one that it was made from.

    Args:
        name: of the model, for messages.
        model: what was made.
        reference: what it was made from.
        options: where inputs come from; default: random ones.

    Returns:
        The largest difference of an output.

    Raises:
        MismatchError: they differ by more than rounding explains.
        UnrunnableError: onnxruntime cannot run the reference either, or its outputs prove nothing.
    """
    try:
        opened = session(reference)
    except UnrunnableError:
        raise
    except Prune2OnnxError as error:  # the reference is the user's file
        raise UnrunnableError(str(error)) from error
    require_determined(reference)
    inputs = inputs_of(reference, opened, options, count=2, examples=_COMPARED)
    wanted = outputs_of(opened, inputs)
    if not says_something(wanted):
        raise UnrunnableError("its outputs are empty or NaN, so a comparison proves nothing")
    got = outputs_of(model, inputs)
    rounding = coarsest(reference)
    try:
        return _compared_all(name, got, wanted, rounding)
    except MismatchError:
        for again in (outputs_of(opened, inputs), outputs_of(reference, inputs)):
            _require_repeated(name, again, wanted, rounding)
        raise


def _compared_all(name: str, got: list[Any], wanted: list[Any], rounding: float) -> float:
    pairs = zip(got, wanted, strict=True)
    return max((check_outputs(name, a, b, rounding) for a, b in pairs), default=0.0)


def _require_repeated(name: str, again: list[Any], wanted: list[Any], rounding: float) -> None:
    """Makes sure that a reference gives the same outputs twice.

    onnxruntime reads memory that nothing has written where an empty part is concatenated.

    Raises:
        UnrunnableError: it does not.
    """
    try:
        _compared_all(name, again, wanted, rounding)
    except MismatchError as error:
        raise UnrunnableError(
            "onnxruntime gives other outputs each time that it runs the file that was read, so a "
            "comparison proves nothing"
        ) from error


def require_determined(model: ModelProto) -> None:
    """Makes sure that equal models give equal outputs.

    Raises:
        UnrunnableError: the model draws random numbers.
    """
    if drawn := random_operators(model):
        raise UnrunnableError(
            f"its outputs are random ({', '.join(drawn)}), so a comparison proves nothing"
        )


def coarsest(model: ModelProto) -> float:
    """The rounding error of the coarsest float type among a model's weights and results."""
    kinds = {tensor.data_type for tensor in in_model(model)}
    kinds.update(value.type.tensor_type.elem_type for value in values_in(model.graph))
    for node in nodes_in(model.graph.node):
        if node.op_type == "Cast":
            kinds.add(int(attribute(node, "to", 0)))
    return max((_ROUNDING[kind] for kind in kinds if kind in _ROUNDING), default=0.0)


def max_abs_diff(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference of two outputs of one shape."""
    return float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0))


def check_outputs(name: str, got: Any, want: Any, rounding: float = 0.0) -> float:
    """Compares outputs with a reference's: numbers within rounding, anything else for equality.

    Args:
        name: of the model, for messages.
        got: an output: an array of numbers or strings, a map, or a list of such.
        want: the reference's.
        rounding: of the coarsest type that the model computes in; at least the output's own counts.

    Returns:
        The largest difference of a number.

    Raises:
        MismatchError: they differ by more than rounding explains.
    """
    if isinstance(want, list | tuple | dict) or not _is_numeric(np.asarray(want)):
        return _check_structure(name, got, want, rounding)
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise MismatchError(f"{name}: output shape {got.shape}, the reference's is {want.shape}")
    if want.dtype.kind == "f":
        rounding = max(rounding, float(np.finfo(want.dtype).eps))
    same_special = np.array_equal(np.isfinite(got), np.isfinite(want))
    finite = np.isfinite(want)
    difference = max_abs_diff(got[finite], want[finite]) if same_special else float("inf")
    relative = max(_RELATIVE, _ROUNDINGS * rounding)
    allowed = _ABSOLUTE + relative * float(
        np.max(np.abs(want[finite].astype(np.float64)), initial=0.0)
    )
    if difference > allowed:
        raise MismatchError(
            f"{name}: outputs differ from the reference's by up to {difference:.3g}, "
            f"at most {allowed:.3g} is rounding; do not ship this file"
        )
    return difference


def _is_numeric(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "fiub"


def _check_structure(name: str, got: Any, want: Any, rounding: float) -> float:
    """Outputs that are not one array of numbers: strings, maps, sequences, optional values."""
    wrong = MismatchError(f"{name}: an output differs from the reference's; do not ship this file")
    if isinstance(want, dict):
        if not isinstance(got, dict) or got.keys() != want.keys():
            raise wrong
        pairs = [(got[key], want[key]) for key in want]
    elif isinstance(want, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(want):
            raise wrong
        pairs = list(zip(got, want, strict=True))
    else:
        if not np.array_equal(np.asarray(got), np.asarray(want)):
            raise wrong
        return 0.0
    return max((check_outputs(name, a, b, rounding) for a, b in pairs), default=0.0)


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


def answers(opened: ort.InferenceSession, batches: Batches) -> tuple[NDArray[Any], Any]:
    """Runs a model over a data set.

    Returns:
        (its first output [n, ...], targets [n, ...]).
    """
    outputs, targets = results(opened, batches)
    return outputs[0], targets


def results(opened: ort.InferenceSession, batches: Batches) -> tuple[list[NDArray[Any]], Any]:
    """Runs a model over a data set.

    Returns:
        (each output [n, ...], targets [n, ...], or as the data set has them).
    """
    outputs, targets = [], []
    for x, y in batches:
        for part, count in in_batches(opened, x):
            given = fed(opened, part)
            size = len(next(iter(given.values())))
            try:
                made = [np.asarray(one) for one in run(opened, given)]
            except Exception as error:
                require_memory(error, "the model")
                raise Prune2OnnxError(
                    f"the model does not take the data: {first_line(error)}; its input is "
                    f"{input_text(opened)}, the data's examples are {_examples_text(x)}"
                ) from error
            for one in made:
                if one.shape[:1] != (size,):
                    raise Prune2OnnxError(
                        f"an output of shape {list(one.shape)} for {size} examples, expected one "
                        "per example"
                    )
            outputs.append(tuple(one[:count] for one in made))
        targets.append(y)
    return list(stacked(outputs, np.concatenate)), stacked(targets, np.concatenate)


def _examples_text(x: Any) -> Any:
    return list(x.shape[1:]) if isinstance(x, np.ndarray) else described(x)


def judged(task: Task, outputs: list[NDArray[Any]], targets: Any) -> dict[str, float]:
    """The metrics of a task, by name, on the test set; outputs as from `results`.

    Raises:
        Prune2OnnxError: the outputs are not what the task needs, or a metric is not finite.
    """
    first = outputs[0]
    if isinstance(targets, np.ndarray):
        needed = misfit(task.targets, first.shape, targets.shape, 1)
        if task.targets == "class" and first.ndim != 2:
            needed = "[n, classes]"
        if needed is not None:
            raise Prune2OnnxError(
                f"the model's first output has shape {list(first.shape)}, expected {needed}"
            )
    return measured(task.metrics, _as_one(outputs), targets, "the test set")


def _as_one(outputs: list[NDArray[Any]]) -> Any:
    """Outputs as metrics get them: an array, or a tuple of several."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


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
