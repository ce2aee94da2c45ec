"""The front of a sweep: what each budget came to, which files are worth having, and how to see it.

Holds numbers only: as JSON, as a table and as a picture. Who trains and who counts is `sweeping`.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from prune2onnx.errors import printable

SCHEMA = 1
RUNS = "runs"
"""The folder of a sweep that holds one folder a run."""

_INK = "#767676"
"""Grey that is read as well on white as on black."""

_COLOURS = ("#2f7ed8", "#c8641b", "#16877b", "#b2509e", "#8a7410", "#d0454c")


@dataclass(frozen=True)
class Point:
    """One run: a budget and a seed, and what came of them.

    Attributes:
        what: "size", "density" or "drop".
        limit: in bytes, 0-1, or points of validation error.
        seed: of the run.
        state: "waiting", "running", "done" or "failed".
        nbytes: size of the file; None until the run is done, as all that follows.
        error: percent of the test set.
        validation_error: percent of the validation split; by this one files are chosen.
        drop: points of test error that were added to the dense network's.
        validation_drop: points of validation error that were added; a budget of drop means these.
        density: nonzeros over elements of the pruned weights, 0-1.
        ratio: dense bytes over bytes.
        met: the budget was kept.
        message: by how much the budget was missed, or why the run failed; else "".
        seconds: time that was spent on the run, over all attempts.
        worker: HOST:FOLDER where it ran; the files lie there.
    """

    what: str
    limit: int | float  # bytes stay whole when they are read back: the name holds them
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
    """What the runs of one seed started from, as their own reports measured it."""

    seed: int
    nbytes: int
    error: float
    validation_error: float


@dataclass(frozen=True)
class Front:
    """All runs of a sweep, in the order of budgets and seeds.

    Attributes:
        points: one a run.
        dense: one a seed of which a run is done.
    """

    points: tuple[Point, ...]
    dense: tuple[DenseNetwork, ...] = ()

    @property
    def done(self) -> tuple[Point, ...]:
        """The runs that have a file, whether or not it keeps its budget."""
        return tuple(point for point in self.points if point.state == "done")

    @property
    def failed(self) -> tuple[Point, ...]:
        """The runs that ended in an error."""
        return tuple(point for point in self.points if point.state == "failed")

    @property
    def missed(self) -> tuple[Point, ...]:
        """The runs whose file does not keep its budget."""
        return tuple(point for point in self.done if not point.met)

    @property
    def pareto(self) -> tuple[Point, ...]:
        """The files that no other beats in size and validation error, smallest first.

        The test set has no say: a choice that looked at it would make its error too good.
        """
        best = float("inf")
        found = []
        for point in sorted(self.done, key=lambda p: (p.nbytes, p.validation_error)):
            assert point.validation_error is not None
            if point.validation_error < best:
                best = point.validation_error
                found.append(point)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The front as plain data (schema 1)."""
        pareto = self.pareto
        points = [
            asdict(point)
            | {"name": point.name, "folder": f"{RUNS}/{point.name}", "pareto": point in pareto}
            for point in self.points
        ]
        return {
            "schema": SCHEMA,
            "version": importlib.metadata.version("prune2onnx"),
            "dense": [asdict(dense) for dense in self.dense],
            "budgets": [_over_seeds(points) for points in self._by_budget()],
            "points": points,
        }

    def _by_budget(self) -> list[list[Point]]:
        groups: dict[tuple[str, float], list[Point]] = {}
        for point in self.points:
            groups.setdefault((point.what, point.limit), []).append(point)
        return list(groups.values())

    def to_json(self) -> str:
        """The front as JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def table(self) -> Table:
        """One line a run; a mean line for each budget that has several seeds."""
        table = Table(title="size and error")
        headings = ("budget", "seed", "bytes", "test error", "validation", "drop", "density")
        for heading in (*headings, "smaller", "time", ""):
            left = heading in ("budget", "")
            table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "")
        pareto = self.pareto
        for points in self._by_budget():
            for point in points:
                mark = point.message if point.state in ("done", "failed") else ""
                if point.state != "done":
                    mark = f"{point.state}: {mark}" if mark else point.state
                elif point in pareto:
                    mark = f"* {mark}"
                seconds = "" if point.seconds is None else f"{point.seconds:,.0f} s"
                last = Text(printable(mark))
                table.add_row(point.budget, str(point.seed), *_cells(point), seconds, last)
            told = _over_seeds(points)
            if len(points) > 1 and told["nbytes"] is not None:
                size, error, validation = (
                    told[key] for key in ("nbytes", "error", "validation_error")
                )
                table.add_row(
                    "",
                    "mean",
                    f"{size['mean']:,.0f}",
                    f"{error['mean']:.2f} ± {error['spread']:.2f} %",
                    f"{validation['mean']:.2f} ± {validation['spread']:.2f} %",
                    style="dim",
                )
        table.add_section()
        for dense in self.dense:
            errors = f"{dense.error:.2f} %", f"{dense.validation_error:.2f} %"
            table.add_row("dense", str(dense.seed), f"{dense.nbytes:,}", *errors)
        table.caption = "* no other file is smaller at this validation error; drop: of the test set"
        return table

    def picture(self) -> bytes:
        """Size (log axis) against test error, as SVG: the same bytes for the same front."""
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        import matplotlib
        from matplotlib.figure import Figure

        style: Any = {
            "svg.hashsalt": "prune2onnx",
            "svg.fonttype": "none",
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _INK),
            **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _INK),
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(7, 4.5), layout="constrained")
            self.draw(figure)
            out = io.BytesIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        return out.getvalue()

    def draw(self, figure: Any, marked: str = "") -> None:
        """Fills a matplotlib figure; the run of this name has a ring around it."""
        from matplotlib.lines import Line2D
        from matplotlib.ticker import LogLocator, NullFormatter

        axes = figure.subplots()
        seeds = sorted({point.seed for point in self.points})
        colours = {seed: _COLOURS[i % len(_COLOURS)] for i, seed in enumerate(seeds)}
        for dense in self.dense:
            colour = colours[dense.seed]
            axes.axhline(dense.error, color=colour, linestyle="--", linewidth=1, alpha=0.7)
        best = self.pareto
        axes.plot([p.nbytes for p in best], [p.error for p in best], color=_INK, zorder=1)
        for point in self.done:
            colour = colours[point.seed]
            filled = colour if point.met else "none"
            axes.scatter(point.nbytes, point.error, s=42, facecolors=filled, edgecolors=colour)
            if point.name == marked:
                axes.scatter(point.nbytes, point.error, s=150, facecolors="none", edgecolors=_INK)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(lambda nbytes, _: f"{nbytes / 1000:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("file (kB, log scale)")
        axes.set_ylabel("test error (%)")
        axes.grid(True)
        axes.set_axisbelow(True)
        dot: dict[str, Any] = {"linestyle": "none", "marker": "o"}
        shown = [Line2D([], [], color=colours[s], label=f"seed {s}", **dot) for s in seeds]
        if marked:
            ring: dict[str, Any] = {**dot, "markersize": 11, "markerfacecolor": "none"}
            shown += [Line2D([], [], color=_INK, label="this run", **ring)]
        if self.missed:
            label = "budget missed"
            shown += [Line2D([], [], color=_INK, markerfacecolor="none", label=label, **dot)]
        shown += [Line2D([], [], color=_INK, label="best by validation error")]
        if self.dense:
            nbytes = max(dense.nbytes for dense in self.dense)
            label = f"dense, {nbytes / 1000:,.1f} kB"
            shown += [Line2D([], [], color=_INK, linestyle="--", label=label)]
        axes.legend(handles=shown, frameon=False)


def _cells(point: Point) -> tuple[str, ...]:
    if point.state != "done":
        return ("",) * 6
    assert point.density is not None
    return (
        f"{point.nbytes:,}",
        f"{point.error:.2f} %",
        f"{point.validation_error:.2f} %",
        f"{point.drop:+.2f}",
        f"{100 * point.density:.2f} %",
        f"{point.ratio:.1f}x",
    )


def _over_seeds(points: Iterable[Point]) -> dict[str, Any]:
    """A budget's mean and spread (sample standard deviation) over the seeds that are done."""
    points = list(points)
    done = [point for point in points if point.state == "done"]
    told: dict[str, Any] = {
        "what": points[0].what,
        "limit": points[0].limit,
        "seeds": [point.seed for point in done],
        "met": sum(bool(point.met) for point in done),
    }
    for key in ("nbytes", "error", "validation_error", "drop", "density"):
        values = [getattr(point, key) for point in done]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        told[key] = {"mean": statistics.fmean(values), "spread": spread} if values else None
    return told


def _shown(what: str, limit: float) -> str:
    if what == "size":
        return f"{limit:,.0f} bytes"
    return f"density {100 * limit:g} %" if what == "density" else f"drop {limit:g} points"
