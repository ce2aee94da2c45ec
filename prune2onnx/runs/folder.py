"""Reads the folder of a run: report, history, recipe, and each weight before and after.

Also finds the sweep that a run belongs to. Files are not trusted: a damaged one is an error that
names it, a missing one is noted. Nothing is shown here (see `pages.page`) or run.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import TypeAdapter, ValidationError

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.file import load
from prune2onnx.graph.tensors import array_of
from prune2onnx.packing.decoding import MAX_BYTES
from prune2onnx.packing.rows import WeightRow
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.front import RUNS, Front, Point
from prune2onnx.runs.history import Epoch
from prune2onnx.runs.recipe import Recipe, read_recipe, resolve
from prune2onnx.runs.report import SCHEMA, Report

RECIPE, DENSE, MODEL, REPORT = "recipe.yaml", "dense.onnx", "model.onnx", "report.json"
HISTORY, PAGE = "history.json", "report.html"
FRONT = "front.json"

_WITHOUT = {
    RECIPE: "the goal, and the commands that repeat the run",
    HISTORY: "the training curves and the learned thresholds",
    DENSE: "the weights before",
    MODEL: "the weights after, and their levels",
}
"""The content that a page lacks without a file."""

_QUANTIZED = "_quantized"  # the suffix that onnxruntime's quantizer adds to the name of a weight

T = TypeVar("T")


@dataclass(frozen=True)
class Weight:
    """One weight of the result.

    Attributes:
        row: how it is stored.
        before: its values in dense.onnx; None where that has no such weight, or is missing.
        after: its values in the result, int8 ones times their scale; None where that is missing.
        levels: distinct values except zero, as stored; None where the result is missing.
        threshold: the last learned one, in the weight's units; None where none was learned, or
            where it applied to whole channels.
    """

    row: WeightRow
    before: NDArray[Any] | None = None
    after: NDArray[Any] | None = None
    levels: int | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Run:
    """The content of a run's folder.

    Attributes:
        report: report.json.
        recipe: settings by name, nested, as in the file; {} where it is missing.
        history: epochs in order; () where history.json is missing.
        weights: one for each row of the report.
        front: of the sweep that the run belongs to; None without a sweep.
        point: the front's point for this run.
        missing: missing file -> the content that is lacking without it.
    """

    report: Report
    recipe: dict[str, Any]
    history: tuple[Epoch, ...]
    weights: tuple[Weight, ...]
    front: Front | None
    point: Point | None
    missing: dict[str, str]


def read_run(directory: Path) -> Run:
    """Reads the folder of a finished run.

    Raises:
        RecipeError: there is no finished run.
        Prune2OnnxError: a file is damaged; it is named.
    """
    if not (directory / REPORT).is_file():
        message = f"{directory}: no {REPORT} in it, so it is no finished run"
        if (directory / RECIPE).is_file():
            message += f"; finish it with prune2onnx compress --resume {directory}"
        raise RecipeError(message)
    report = _report(directory / REPORT)
    missing = {name: what for name, what in _WITHOUT.items() if not (directory / name).is_file()}
    recipe = {} if RECIPE in missing else read_recipe(directory / RECIPE)
    history: tuple[Epoch, ...] = ()
    if HISTORY not in missing:
        history = _read(directory / HISTORY, tuple[Epoch, ...])
    dense = {} if DENSE in missing else _values(load(directory / DENSE))
    after = None
    if MODEL not in missing:
        after = unpack(load(directory / MODEL, MAX_BYTES), MAX_BYTES)
    thresholds = {}
    prune = recipe.get("prune")
    if not (isinstance(prune, dict) and prune.get("granularity") == "channel"):
        pruning = [epoch.thresholds for epoch in history if epoch.phase == "prune"]
        thresholds = pruning[-1] if pruning else {}
    front, point = _sweep_of(directory)
    weights = _weights(report.weights, dense, after, thresholds)
    return Run(report, recipe, history, weights, front, point, missing)


def read_front(directory: Path) -> Front:
    """Reads front.json in a sweep's folder.

    Raises:
        Prune2OnnxError: it is damaged.
    """
    path = directory / FRONT
    front = _read(path, Front)
    for point in front.points:
        if Path(point.name).name != point.name:
            raise _damaged(path, f"{point.name!r} is not the name of a run's folder")
    for point in front.done:
        needed = ("nbytes", "error", "validation_error", "drop", "density", "ratio")
        if any(getattr(point, name) is None for name in needed) or not point.nbytes:
            raise _damaged(path, f"{point.name} is done, but its figures are missing")
    return front


def _sweep_of(directory: Path) -> tuple[Front | None, Point | None]:
    directory = directory.absolute()
    sweep = directory.parent.parent
    if directory.parent.name != RUNS or not (sweep / FRONT).is_file():
        return None, None
    front = read_front(sweep)
    point = next((point for point in front.points if point.name == directory.name), None)
    return (front, point) if point else (None, None)


def _report(path: Path) -> Report:
    report = _read(path, Report)
    for what, measured in (("dense", report.dense), ("compressed", report.compressed)):
        if measured.nbytes < 1:
            raise _damaged(path, f"{what}.nbytes is {measured.nbytes}, expected a file's size")
        if measured.latency_ms is not None and not {"p50", "p95"} <= measured.latency_ms.keys():
            raise _damaged(path, f"{what}.latency_ms lacks p50 or p95")
    known = report.validation or {}
    pairs = ({"dense_error", "error"}, {"dense", "compressed"})
    if report.validation is not None and not any(pair <= known.keys() for pair in pairs):
        raise _damaged(path, "validation lacks dense_error or error")
    if report.paired is not None and report.paired.examples < 1:
        raise _damaged(path, "paired counts no example")
    return report


def _read(path: Path, cls: type[T]) -> T:
    """Reads JSON into a dataclass; unknown keys are ignored."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Prune2OnnxError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not valid JSON: {error}") from error
    if isinstance(content, dict) and content.get("schema") != SCHEMA:
        raise Prune2OnnxError(
            f"{path}: schema {content.get('schema')!r}, this version of prune2onnx reads {SCHEMA}; "
            "use the version that wrote it"
        )
    if not _finite(content):
        raise _damaged(path, "a number in it is not finite")
    try:
        return TypeAdapter(cls).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise _damaged(path, f"{where}: {first['msg'].lower()}") from error


