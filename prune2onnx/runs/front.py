"""The results of a sweep: each budget's file, and those on the Pareto front of size and error.

Holds numbers only. `commands.sweep` measures them, `cli.tables` and `pages.charts` show them.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from prune2onnx.tasks.quantity import ERROR, Quantity

SCHEMA = 1
RUNS = "runs"
"""The subfolder of a sweep with one folder per run."""


@dataclass(frozen=True)
class Point:
    """One run: a budget and a seed, and the result.

    Attributes:
        what: "size", "density" or "drop".
        limit: in bytes, 0-1, or how much worse the metric may be, such as points of error.
        seed: of the run.
        state: "waiting", "running", "done" or "failed".
        nbytes: size of the file; None until the run is done, like the figures that follow.
        error: the front's metric on the test set: of a classifier, percent of errors.
        validation_error: the same on the validation split, by which files are chosen.
        drop: how much worse it is on the test set than the dense network's, such as points added.
        validation_drop: the same on the validation split; a budget "drop" limits these.
        density: nonzeros over elements of the pruned weights, 0-1.
        ratio: dense bytes over bytes.
        met: whether the budget was met.
        message: by how much the budget was missed, or why the run failed; else "".
        seconds: time that was spent on the run, over all attempts.
        worker: HOST:FOLDER where it ran and its files are.
    """

    what: str
    limit: int | float  # bytes stay an integer when they are read back, since the name has them
    seed: int
    state: str = "waiting"
    nbytes: int | None = None
    error: float | None = None
    validation_error: float | None = None
    drop: float | None = None
    validation_drop: float | None = None
    density: float | None = None
    ratio: float | None = None
    met: bool | None = None
    message: str = ""
    seconds: float | None = None
    worker: str = ""

    @property
    def name(self) -> str:
        """The run's name, and its folder's."""
        return f"{self.what}-{self.limit}-seed{self.seed}"

    @property
    def budget(self) -> str:
        """The budget in words."""
        return _shown(self.what, self.limit)


@dataclass(frozen=True)
class DenseNetwork:
    """The dense network from which the runs of one seed started, as their reports measured it."""

    seed: int
    nbytes: int
    error: float
    validation_error: float


@dataclass(frozen=True)
class Front:
    """All runs of a sweep, in the order of budgets and seeds.

    Attributes:
        points: one per run.
        dense: one per seed for which a run is done.
        metric: of the task; errors in points and dense networks are its values.
    """

    points: tuple[Point, ...]
    dense: tuple[DenseNetwork, ...] = ()
    metric: Quantity = ERROR

    @property
    def done(self) -> tuple[Point, ...]:
        """The runs that have a file, whether or not it meets its budget."""
        return tuple(point for point in self.points if point.state == "done")

    @property
    def failed(self) -> tuple[Point, ...]:
        """The runs that ended in an error."""
        return tuple(point for point in self.points if point.state == "failed")

    @property
    def missed(self) -> tuple[Point, ...]:
        """The runs that did not meet their budget."""
        return tuple(point for point in self.done if not point.met)

    @property
    def pareto(self) -> tuple[Point, ...]:
        """The Pareto front: files that no other beats in size and validation error, smallest first.

        The test set is not used: choosing by it would make its error too optimistic.
        """
        best = float("inf")
        found = []
        for point in sorted(self.done, key=lambda p: (p.nbytes, self._badness(p))):
            if self._badness(point) < best:
                best = self._badness(point)
                found.append(point)
        return tuple(found)

    def _badness(self, point: Point) -> float:
        assert point.validation_error is not None  # the run is done
        return self.metric.badness(point.validation_error)

    @property
    def loss(self) -> str:
        """A heading for how much worse the metric got."""
        return "accuracy loss" if self.metric == ERROR else f"{self.metric.name} lost"

    def to_dict(self) -> dict[str, Any]:
        """All runs as plain data (schema 1)."""
        pareto = self.pareto
        points = [
            asdict(point)
            | {"name": point.name, "folder": f"{RUNS}/{point.name}", "pareto": point in pareto}
            for point in self.points
        ]
        return {
            "schema": SCHEMA,
            "version": importlib.metadata.version("prune2onnx"),
            "metric": asdict(self.metric),
            "dense": [asdict(dense) for dense in self.dense],
            "budgets": [over_seeds(points) for points in self.by_budget],
            "points": points,
        }

    @property
    def by_budget(self) -> list[list[Point]]:
        """The runs of each budget."""
        groups: dict[tuple[str, float], list[Point]] = {}
        for point in self.points:
            groups.setdefault((point.what, point.limit), []).append(point)
        return list(groups.values())

    def to_json(self) -> str:
        """All runs as JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def over_seeds(points: Iterable[Point]) -> dict[str, Any]:
    """A budget's means and spreads (sample standard deviations) over the seeds that are done."""
    points = list(points)
    done = [point for point in points if point.state == "done"]
    figures: dict[str, Any] = {
        "what": points[0].what,
        "limit": points[0].limit,
        "seeds": [point.seed for point in done],
        "met": sum(bool(point.met) for point in done),
    }
    for key in ("nbytes", "error", "validation_error", "drop", "density"):
        values = [getattr(point, key) for point in done]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures[key] = {"mean": statistics.fmean(values), "spread": spread} if values else None
    return figures


def _shown(what: str, limit: float) -> str:
    if what == "size":
        return f"{limit:,.0f} bytes"
    if what == "density":
        return f"density {100 * limit:g} %"
    return f"accuracy loss {limit:g} point{'' if limit == 1 else 's'}"
