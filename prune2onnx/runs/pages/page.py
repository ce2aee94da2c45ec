"""The page of a run, and that of a sweep: one HTML file each, for people, that needs no network.

The content and its wording are here, the layout is in `templates/`, which escape everything that
came from a file or a name. The same folder gives the same page, byte for byte. `runs.folder` reads
the files and `charts` draws; nothing is trained or measured here.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import write_whole
from prune2onnx.packing.rows import WeightRow
from prune2onnx.runs.folder import (
    DENSE,
    FRONT,
    HISTORY,
    MODEL,
    PAGE,
    RECIPE,
    REPORT,
    Run,
    Weight,
    read_front,
    read_run,
)
from prune2onnx.runs.front import RUNS, Front
from prune2onnx.runs.history import Epoch
from prune2onnx.runs.pages.charts import (
    COLOURS,
    Stage,
    draw_curves,
    draw_front,
    draw_histogram,
    draw_stages,
    phases,
    weights_of,
)
from prune2onnx.runs.pages.rendering import MINUS, rendered, signed
from prune2onnx.runs.recipe import MACS
from prune2onnx.runs.report import Goal, Paired, Report, bytes_text
from prune2onnx.tasks.quantity import ERROR, PERCENT, Quantity

_MOST_HISTOGRAMS = 40  # about 7 kB each: a page should open at once
_GOALS = {
    "size": "fewest bytes",
    "latency": "shortest inference",
    "balanced": "few bytes and a short inference",
}
_BUDGETS = {
    "size": "size of the file",
    "density": "density of the pruned weights",
    "multiply-adds": "fraction of the dense network's multiply-adds",
    "drop": "validation error added",
}
# Bytes of an element that is not a 4-byte float; int8 codes count as the floats they stand for.
_ELEMENT = {"float16": 2, "bfloat16": 2, "float64": 8, "int64": 8}


@dataclass(frozen=True)
class _Line:
    """A quantity, for both files."""

    what: str
    dense: str
    compressed: str
    change: str = ""


@dataclass(frozen=True)
class _Budget:
    """A budget in words."""

    what: str
    limit: str
    reached: str
    verdict: str
    met: bool


@dataclass(frozen=True)
class _Histogram:
    """A weight's picture and its caption."""

    name: str
    svg: str
    caption: str


def write_page(directory: str | Path) -> Path:
    """Writes report.html into the folder of a run or of a sweep.

    Raises:
        RecipeError: the folder holds neither.
        Prune2OnnxError: one of its files is damaged; it is named.
    """
    directory = Path(directory)
    path = directory / PAGE
    if path.is_symlink():
        raise Prune2OnnxError(f"{path}: a link to {path.readlink()}; remove it")
    write_whole(path, page_of(directory))
    return path


def write_pages(directory: str | Path) -> list[Path]:
    """Writes report.html again: of a run, or of a sweep and all of its runs that have a report.

    Raises:
        RecipeError: the folder holds neither.
        Prune2OnnxError: one of the files is damaged; it is named.
    """
    directory = Path(directory)
    written = []
    if directory.is_dir() and not (directory / REPORT).is_file() and (directory / FRONT).is_file():
        points = read_front(directory).points
        folders = [directory / RUNS / point.name for point in points]
        for folder in folders:
            if not folder.resolve().is_relative_to(directory.resolve()):
                raise Prune2OnnxError(f"{folder}: leads out of {directory}; remove the link")
        written = [write_page(folder) for folder in folders if (folder / REPORT).is_file()]
    return [*written, write_page(directory)]


def page_of(directory: Path) -> str:
    """The page of a folder as HTML; a run's report comes before a sweep's front.

    Raises:
        RecipeError: the folder holds neither.
        Prune2OnnxError: one of its files is damaged; it is named.
    """
    if not directory.is_dir():
        raise RecipeError(f"{directory}: no such folder; expected that of a run or of a sweep")
    if (directory / REPORT).is_file():
        return rendered("run.html.j2", _run_facts(read_run(directory)))
    if (directory / FRONT).is_file():
        return rendered("sweep.html.j2", _sweep_facts(read_front(directory), directory))
    if (directory / RECIPE).is_file():
        read_run(directory)  # raises an error with advice
    raise RecipeError(
        f"{directory}: neither {REPORT} nor {FRONT} in it; expected the folder of a run "
        "(prune2onnx compress) or of a sweep (prune2onnx sweep)"
    )


