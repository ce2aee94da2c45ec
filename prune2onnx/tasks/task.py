"""`Task`: the loss that a network is trained with, and the metrics that judge it.

Built in:

| task | targets | outputs | metrics |
| --- | --- | --- | --- |
| `classification` | a class, int `[n]` | scores `[n, classes]` | error |
| `multi-label` | labels 0 or 1, `[n, labels]` | scores `[n, labels]` | F1, label error |
| `regression` | numbers `[n, ...]` | the same | RMSE, R2; squared error as loss |
| `regression-l1` | numbers `[n, ...]` | the same | MAE, R2; absolute error as loss |
| `segmentation` | classes, int `[n, h, w]` | `[n, classes, h, w]` | mIoU, pixel accuracy |
| `token-classification` | classes, int `[n, t]` | `[n, t, classes]` | token error |
| `language-modelling` | none: the next token | `[n, t, tokens]` | perplexity, token error |
| `reconstruction` | none: the inputs | as the inputs | RMSE |
| `distillation` | none: the dense network's outputs | any | output error |

The first metric is the one by which budgets and choices go. Class -100 counts nowhere. Where a
network has several outputs, the first is judged (all of them in distillation).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prune2onnx.callables import call_with, load_callable
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.tasks.metrics import (
    CLASS_ERROR,
    F1,
    LABEL_ERROR,
    MAE,
    MEAN_IOU,
    OUTPUT_ERROR,
    PERPLEXITY,
    PIXEL_ACCURACY,
    R2,
    RMSE,
    TOKEN_ERROR,
    Metric,
)
from prune2onnx.tasks.quantity import Quantity

if TYPE_CHECKING:  # it takes seconds to import, and a file is validated without
    from torch import Tensor

Targets: TypeAlias = Literal[
    "class",
    "labels",
    "values",
    "class map",
    "token classes",
    "next token",
    "inputs",
    "outputs",
    "any",
]
"""What a task learns: see the table above; "outputs" are the dense network's, "any" is anything."""

TOKENS = ("token classes", "next token")
"""Targets with which integer inputs are tokens, and stay integers."""

UNLABELLED = ("next token", "inputs", "outputs")
"""Targets that are not in the data set."""


@dataclass(frozen=True)
class Task:
    """What a network is trained for.

    Attributes:
        name: as reports show it.
        loss: (outputs, targets) of a batch, tensors -> a scalar, the mean over the batch.
        metrics: by which networks are judged, in numpy; budgets and choices go by the first.
        targets: what the targets are; "any" leaves them as the data set gives them.
        batch: (inputs, targets) -> what the model is given and what the loss gets. Inputs and
            targets are numpy arrays of a batch, or tuples or dicts of such, and so are results:
            a model gets an array as its argument, a tuple as arguments, a dict as keywords.
        distance: (outputs, outputs of the dense network, temperature) -> a scalar, for
            distillation; default: the mean squared difference of the first output.
        softened: whether `distance` compares distributions softened by the temperature T, so that
            it is multiplied by T^2.
        power: the loss is divided by the standard deviation of the training targets to this power,
            so that neither learning rates nor penalties depend on their unit.
    """

    name: str
    loss: Callable[[Any, Any], Tensor]
    metrics: tuple[Metric, ...]
    targets: Targets = "any"
    batch: Callable[[Any, Any], tuple[Any, Any]] | None = None
    distance: Callable[[Any, Any, float], Tensor] | None = None
    softened: bool = False
    power: Literal[0, 1, 2] = 0

    def __post_init__(self) -> None:
        names = [metric.name for metric in self.metrics]
        if not names or len(set(names)) < len(names):
            raise RecipeError(
                f"task {self.name}: its metrics are {', '.join(names) or 'none'}; expected at "
                "least one, each with a name of its own"
            )

    @property
    def metric(self) -> Quantity:
        """Name, unit and direction of the metric by which budgets and choices go."""
        return self.metrics[0].quantity

    def normalized(self, deviation: float) -> Task:
        """The task with its loss, and its distance, in units of the targets' deviation."""
        if not self.power or not deviation > 0:
            return self
        factor = deviation**-self.power
        loss, distance = self.loss, self.distance
        return replace(
            self,
            power=0,
            loss=lambda outputs, targets: factor * loss(outputs, targets),
            distance=distance and (lambda made, wanted, t: factor * distance(made, wanted, t)),
        )