def _damaged(path: Path, why: str) -> Prune2OnnxError:
    return Prune2OnnxError(f"{path}: damaged: {why}; take it from a copy, or run again")


def _finite(content: Any) -> bool:
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return all(map(_finite, content))
    return not isinstance(content, float) or math.isfinite(content)


def _weights(
    rows: tuple[WeightRow, ...],
    dense: dict[str, NDArray[Any]],
    after: ModelProto | None,
    thresholds: dict[str, float],
) -> tuple[Weight, ...]:
    stored: dict[str, NDArray[Any]] = {}
    values = stored
    alike: dict[WeightRow, list[str]] = {}
    if after is not None:
        stored = {tensor.name: array_of(tensor) for tensor in after.graph.initializer}
        values = _values(after)
        for name, array in stored.items():
            alike.setdefault(_nameless(WeightRow.of("", array, "", 0)), []).append(name)
    found = []
    for row in rows:
        # an anonymous file has other names: then a weight is found by its shape and nonzeros
        names = [row.name] if row.name in stored else alike.get(_nameless(row), [])
        known = len(names) == 1 and stored[names[0]].shape == row.shape
        name = row.name.removesuffix(_QUANTIZED)
        found.append(
            Weight(
                row,
                before=dense.get(name),
                after=values[names[0]] if known else None,
                levels=_levels(stored[names[0]]) if known else None,
                threshold=thresholds.get(name),
            )
        )
    return tuple(found)


def _nameless(row: WeightRow) -> WeightRow:
    """A row without name, codec and bytes: equal for weights of one shape, type and nonzeros."""
    return WeightRow("", row.shape, row.dtype, row.nnz, "", 0)


def _levels(array: NDArray[Any]) -> int:
    if array.dtype.kind == "O":
        return len(set(array.ravel().tolist()))
    return int(np.count_nonzero(np.unique(array)))


def _values(model: ModelProto) -> dict[str, NDArray[Any]]:
    """The initializers by name; quantized ones times their scale."""
    values = {tensor.name: array_of(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in values:
            continue
        codes, scale = values[node.input[0]], values.get(node.input[1])
        if scale is None or codes.dtype.kind not in "iu":
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.ndim == 1 and scale.size > 1:
            if not -codes.ndim <= axis < codes.ndim or codes.shape[axis] != scale.size:
                continue
            scale = np.expand_dims(scale, [a for a in range(codes.ndim) if a != axis % codes.ndim])
        elif scale.size != 1:
            continue
        values[node.input[0]] = codes.astype(np.float32) * scale.astype(np.float32)
    return values


def check_owner(path: Path, trust: bool) -> None:
    """Refuses what another user wrote, since a recipe names code that will run.

    Raises:
        RecipeError: the file or its folder belongs to another user, and `trust` is not given.
    """
    if trust or not hasattr(os, "getuid"):
        return
    for each in (path, path.parent):
        if each.exists() and each.stat().st_uid != os.getuid():
            raise RecipeError(
                f"{each}: belongs to another user, and the run's recipe names code that would run "
                "as you; read it, then give --trust"
            )


def recipe_of(directory: str | Path) -> Recipe:
    """The resolved recipe of a run's folder.

    Raises:
        RecipeError: the folder holds no run, or its recipe is damaged.
    """
    path = Path(directory) / RECIPE
    if not path.exists():
        raise RecipeError(f"{directory}: no {RECIPE} there, so no run to continue")
    return resolve(read_recipe(path), source=str(path))