def _run_facts(run: Run) -> dict[str, Any]:
    report, recipe = run.report, run.recipe
    drawn = [weight for weight in run.weights if _drawable(weight)]
    largest = sorted(drawn, key=lambda weight: -weight.row.size)[:_MOST_HISTOGRAMS]
    steps = _stages(run)
    return {
        "title": _title(recipe),
        "report": report,
        "goal": _goal(recipe),
        "verdict": _verdict(report),
        "paired": report.paired and _paired_text(report.paired),
        "budgets": [_budget(goal) for goal in report.budget],
        "lines": _lines(report),
        "stages": steps,
        "stages_svg": draw_stages("stages", steps, bytes_text),
        "parts": _parts(report),
        "phases": _phases(run.history),
        "curves": draw_curves(run.history, report.metric) if run.history else {},
        "test": _test_tile(report),
        "lines_of": [
            (name, f"c{i % COLOURS}", i // COLOURS % 3)
            for i, name in enumerate(weights_of(run.history))
        ],
        "weights": run.weights,
        "histograms": [_histogram(i, w) for i, w in enumerate(drawn) if w in largest],
        "not_drawn": len(drawn) - len(largest),
        "front_svg": run.front
        and run.front.done
        and draw_front("front", run.front, run.point.name if run.point else ""),
        "front_page": f"../../{PAGE}",
        "point": run.point,
        "commands": _commands(run),
        "recipe": _recipe_text(recipe),
        "missing": run.missing,
        "files": {"history": HISTORY, "recipe": RECIPE, "dense": DENSE, "model": MODEL},
    }


def _sweep_facts(front: Front, directory: Path) -> dict[str, Any]:
    pages = {
        point.name: f"{RUNS}/{quote(point.name)}/{PAGE}"
        for point in front.points
        if (directory / RUNS / point.name / PAGE).is_file()
    }
    return {
        "title": "Size and error",
        "front": front,
        "front_svg": draw_front("front", front) if front.done else "",
        "best": {point.name for point in front.pareto},
        "pages": pages,
    }


def _title(recipe: dict[str, Any]) -> str:
    model, data = recipe.get("model"), recipe.get("data")
    if not model:
        return "A compressed network"
    return f"{model} on {data}" if data else f"{model}"


def _goal(recipe: dict[str, Any]) -> str:
    """The goal in words; "" where the recipe is missing."""
    if not recipe:
        return ""
    goal = str(recipe.get("goal", "size"))
    text = _GOALS.get(goal, goal)
    budgets = ("target_size", "target_density", "target_macs", "max_drop")
    if any(recipe.get(name) is not None for name in budgets):
        return text
    if goal == "size":
        return f"{text}; no budget was set, so accuracy within noise of the dense network's is"
    return f"{text}; no budget was set, so the target is {100 * MACS:g} % of the multiply-adds"


def _verdict(report: Report) -> str:
    smaller = f"{report.ratio:.1f} times smaller"
    metric = report.metric
    before, after = report.value(report.dense), report.value(report.compressed)
    if before is None or after is None:
        return f"{smaller}; the error was not measured"
    if metric == ERROR:
        return f"{smaller}, at {signed(after - before)} points of test error"
    return (
        f"{smaller}, at a test {metric.name} of {metric.text(after)}, dense {metric.text(before)}"
    )


def _test_tile(report: Report) -> tuple[str, str, str] | None:
    """The metric's name on the test set, and its value of the result and of the dense network."""
    before, after = report.value(report.dense), report.value(report.compressed)
    if before is None or after is None:
        return None
    metric = report.metric
    return f"Test {metric.name}", metric.text(after), metric.text(before)


def _paired_text(paired: Paired) -> str:
    """The difference of the networks on the test examples, and its confidence interval."""
    low, high = paired.interval
    text = (
        f"Of the same {paired.examples:,} test examples, only the dense network gets "
        f"{paired.only_dense:,} right, only the compressed one {paired.only_compressed:,}, both "
        f"{paired.both:,}, neither {paired.neither:,}. With 95 % confidence, the added error lies "
        f"between {signed(low)} and {signed(high)} points"
    )
    if low > 0:
        return f"{text}: the compressed network is worse, by no more than that."
    if high < 0:
        return f"{text}: the compressed network is better."
    return f"{text}: this includes 0, so the examples show no significant difference."


def _budget(goal: Goal) -> _Budget:
    reached = goal.text(goal.reached).replace("-", MINUS)
    what = _BUDGETS.get(goal.what, goal.what)
    if goal.what == "drop" and goal.metric != ERROR:
        what = f"how much worse the validation {goal.metric.name} is"
    return _Budget(what, goal.text(goal.limit), reached, goal.verdict, goal.met)


def _lines(report: Report) -> list[_Line]:
    a, b = report.dense, report.compressed
    lines = [
        _Line(
            "File",
            f"{a.nbytes:,} bytes",
            f"{b.nbytes:,} bytes",
            f"{report.ratio:.1f} times smaller",
        )
    ]
    metric = report.metric
    before, after = report.value(a), report.value(b)
    if before is not None and after is not None:
        change = _change(metric, before, after)
        if report.paired is not None:
            low, high = report.paired.interval
            change += f" (95 %: {signed(low)} to {signed(high)})"
        lines += [_Line(f"Test {metric.name}", metric.text(before), metric.text(after), change)]
    lines += [
        _Line(f"Test {name}", f"{a.metrics[name]:.4g}", f"{b.metrics[name]:.4g}")
        for name in report.others
    ]
    if report.on_validation is not None:
        c, d = report.on_validation
        change = f"{_change(metric, c, d)}; all choices were made on this"
        lines += [_Line(f"Validation {metric.name}", metric.text(c), metric.text(d), change)]
    density = f"{100 * report.density:.2f} %"
    lines += [_Line("Density of the pruned weights", "100 %", density, report.counted)]
    if a.macs and b.macs:
        change = f"{a.macs / b.macs:.2f} times fewer"
        lines += [_Line("Multiply-adds of an example", f"{a.macs:,}", f"{b.macs:,}", change)]
    if a.latency_ms is not None and b.latency_ms is not None:
        for key, what in (("p50", "median"), ("p95", "95th percentile")):
            x, y = a.latency_ms[key], b.latency_ms[key]
            change = f"{y / x:.2f} of dense" if x > 0 else ""
            lines += [_Line(f"Latency, {what}, batch 1", f"{x:.3f} ms", f"{y:.3f} ms", change)]
    if a.load_ms is not None and b.load_ms is not None:
        change = f"{signed(b.load_ms - a.load_ms, 1)} ms, once a session"
        lines += [_Line("Load time", f"{a.load_ms:.1f} ms", f"{b.load_ms:.1f} ms", change)]
    if a.load_cpu_ms is not None and b.load_cpu_ms is not None:
        x, y = a.load_cpu_ms, b.load_cpu_ms
        change = f"{y / x:.2f} of dense" if x > 0 else ""
        lines += [_Line("CPU time of a load", f"{x:.1f} ms", f"{y:.1f} ms", change)]
    if a.peak_rss_bytes is not None and b.peak_rss_bytes is not None:
        x, y = a.peak_rss_bytes, b.peak_rss_bytes
        sign = "+" if y >= x else MINUS
        part = f", {y / x:.2f} of dense" if x > 0 else ""
        change = f"{sign}{bytes_text(abs(y - x))}{part}; both hold the runtime"
        lines += [_Line("Peak memory of a load", bytes_text(x), bytes_text(y), change)]
    return lines


def _change(metric: Quantity, before: float, after: float) -> str:
    """A difference in words: '+0.31 points'."""
    unit = "points" if metric.unit == PERCENT else metric.unit
    return f"{metric.change(before, after)} {unit}".rstrip().replace("-", MINUS)


def _stages(run: Run) -> list[Stage]:
    """The bytes at each stage, from the dense file to the packed one.

    Between the files only weights are counted, each in the cheaper of two uncoded forms: all of its
    elements, or the nonzeros and a mask of one bit per element.
    """
    report, rows = run.report, run.report.weights
    whole = [_nbytes(row, row.size) for row in rows]
    pruned = [
        min(all_of_it, _nbytes(row, row.nnz) + _mask(row))
        for row, all_of_it in zip(rows, whole, strict=True)
    ]
    steps = [Stage("dense", report.dense.nbytes, "the dense file, with its graph")]
    if sum(whole) < 0.98 * report.dense.nbytes:
        what = "weights in float32, without the removed channels and neurons"
        steps += [Stage("channels pruned", sum(whole), what)]
    what = "surviving weights in float32, and a mask of one bit per element"
    steps += [Stage("pruned", sum(pruned), what)]
    if all(weight.levels is not None for weight in run.weights):
        quantized = [
            min(before, _quantized_nbytes(weight))
            for weight, before in zip(run.weights, pruned, strict=True)
        ]
        what = "the index of each survivor's level instead of its value, and the levels"
        steps += [Stage("quantized", sum(quantized), what)]
    coded = sum(row.nbytes for row in rows)
    steps += [Stage("coded", coded, "all weights as they are stored in the file")]
    what = "the result, with its graph and the decoder"
    return [*steps, Stage("file", report.compressed.nbytes, what)]


def _nbytes(row: WeightRow, elements: int) -> float:
    return elements * _ELEMENT.get(row.dtype, 4)


def _mask(row: WeightRow) -> float:
    return math.ceil(row.size / 8) if row.nnz < row.size else 0


def _quantized_nbytes(weight: Weight) -> float:
    """Bytes of the levels, a level's index for each survivor, and the mask."""
    assert weight.levels is not None
    bits = max(weight.levels - 1, 0).bit_length()
    return weight.row.nnz * bits / 8 + _nbytes(weight.row, weight.levels) + _mask(weight.row)


def _parts(report: Report) -> list[tuple[str, int, str]]:
    """Name, bytes and colour of each part of the file; small weights together."""
    nbytes = report.compressed.nbytes
    rows = sorted(report.weights, key=lambda row: -row.nbytes)
    named = [row for row in rows if row.nbytes >= 0.02 * nbytes][:8]
    own = sum(row.nbytes for row in rows)
    parts = [(row.name, row.nbytes, f"c{i % COLOURS}") for i, row in enumerate(named)]
    others = own - sum(row.nbytes for row in named)
    if others > 0:
        parts += [(f"{len(rows) - len(named)} smaller weights", others, "muted-fill")]
    if nbytes > own:
        parts += [("graph and decoder", nbytes - own, "soft")]
    return parts


def _phases(history: Sequence[Epoch]) -> list[tuple[str, int, float]]:
    """Each phase: its name, epochs and seconds."""
    return [
        (phase, last - first + 1, sum(e.seconds for e in history[first - 1 : last]))
        for phase, first, last in phases(history)
    ]


def _drawable(weight: Weight) -> bool:
    arrays = [array for array in (weight.before, weight.after) if array is not None]
    # scalars, strings, and integers such as shapes and axes have no histogram
    return bool(arrays) and all(
        array.size > 1 and array.dtype.kind not in "OUScbiu" for array in arrays
    )


def _histogram(i: int, weight: Weight) -> _Histogram:
    row = weight.row
    caption = []
    if weight.after is not None and row.size:
        zeros = 1 - row.nnz / row.size
        left = "" if zeros == 0 else f"{100 * zeros:.1f} % zeros, not drawn; "
        caption += [f"{left}{row.nnz:,} nonzeros on {weight.levels:,} levels"]
    if weight.threshold is not None:
        caption += [f"threshold ±{weight.threshold:.3g}"]
    svg = draw_histogram(f"w{i}", weight.before, weight.after, weight.threshold)
    return _Histogram(row.name, svg, "; ".join(caption))


def _commands(run: Run) -> list[tuple[str, str]]:
    """Commands that repeat the run or look at it: (command, what it does)."""
    data = run.recipe.get("data")
    commands = []
    if run.recipe:
        again = f"prune2onnx compress --recipe {RECIPE} -o again"
        commands += [(again, "the whole run; on the same machine's CPU it gives the same bytes")]
    validate = f"prune2onnx validate {MODEL} --reference {DENSE}"
    if data:
        validate += f" --data {shlex.quote(str(data))}"
    commands += [(validate, "validation: weights, folding, error, size, load time and latency")]
    commands += [(f"prune2onnx inspect {MODEL}", "how each weight is stored")]
    return [*commands, ("prune2onnx report .", "this page")]


def _recipe_text(recipe: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted name and value of every setting that is not empty."""
    found: list[tuple[str, str]] = []
    for name, value in recipe.items():
        if isinstance(value, dict) and value:
            found += _recipe_text(value, f"{prefix}{name}.")
        elif value is not None and value not in ({}, []):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found += [(f"{prefix}{name}", text)]
    return found
