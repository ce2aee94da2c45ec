"""Metrics in numpy: the same function judges torch during training and onnxruntime afterwards.

A metric is computed from sums over examples, so that batches, and the parts of several processes,
add up to the value of the whole split. Its loss is in `losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.tasks.quantity import PERCENT, Quantity

Sums: TypeAlias = NDArray[np.float64]

IGNORED = -100
"""The class of positions that count neither in loss nor in metric, as in torch's cross entropy."""


def ratio(sums: Sums) -> float:
    """The first sum over the second."""
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


@dataclass(frozen=True)
class Metric:
    """How good a network is on a split, as one number.

    Attributes:
        name: as reports show it.
        sums: (outputs, targets) of a batch, in numpy -> sums over its examples, float64 [k].
            Outputs are one array, or a tuple of arrays where the network has several outputs;
            targets are as the data set gives them.
        value: the sums of a whole split -> the metric; default: the first over the second.
        unit: "%" where it is percent, which `--max-drop` and reports then count in points.
        higher_is_better: its direction.
    """

    name: str
    sums: Callable[[Any, Any], Sums]
    value: Callable[[Sums], float] = ratio
    unit: str = ""
    higher_is_better: bool = False

    @property
    def quantity(self) -> Quantity:
        """Name, unit and direction."""
        return Quantity(self.name, self.unit, self.higher_is_better)


def measured(
    metrics: Iterable[Metric], outputs: Any, targets: Any, where: str = "the data"
) -> dict[str, float]:
    """The value of each metric on whole arrays of outputs and targets, by name.

    Raises:
        Prune2OnnxError: a metric fails, or is not finite.
    """
    return {
        metric.name: final(metric, batch_sums(metric, outputs, targets), where)
        for metric in metrics
    }


def batch_sums(metric: Metric, outputs: Any, targets: Any) -> Sums:
    """The sums of a metric over a batch, float64 [k].

    Raises:
        Prune2OnnxError: the metric fails, or returns something else.
    """
    try:
        sums = np.asarray(metric.sums(outputs, targets), np.float64)
    except Exception as error:  # whatever the user's function raises
        raise Prune2OnnxError(
            f"metric {metric.name}: its sums fail on outputs {_shapes(outputs)} and targets "
            f"{_shapes(targets)}: {type(error).__name__}: {error}"
        ) from error
    if sums.ndim != 1 or not sums.size:
        raise Prune2OnnxError(
            f"metric {metric.name}: its sums have shape {list(sums.shape)}, expected [k]: sums "
            "over the examples of a batch, such as [squared error, number of values]"
        )
    return sums


def final(metric: Metric, sums: Sums, where: str) -> float:
    """The value of a metric from the sums of a whole split.

    Raises:
        Prune2OnnxError: it is not finite.
    """
    try:
        value = float(metric.value(sums))
    except Exception as error:  # whatever the user's function raises
        raise Prune2OnnxError(
            f"metric {metric.name}: its value fails on the sums {sums.tolist()}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not np.isfinite(value):
        raise Prune2OnnxError(
            f"metric {metric.name} is {value} on {where}, expected a finite number; its sums are "
            f"{np.array2string(sums, threshold=8, precision=4)}: check the network's outputs, the "
            "targets, and the metric for a division by zero"
        )
    return value


def _shapes(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_shapes(each) for each in value) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shapes(each)}" for key, each in value.items()) + "}"
    return str(list(getattr(value, "shape", ()))) if value is not None else "none"


# -- built in --------------------------------------------------------------------------------------


def first(outputs: Any) -> NDArray[Any]:
    """The first output of a network, by which the built-in tasks judge it."""
    array: NDArray[Any] = outputs[0] if isinstance(outputs, tuple) else outputs
    return array


