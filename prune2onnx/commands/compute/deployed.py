"""What the file of a `compress` run computes in: float32, or narrower where that was asked for.

Convolutions compute in int8 with fixed ranges (`int8`), matrices and tables in a type of
`packing.compute` (`compute`). Without the second, `int8` is for both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.data import Data, batches
from prune2onnx.graph.strip import strip
from prune2onnx.packing.compute.narrow import Compute, Layer
from prune2onnx.packing.pack import Packed
from prune2onnx.runs.defaults import MAX_DROP, Int8Options
from prune2onnx.runs.folder import MODEL
from prune2onnx.runs.recipe import Recipe
from prune2onnx.runtime.calibration import error_on
from prune2onnx.runtime.compare import check_outputs, results
from prune2onnx.runtime.int8 import CONVOLUTIONS
from prune2onnx.runtime.int8_choice import all_int8, choose, fastest, labelled
from prune2onnx.runtime.session import session
from prune2onnx.tasks.task import Task
from prune2onnx.training.deployment import Deployment, Steps
from prune2onnx.training.fit import Fitted

_FEW = 8  # examples for ranges where only the file's size matters


def computes_in(
    recipe: Recipe,
    graph: Callable[[], ModelProto],
    path: Path,
    by_main: Callable[[Path, Callable[[], str]], str],
) -> tuple[Compute, tuple[str, ...]]:
    """What matrices are to compute in, and how that was found.

    Args:
        recipe: that asks for it; "auto": the type that takes the least time here, measured once on
            the dense network.
        graph: makes that.
        path: what was measured is kept here, so that a continued run ends as another.
        by_main: lets the main process write a file, and all read it.
    """
    if recipe.compute != "auto":
        return recipe.compute, ()

    def measured() -> str:
        compute, notes = fastest(graph())
        return json.dumps({"compute": compute, "notes": notes}, indent=1) + "\n"

    found = json.loads(by_main(path, measured))
    return found["compute"], tuple(found["notes"])


def sized(graph: ModelProto, recipe: Recipe, data: Data, compute: Compute) -> ModelProto:
    """A graph with its static layers in int8, if these are tried, for the size of its file."""
    return _static(graph, recipe, data, compute, _FEW)


def error_of(
    graph: ModelProto, steps: Steps, deployment: Deployment, recipe: Recipe, data: Data, task: Task
) -> float:
    """The metric on the validation split of a graph as it would compute; less is better."""
    made = _static(graph, recipe, data, deployment.compute, Int8Options.examples)
    return error_on(data, task)(deployment.narrowed(made, steps).model)


def _static(
    graph: ModelProto, recipe: Recipe, data: Data, compute: Compute, examples: int
) -> ModelProto:
    if not recipe.tries_int8:
        return graph
    if compute == "float32":
        return all_int8(graph, data, examples)
    return all_int8(graph, data, examples, "float32") if _has_convolutions(graph) else graph


def _has_convolutions(graph: ModelProto) -> bool:
    return any(node.op_type in CONVOLUTIONS for node in graph.graph.node)


@dataclass(frozen=True)
class Deployed:
    """The packed model, in the types that it computes in.

    Attributes:
        packed: the same.
        error: its metric on the validation split.
        is_float: whether all of it computes in float32.
        notes: why, in words.
        layers: what each matrix computes in, if narrower types were asked for.
    """

    packed: Packed
    error: float
    is_float: bool = True
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()


def deployed(
    fitted: Fitted,
    deployment: Deployment,
    recipe: Recipe,
    data: Data,
    task: Task,
    expected: list[NDArray[np.float32]],
) -> Deployed:
    """The packed model: as asked for; in int8, or a type of "auto", if that keeps the budgets.

    Args:
        fitted: the trained network.
        deployment: makes its file.
        recipe: the settings.
        data: to calibrate and to choose with.
        task: whose metric counts.
        expected: torch's outputs for the test split; the graph's are compared with them.

    Raises:
        MismatchError: onnxruntime gives others.
    """

    def as_float(*notes: str) -> Deployed:
        packed = deployment.pack(
            fitted.model, fitted.steps, rewrite=lambda graph: graph, compute="float32"
        )
        return Deployed(packed, fitted.error, notes=notes)

    if not recipe.tries_int8 and deployment.compute == "float32":
        return as_float()
    shrunk = deployment.smallest(fitted.model, fitted.steps)
    got, _ = results(session(shrunk), batches(data.test, recipe.batch_size))
    for made, want in zip(got, expected, strict=True):
        check_outputs(MODEL, made, want)  # against torch: in narrower types, outputs differ
    allowed = MAX_DROP * task.metric.point(fitted.dense_error)
    if (most := recipe.allowed_drop(fitted.dense_error)) is not None:
        allowed = max(0.0, most - task.metric.drop(fitted.dense_error, fitted.error))
    static = _statically(shrunk, fitted, deployment, recipe, data, task, allowed)
    notes = static.notes
    if deployment.compute == "float32":
        if not static.is_taken:
            return as_float(*notes)
        value = task.metric.badness(static.error)  # its own inverse
        return Deployed(deployment.written(static.graph, {}), value, False, notes)
    form = deployment.narrowed(static.graph, fitted.steps)
    error = error_on(data, task)(form.model)
    if recipe.compute == "auto" and error > task.metric.badness(fitted.error) + allowed:
        note = f"computes in float32: {deployment.compute} adds more error than is allowed"
        return as_float(*notes, note)
    packed = deployment.written(static.graph, fitted.steps)
    value = task.metric.badness(error)
    return Deployed(packed, value, False, (*notes, *form.notes), form.layers)


@dataclass(frozen=True, eq=False)
class _Static:
    """A graph with layers in int8 of fixed ranges, where that pays; else as it was given.

    Attributes:
        graph: the same.
        is_taken: whether it has any.
        error: its metric on the validation split, less is better; 0 where it has none.
        notes: what was decided.
    """

    graph: ModelProto
    is_taken: bool = False
    error: float = 0.0
    notes: tuple[str, ...] = ()


def _statically(
    graph: ModelProto,
    fitted: Fitted,
    deployment: Deployment,
    recipe: Recipe,
    data: Data,
    task: Task,
    allowed: float,
) -> _Static:
    every = deployment.compute == "float32"  # else convolutions alone
    if not recipe.tries_int8 or not (every or _has_convolutions(graph)):
        return _Static(graph)
    options = Int8Options(max_drop=allowed, compute="static" if every else "float32")
    examples = labelled(graph, data, options, task)
    choice = choose(graph, examples, options, steps=fitted.steps)
    made = strip(choice.made.model).model
    why = "" if choice.is_faster else choice.notes[0]
    if not why and recipe.target_size is not None:
        size = deployment.written(made, {} if every else fitted.steps, check=False).model.ByteSize()
        why = f"in int8 it would take {size:,} bytes" if size > recipe.target_size else ""
    what = "" if every else "convolutions: "
    if why:
        return _Static(graph, notes=(f"{what}computes in float32: {why}",))
    left = [layer.weight for layer in choice.made.layers if not layer.is_int8]
    note = f"{what}computes in int8, in {choice.timing.ratio:.2f} of the time"
    note += f"; float32 stays {', '.join(left)}" if left else ""
    assert choice.made.error is not None  # it was measured
    return _Static(made, True, choice.made.error, (note,))
