"""Results as tables for people, by rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from prune2onnx.errors import printable
from prune2onnx.packing.rows import WeightRow
from prune2onnx.runs.front import Front, Point, over_seeds
from prune2onnx.runs.report import CurvePoint, Report, bytes_text
from prune2onnx.tasks.quantity import ERROR, PERCENT, Quantity

if TYPE_CHECKING:  # these import onnxruntime and data sets, which only some verbs need
    from prune2onnx.commands.quantize import QuantizeResult
    from prune2onnx.commands.search import Found
    from prune2onnx.commands.shrink import ShrinkResult
    from prune2onnx.runtime.benchmark import Benchmark, Timing


_MOST_ROWS = 1000  # that anyone reads


def weights_table(
    rows: Sequence[WeightRow], nbytes: int | None = None, errors: Mapping[str, float] | None = None
) -> Table:
    """One line per weight, and totals.

    Args:
        rows: the weights; if their entropy was measured, columns compare with other forms.
        nbytes: size of the whole file; the rest is graph and decoder.
        errors: by name, what lossy packing has changed; a column of its own.
    """
    table = Table(title="weights")
    compared = any(row.entropy_nbytes is not None for row in rows)
    others = ("entropy", "sparse", "zipped") if compared else ("error",) if errors else ()
    headings = ("name", "shape", "type", "density", "codec", "bytes", "bits/weight")
    for heading in (*headings, *others, "why dense"):
        numeric = heading in ("density", "bytes", "bits/weight", *others)
        # names and codecs are never cut; reasons wrap
        table.add_column(
            heading, justify="right" if numeric else "left", no_wrap=heading != "why dense"
        )
    shown = list(rows)
    if len(rows) > _MOST_ROWS:
        largest = sorted(range(len(rows)), key=lambda place: -rows[place].nbytes)[:_MOST_ROWS]
        shown = [rows[place] for place in sorted(largest)]
        table.caption = (
            f"the {_MOST_ROWS} largest of {len(rows):,} weights; --json lists them all, and the "
            "totals count them all"
        )
    for row in shown:
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        shape = "x".join(map(str, row.shape)) or "scalar"
        density = f"{100 * row.density:.2f} %"
        cells: list[str | Text] = [
            Text(printable(row.name)),
            shape,
            row.dtype,
            density,
            row.codec,
            f"{row.nbytes:,}",
            bits,
        ]
        if compared:
            forms = (row.entropy_nbytes, row.sparse_nbytes, row.zipped_nbytes)
            cells += ["" if form is None else f"{form:,.0f}" for form in forms]
        elif errors:
            cells.append(f"{errors.get(row.name, 0.0):.2%}")
        table.add_row(*cells, Text(printable(row.reason)))
    own = sum(row.nbytes for row in rows)
    blank = [""] * 4
    table.add_section()
    if compared:
        totals = [
            f"{sum(form or 0 for form in column):,.0f}"
            for column in (
                [row.entropy_nbytes for row in rows],
                [row.sparse_nbytes for row in rows],
                [row.zipped_nbytes for row in rows],
            )
        ]
        table.add_row("weights", *blank, f"{own:,}", "", *totals, "")
    if nbytes is not None:
        table.add_row("graph and decoder", *blank, f"{nbytes - own:,}")
        table.add_row("file", *blank, f"{nbytes:,}")
    return table


def report_table(report: Report) -> Table:
    """The dense and the compressed file, a line per quantity."""
    table = Table(title="dense and compressed, in onnxruntime")
    for heading in ("", "dense", "compressed", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    a, b = report.dense, report.compressed
    sizes = bytes_text(a.nbytes), bytes_text(b.nbytes)
    table.add_row("file", *sizes, f"{report.ratio:.1f}x smaller")
    metric = report.metric
    if (before := report.value(a)) is not None and (after := report.value(b)) is not None:
        change = metric.change(before, after)
        name = printable(metric.name)
        table.add_row(f"test {name}", metric.text(before), metric.text(after), change)
        for other in report.others:
            numbers = (f"{each.metrics[other]:.4g}" for each in (a, b))
            table.add_row(f"test {printable(other)}", *numbers)
    if a.macs and b.macs:
        fewer = f"{a.macs / b.macs:.2f}x fewer"
        table.add_row("multiply-adds", f"{a.macs:,}", f"{b.macs:,}", fewer)
    for what, x, y in (
        ("load", a.load_ms, b.load_ms),
        ("CPU time of a load", a.load_cpu_ms, b.load_cpu_ms),
    ):
        if x is not None and y is not None:
            table.add_row(what, f"{x:.1f} ms", f"{y:.1f} ms", _times(y, x))
    if a.peak_rss_bytes is not None and b.peak_rss_bytes is not None:
        peaks = a.peak_rss_bytes, b.peak_rss_bytes
        table.add_row("peak memory of a load", *map(bytes_text, peaks), _times(*peaks[::-1]))
    if a.latency_ms is not None and b.latency_ms is not None:
        for name in ("p50", "p95"):
            p, q = a.latency_ms[name], b.latency_ms[name]
            table.add_row(f"latency {name}", f"{p:.3f} ms", f"{q:.3f} ms", _times(q, p))
    if report.on_validation is not None:
        c, d = report.on_validation
        name = f"validation {printable(metric.name)}"
        table.add_row(name, metric.text(c), metric.text(d), metric.change(c, d))
    folded = "folded on load"
    if not report.folded:
        left = printable(report.left)
        folded = f"NOT folded: {left} decoded at every inference" if left else "NOT folded"
    counted = f"counts {report.counted}" if report.counted else ""
    table.add_row("density", "100 %", f"{100 * report.density:.2f} %", counted)
    if report.max_abs_diff is None:
        outputs = f"the network was not run: {report.skipped}"
    else:
        outputs = f"outputs differ by at most {report.max_abs_diff:.1e} from the reference's"
    notes = "".join(f"\n{line}" for line in (*report.budget, *report.notes))
    table.caption = f"decoders {folded}; {outputs}{notes}"
    return table


def _times(compressed: float, dense: float) -> str:
    """A ratio: '1.25x'; "" where there is none."""
    return f"{compressed / dense:.2f}x" if dense else ""


def front_table(front: Front) -> Table:
    """A line per run, and a line of means for each budget that has several seeds."""
    table = Table(title=f"size and {front.metric.name}")
    metric = front.metric
    shown = (f"test {metric.name}", "validation", front.loss)
    for heading in ("budget", "seed", "bytes", *shown, "density", "smaller", "time", ""):
        left = heading in ("budget", "")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "")
    pareto = front.pareto
    for points in front.by_budget:
        for point in points:
            mark = point.message if point.state in ("done", "failed") else ""
            if point.state != "done":
                mark = f"{point.state}: {mark}" if mark else point.state
            elif point in pareto:
                mark = f"* {mark}"
            seconds = "" if point.seconds is None else f"{point.seconds:,.0f} s"
            last = Text(printable(mark))
            table.add_row(point.budget, str(point.seed), *_cells(point, metric), seconds, last)
        mean = over_seeds(points)
        if len(points) > 1 and mean["nbytes"] is not None:
            size, error, validation = (mean[key] for key in ("nbytes", "error", "validation_error"))
            table.add_row(
                "",
                "mean",
                f"{size['mean']:,.0f}",
                *(_spread(each, metric) for each in (error, validation)),
                style="dim",
            )
    table.add_section()
    for dense in front.dense:
        errors = metric.text(dense.error), metric.text(dense.validation_error)
        table.add_row("dense", str(dense.seed), f"{dense.nbytes:,}", *errors)
    better = "higher" if metric.higher_is_better else "lower"
    table.caption = (
        f"* Pareto front: no smaller file has this validation {metric.name} or a {better} one; "
        f"{front.loss}: "
    )
    table.caption += (
        "points of test error added" if metric == ERROR else "how much worse than dense, on test"
    )
    return table


def _spread(figures: Mapping[str, float], metric: Quantity) -> str:
    """A mean and its spread: '1.50 ± 0.20 %'."""
    form = ".2f" if metric.unit == PERCENT else ".4g"
    text = f"{figures['mean']:{form}} ± {figures['spread']:{form}} {metric.unit}"
    return text.rstrip()


def _cells(point: Point, metric: Quantity) -> tuple[str, ...]:
    if point.state != "done":
        return ("",) * 6
    assert point.density is not None and point.error is not None and point.drop is not None
    assert point.validation_error is not None
    return (
        f"{point.nbytes:,}",
        metric.text(point.error),
        metric.text(point.validation_error),
        metric.change(0.0, point.drop),
        f"{100 * point.density:.2f} %",
        f"{point.ratio:.1f}x",
    )


def shrink_table(result: ShrinkResult) -> Table:
    """A line for each weight that changed."""
    table = Table("weight", "shape before", "after", title="shrunk")
    for row in result.rows:
        old, new = ("x".join(map(str, shape)) for shape in (row.before, row.after))
        after = "same" if old == new else new or "removed"
        table.add_row(Text(printable(row.name)), old or "none", after)
    return table


_COMPUTES = {"static": "int8", "int8": "int8, dynamic"}


def layers_table(result: QuantizeResult) -> Table:
    """A line for each layer."""
    table = Table("weight", "operator", "computes in", "disturbance", "why", title="layers")
    for layer in result.layers:
        known = "" if layer.disturbance is None else f"{layer.disturbance:.1e}"
        name = Text(printable(layer.weight))
        number_type = _COMPUTES.get(layer.compute, layer.compute)
        table.add_row(name, layer.op, number_type, known, layer.reason)
    return table


def curve_table(points: Sequence[CurvePoint]) -> Table:
    """A line for each size that was tried."""
    headings = ["bytes", "error of the outputs", "points of error", "written"]
    if all(point.drop is None for point in points):
        headings.remove("points of error")
    table = _table("sizes and errors on held-out examples", *headings)
    for point in points:
        cells = [f"{point.nbytes:,}", f"{point.error:.3%}"]
        if point.drop is not None:
            cells.append(f"{point.drop:+.2f}")
        table.add_row(*cells, "yes" if point.is_chosen else "")
    return table


def tried_table(found: Found) -> Table:
    """A line for each run of a search, the best one marked."""
    names = list(dict.fromkeys(name for one in found.tried for name in one.settings))
    table = Table(title=f"{found.metric.name} on the validation split")
    for heading in ("run", *names, "bytes", found.metric.name):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for one in found.tried:
        values = [one.settings.get(name, "") for name in names]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        size = "" if one.nbytes is None else f"{one.nbytes:,}"
        value = "" if one.value is None else found.metric.text(one.value)
        state = "" if one.state == "done" else one.state
        marks = ["* best" if one == found.best else "", state, printable(one.message)]
        last = Text("; ".join(mark for mark in marks if mark))
        table.add_row(str(one.number), *cells, size, value, last)
    return table


def benchmark_tables(benchmark: Benchmark) -> list[Table]:
    """Tables of files, of inferences and, with a profile, of operators."""
    opened = _table("files", "file", "bytes", "load ms", "CPU ms", "peak memory MB")
    for load in benchmark.loads:
        taken = (load.load_ms, load.cpu_ms, load.peak_rss_bytes / 1e6)
        opened.add_row(_name(load.file), f"{load.nbytes:,}", *(f"{one:.1f}" for one in taken))
    headings = ("file", "batch", "threads", "p50 ms", "p95 ms", "p99 ms", "examples/s")
    timings = _table("inferences, interleaved", *headings, "time / first file's")
    for timing in benchmark.timings:
        times = (f"{ms:.3f}" for ms in (timing.p50_ms, timing.p95_ms, timing.p99_ms))
        threads = str(timing.threads or "default")
        cells = [str(timing.batch), threads, *times, f"{timing.throughput:,.0f}"]
        timings.add_row(_name(timing.file), *cells, _compared(timing))
    tables = [opened, timings]
    if benchmark.operators:
        headings = ("file", "batch", "threads", "operator", "kernels", "ms", "fraction")
        operators = _table("kernels in an inference", *headings)
        for one in benchmark.operators:
            cells = [str(one.batch), str(one.threads or "default"), one.name]
            figures = [str(one.kernels), f"{one.ms:.4f}", f"{100 * one.share:.0f} %"]
            operators.add_row(_name(one.file), *cells, *figures)
        tables.append(operators)
    return tables


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        text = heading in ("file", "operator", "time / first file's")
        table.add_column(heading, justify="left" if text else "right", no_wrap=text)
    return table


def _name(file: str) -> Text:
    return Text(printable(file))


def _compared(timing: Timing) -> str:
    if timing.ratio is None:
        return ""
    if timing.interval is None:
        return f"{timing.ratio:.2f} (too few rounds for an interval)"
    low, high = timing.interval
    verdict = ", within noise" if timing.is_noise else ""
    return f"{timing.ratio:.2f} ({low:.2f} to {high:.2f}{verdict})"