def _lazy(name: str) -> Callable[..., Tensor]:
    """A function of `losses`, which imports torch."""

    def call(*arguments: Any) -> Tensor:
        from prune2onnx.tasks import losses

        result: Tensor = getattr(losses, name)(*arguments)
        return result

    return call


_BY_CLASS = {"loss": _lazy("class_loss"), "distance": _lazy("class_distance"), "softened": True}
_BY_TOKEN = {"loss": _lazy("token_loss"), "distance": _lazy("token_distance"), "softened": True}
_BY_LABEL = {"loss": _lazy("label_loss"), "distance": _lazy("label_distance"), "softened": True}
_SQUARED = {"loss": _lazy("squared_loss"), "distance": _lazy("value_distance"), "power": 2}
_ABSOLUTE = {"loss": _lazy("absolute_loss"), "distance": _lazy("absolute_distance"), "power": 1}
_RELATIVE = {"loss": _lazy("relative_loss"), "distance": _lazy("relative_loss")}

_ROWS: tuple[tuple[str, Targets, tuple[Metric, ...], dict[str, Any]], ...] = (
    ("classification", "class", (CLASS_ERROR,), _BY_CLASS),
    ("multi-label", "labels", (F1, LABEL_ERROR), _BY_LABEL),
    ("regression", "values", (RMSE, R2), _SQUARED),
    ("regression-l1", "values", (MAE, R2), _ABSOLUTE),
    ("segmentation", "class map", (MEAN_IOU, PIXEL_ACCURACY), _BY_CLASS),
    ("token-classification", "token classes", (TOKEN_ERROR,), _BY_TOKEN),
    ("language-modelling", "next token", (PERPLEXITY, TOKEN_ERROR), _BY_TOKEN),
    ("reconstruction", "inputs", (RMSE,), _SQUARED),
    ("distillation", "outputs", (OUTPUT_ERROR,), _RELATIVE),
)

TASKS: Mapping[str, Task] = {
    name: Task(name, metrics=metrics, targets=targets, **functions)
    for name, targets, metrics, functions in _ROWS
}
"""Name -> built-in task."""

CLASSIFICATION = TASKS["classification"]


def load_task(spec: str) -> Task:
    """The built-in task of this name, or what `file.py:callable` or `module:callable` returns.

    Raises:
        RecipeError: neither.
        Prune2OnnxError: the callable cannot be found, raises, or returns no Task.
    """
    if spec in TASKS:
        return TASKS[spec]
    if ":" not in spec:
        near = difflib.get_close_matches(spec.lower().replace("_", "-"), TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"task {spec!r}: unknown; known are {', '.join(TASKS)}, or your own as "
            f"file.py:callable{hint}"
        )
    task = call_with(load_callable(spec), spec)
    if not isinstance(task, Task):
        raise Prune2OnnxError(
            f"{spec}: returned a {type(task).__name__}, expected a prune2onnx.Task"
        )
    return task


def misfit(
    targets: Targets, made: tuple[int, ...], wanted: tuple[int, ...], classes: int
) -> str | None:
    """What outputs a task needs, in words, where a network's do not fit; None where they do.

    Args:
        targets: of the task.
        made: shape of the first output of a batch.
        wanted: shape of the batch's targets.
        classes: number of classes in the data.
    """
    shape = list(wanted)
    if targets == "class" and (len(made) != 2 or made[1] < classes):
        return f"scores [{wanted[0]}, {classes}]: one for each class"
    if targets == "class map" and (
        len(made) < 3 or made[:1] + made[2:] != wanted or made[1] < classes
    ):
        return f"scores {[wanted[0], classes, *wanted[1:]]}: one for each class at each place"
    if targets in TOKENS and (not made or made[:-1] != wanted or made[-1] < classes):
        return f"scores {[*shape, classes]}: one for each class at each position"
    if targets == "labels" and made != wanted:
        return f"scores {shape}: one for each label"
    if targets in ("values", "inputs") and _sizes(made) != _sizes(wanted):
        return f"numbers {shape}: one for each target"
    return None


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The batch, and the extents that are not 1."""
    return (*shape[:1], *(extent for extent in shape[1:] if extent != 1))