def _flat(outputs: Any, targets: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scores [m, classes] and classes [m] of the positions that count."""
    scores = np.moveaxis(first(outputs), axis, -1)
    scores, classes = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
    counted = classes != IGNORED
    return (scores, classes) if counted.all() else (scores[counted], classes[counted])


def _errors(axis: int, *, right: bool = False) -> Callable[[Any, Any], Sums]:
    """Positions with a wrong class, or with the right one, and all positions."""

    def sums(outputs: Any, targets: Any) -> Sums:
        scores, classes = _flat(outputs, targets, axis)
        hits = (scores.argmax(1) == classes) == right
        return np.array([hits.sum(), len(classes)], np.float64)

    return sums


def _percent(sums: Sums) -> float:
    # in this order: 100 times an integer is exact
    return float(100 * sums[0] / sums[1]) if sums[1] else float("nan")


def _confusion(outputs: Any, targets: Any) -> Sums:
    """How often class i was taken for class j, [classes * classes]."""
    scores, classes = _flat(outputs, targets, 1)
    count = scores.shape[1]
    return np.bincount(classes * count + scores.argmax(1), minlength=count**2).astype(np.float64)


def _mean_iou(sums: Sums) -> float:
    """Intersection over union, mean over the classes that occur, in percent."""
    side = int(np.sqrt(len(sums)))
    table = sums.reshape(side, side)
    both = np.diag(table)
    union = table.sum(0) + table.sum(1) - both
    return float(100 * np.mean(both[union > 0] / union[union > 0])) if union.any() else float("nan")


def _likelihood(outputs: Any, targets: Any) -> Sums:
    """Sum of -log p(target), and the number of targets."""
    scores, classes = _flat(outputs, targets, -1)
    scores = scores.astype(np.float64)
    top = scores.max(1, keepdims=True)
    log_sum = np.log(np.exp(scores - top).sum(1)) + top[:, 0]
    chosen = np.take_along_axis(scores, classes[:, None], 1)[:, 0]
    return np.array([(log_sum - chosen).sum(), len(classes)])


def _perplexity(sums: Sums) -> float:
    with np.errstate(over="ignore"):  # infinity is told as such
        return float(np.exp(ratio(sums)))


def _counts(outputs: Any, targets: Any) -> Sums:
    """Of labels: found rightly, found wrongly, missed, not there rightly."""
    found, there = first(outputs) > 0, targets > 0.5
    cells = (found & there, found & ~there, ~found & there, ~found & ~there)
    return np.array([cell.sum() for cell in cells], np.float64)


def _f1(sums: Sums) -> float:
    total = 2 * sums[0] + sums[1] + sums[2]
    return float(200 * sums[0] / total) if total else 100.0  # no label is there, and none was found


def _labels_wrong(sums: Sums) -> float:
    return float(100 * (sums[1] + sums[2]) / sums.sum())


def _pair(outputs: Any, targets: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predictions and targets in one shape: [n] targets belong to [n, 1] outputs."""
    made = first(outputs).astype(np.float64)
    return made, np.asarray(targets, np.float64).reshape(made.shape)


def _squares(outputs: Any, targets: Any) -> Sums:
    made, wanted = _pair(outputs, targets)
    return np.array([np.square(made - wanted).sum(), made.size])


def _absolutes(outputs: Any, targets: Any) -> Sums:
    made, wanted = _pair(outputs, targets)
    return np.array([np.abs(made - wanted).sum(), made.size])


def _root(sums: Sums) -> float:
    return float(np.sqrt(ratio(sums)))


def _moments(outputs: Any, targets: Any) -> Sums:
    """Squared error, sum and sum of squares of the targets, and their number, of each column."""
    made, wanted = (array.reshape(len(array), -1) for array in _pair(outputs, targets))
    columns = (np.square(made - wanted).sum(0), wanted.sum(0), np.square(wanted).sum(0))
    return np.concatenate([*columns, np.full(wanted.shape[1], len(wanted))])


def _r2(sums: Sums) -> float:
    """1 - squared error / variance, mean over the columns that vary."""
    error, total, squares, count = sums.reshape(4, -1)
    spread = squares - total**2 / count
    varies = spread > 0
    return float(np.mean(1 - error[varies] / spread[varies])) if varies.any() else 0.0


def _distance(outputs: Any, targets: Any) -> Sums:
    """Squared distance from the dense network's outputs, and their squared norm."""
    made = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = targets if isinstance(targets, tuple) else (targets,)
    pairs = [(a.astype(np.float64), b) for a, b in zip(made, wanted, strict=True)]
    squares = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return np.array([squares, sum(float(np.square(b, dtype=np.float64).sum()) for _, b in pairs)])


def _relative(sums: Sums) -> float:
    return 100 * _root(sums)


CLASS_ERROR = Metric("error", _errors(1), _percent, PERCENT)
TOKEN_ERROR = Metric("token error", _errors(-1), _percent, PERCENT)
PIXEL_ACCURACY = Metric("pixel accuracy", _errors(1, right=True), _percent, PERCENT, True)
MEAN_IOU = Metric("mIoU", _confusion, _mean_iou, PERCENT, True)
PERPLEXITY = Metric("perplexity", _likelihood, _perplexity)
F1 = Metric("F1", _counts, _f1, PERCENT, True)
LABEL_ERROR = Metric("label error", _counts, _labels_wrong, PERCENT)
RMSE = Metric("RMSE", _squares, _root)
MAE = Metric("MAE", _absolutes)
R2 = Metric("R2", _moments, _r2, higher_is_better=True)
OUTPUT_ERROR = Metric("output error", _distance, _relative, PERCENT)
