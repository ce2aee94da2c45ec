"""Charts of a run or a sweep as SVG: inside a page without scripts, fonts or other files, or alone.

Colours are the page's CSS variables, so that a chart follows the light, dark and print styles; ids
are unique to each chart, so that a page can have many. Names of weights are not drawn: the page's
own text has them, escaped. `page` decides what is drawn.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prune2onnx.runs.front import Front
from prune2onnx.runs.history import Epoch
from prune2onnx.runs.report import CurvePoint
from prune2onnx.tasks.quantity import ERROR, Quantity

COLOURS = 6
"""Colours of lines; --c0 ... --c5 in the page's style."""

# Colours that occur nowhere else: each stands for a variable of the page.
_INK, _SOFT, _BAND = "#0a0b0c", "#0a0b0d", "#0a0b0e"
_LINES = tuple(f"#0a0b1{i}" for i in range(COLOURS))
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _BAND: "--band"} | {
    colour: f"--c{i}" for i, colour in enumerate(_LINES)
}
_DASHES = ("-", "--", ":")

_GREY = "#767676"
"""For charts outside of a page: as readable on white as on black."""

_SEED_COLOURS = ("#2f7ed8", "#c8641b", "#16877b", "#b2509e", "#8a7410", "#d0454c")

_WIDTH = 4.6  # inches: at a phone's width a point is about a pixel
_BINS = 61  # odd, so that zero is in the middle of a bin
_MOST_LEVELS = 64  # most levels that are drawn one by one
_NARROWEST = 0.09  # fraction of the width that a phase's name needs


def _svg(
    name: str,
    alt: str,
    size: tuple[float, float],
    draw: Callable[[Any], None],
    *,
    layout: Literal["constrained"] | None = "constrained",
) -> str:
    """A figure as SVG.

    Args:
        name: unique on the page; ids begin with it.
        alt: a description of the picture, for screen readers.
        size: width and height in inches.
        draw: fills a matplotlib figure.
        layout: matplotlib's; None if `draw` places the axes.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.size": 9,
        "path.simplify": False,
        **dict.fromkeys(("text.color", "axes.labelcolor"), _INK),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), _INK),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), _SOFT),
        "axes.linewidth": 0.6,
        "grid.linewidth": 0.5,
        "grid.alpha": 0.45,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout=layout)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> str:
    """The <svg> element of a document, with the page's colours, and ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    wanted = {one or other for one, other in used}

    def own(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in wanted else ""

    svg = re.sub(r' id="([^"]*)"', own, svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r' (d|x|y)="([^"]*)"', _rounded, svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None  # matplotlib writes it
    start = f'<svg class="picture" role="img" aria-label="{alt}" viewBox="{box[1]}">'
    svg = start + svg[svg.index(">") + 1 :]
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _rounded(found: re.Match[str]) -> str:
    """Coordinates rounded to 0.01 points, which makes no visible difference."""
    numbers = re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", found[2])
    return f' {found[1]}="{" ".join(numbers.split())}"'


@dataclass(frozen=True)
class Stage:
    """The size of a network at one stage of compression.

    Attributes:
        label: a word or two.
        nbytes: total bytes.
        what: the things that are counted.
    """

    label: str
    nbytes: float
    what: str


def draw_stages(name: str, steps: Sequence[Stage], shown: Callable[[float], str]) -> str:
    """A bar for each stage, dense on top; lengths are in proportion to the bytes."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        most = max(step.nbytes for step in steps)
        axes.barh(
            range(len(steps)),
            [step.nbytes for step in steps],
            height=0.62,
            color=[_SOFT, *[_LINES[0]] * (len(steps) - 2), _LINES[1]],
        )
        for i, step in enumerate(steps):
            ratio = "" if i == 0 else f" = 1/{steps[0].nbytes / max(step.nbytes, 1):.1f}"
            text = f"{shown(step.nbytes)}{ratio}"
            # beside its bar, or within the longest ones
            if step.nbytes > 0.72 * most:
                axes.text(step.nbytes * 0.98, i, text, va="center", ha="right", weight="bold")
            else:
                axes.text(step.nbytes + 0.015 * most, i, text, va="center")
        axes.set_yticks(range(len(steps)), [step.label for step in steps])
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0)

    alt = "Bytes at each stage: " + ", ".join(f"{s.label} {shown(s.nbytes)}" for s in steps)
    return _svg(name, alt, (_WIDTH, 0.3 * len(steps) + 0.15), draw)


def draw_curves(history: Sequence[Epoch], metric: Quantity = ERROR) -> dict[str, str]:
    """Charts of loss, metric, density and, if any were learned, thresholds by epoch."""
    x = np.arange(1, len(history) + 1)
    names = weights_of(history)

    def loss(axes: Any) -> None:
        axes.plot(x, [e.loss for e in history], color=_LINES[0])
        axes.plot(x, [e.validation_loss for e in history], color=_LINES[1])
        _log(axes, [value for e in history for value in (e.loss, e.validation_loss)])

    def error(axes: Any) -> None:
        values = [e.value for e in history]
        axes.plot(x, values, color=_LINES[0])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} {metric.unit}".rstrip())
        if min(values) >= 0 and not metric.higher_is_better:
            axes.set_ylim(0, _roof(values))

    def density(axes: Any) -> None:
        for i, name in enumerate(names):
            own = [e.densities.get(name, np.nan) for e in history]
            axes.plot(x, own, linewidth=1, **_line(i))
        axes.plot(x, [e.density for e in history], color=_INK, linewidth=1.8)
        values = [e.density for e in history] + [v for e in history for v in e.densities.values()]
        _log(axes, values)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")

    def threshold(axes: Any) -> None:
        for i, name in enumerate(names):
            own = [
                e.thresholds.get(name, np.nan) if e.phase == "prune" else np.nan for e in history
            ]
            axes.plot(x, own, linewidth=1.2, **_line(i))
        axes.set_ylim(bottom=0)

    pruned = any(e.phase == "prune" and e.thresholds for e in history)
    drawn = {
        "loss": (loss, "Loss by epoch"),
        "error": (error, f"Validation {escape(metric.name)} by epoch"),
        "density": (density, "Density by epoch, of each pruned weight and of all together"),
        "threshold": (threshold, "Learned threshold of each weight by epoch"),
    }

    def panel(draw: Callable[[Any], None]) -> Callable[[Any], None]:
        def whole(figure: Any) -> None:
            axes = figure.subplots()
            draw(axes)
            _phases(axes, history)
            axes.set_xlabel("epoch", labelpad=1)
            axes.grid(True, axis="y")

        return whole

    return {
        key: _svg(key, alt, (_WIDTH, 2.5), panel(draw))
        for key, (draw, alt) in drawn.items()
        if key != "threshold" or pruned
    }


def weights_of(history: Sequence[Epoch]) -> list[str]:
    """The pruned weights of a history, in the order of their lines' colours."""
    return list(dict.fromkeys(name for e in history for name in (*e.densities, *e.thresholds)))


def _line(i: int) -> dict[str, Any]:
    return {"color": _LINES[i % COLOURS], "linestyle": _DASHES[i // COLOURS % len(_DASHES)]}


def _roof(values: Sequence[float]) -> float:
    """The upper limit of an axis from zero: the first epochs may be far above the others."""
    later = sorted(values)[: max(1, round(0.9 * len(values)))]
    return max(min(max(values), 2.5 * later[-1]) * 1.08, 1e-9)


def _log(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if not any(value > 0 for value in values):
        return
    axes.set_yscale("log", nonpositive="mask")
    positive = [value for value in values if value > 0]
    wide = max(positive) / min(positive) > 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def phases(history: Sequence[Epoch]) -> list[tuple[str, int, int]]:
    """Each phase: its name, and the numbers of its first and last epoch in the history, from 1."""
    found: list[tuple[str, int, int]] = []
    for i, epoch in enumerate(history, 1):
        if found and found[-1][0] == epoch.phase and epoch.epoch != 1:
            found[-1] = (epoch.phase, found[-1][1], i)
        else:
            found.append((epoch.phase, i, i))
    return found


def _phases(axes: Any, history: Sequence[Epoch]) -> None:
    """Marks the phases: a band behind every second one, and their names above."""
    transform = axes.get_xaxis_transform()
    axes.set_xlim(0.5, len(history) + 0.5)
    for i, (phase, first, last) in enumerate(phases(history)):
        if i % 2:
            axes.axvspan(first - 0.5, last + 0.5, color=_BAND, linewidth=0, zorder=0)
        if (last - first + 1) / len(history) >= _NARROWEST:
            middle = (first + last) / 2
            axes.text(
                middle,
                1.015,
                phase[:12],
                transform=transform,
                ha="center",
                va="bottom",
                fontsize=8,
                parse_math=False,
            )
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def draw_histogram(
    name: str,
    before: NDArray[Any] | None,
    after: NDArray[Any] | None,
    threshold: float | None,
) -> str:
    """Histograms of a weight before and after, on one scale; zeros after are not drawn.

    Args:
        name: of the picture.
        before: values in the dense network; None where they are not known.
        after: values in the result, any shape; None where they are not known.
        threshold: drawn with both signs; None draws none.
    """
    kept = {"before": before, "after": after}
    rows = {key: _numbers(array) for key, array in kept.items() if array is not None}
    height = 0.75 * len(rows) + 0.3
    reach = max((float(np.abs(v).max()) for v in rows.values() if v.size), default=0.0) or 1.0

    def draw(figure: Any) -> None:
        # placed by hand: there may be many, and an automatic layout takes as long as the drawing
        space = {"left": 0.02, "right": 0.98, "top": 0.99, "hspace": 0.12}
        bottom = 0.24 / height
        panels = figure.subplots(
            len(rows),
            1,
            sharex=True,
            squeeze=False,
            gridspec_kw={**space, "bottom": bottom},
        )[:, 0]
        for axes, (key, values) in zip(panels, rows.items(), strict=True):
            colour = _SOFT if key == "before" else _LINES[0]
            if key == "after":
                values = values[values != 0]
            levels, counts = np.unique(values, return_counts=True)
            if key == "after" and levels.size <= _MOST_LEVELS:
                axes.vlines(levels, 0, counts, color=colour, linewidth=2.2)
            else:
                edges = np.linspace(-reach, reach, _BINS + 1)
                counts = np.histogram(values, edges)[0]
                axes.stairs(counts, edges, fill=True, color=colour)
            axes.set_ylim(0, 1.3 * counts.max(initial=1))  # space for the label
            if threshold is not None:
                for side in (-threshold, threshold):
                    axes.axvline(side, color=_LINES[1], linewidth=1, linestyle="--")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.text(0.0, 1.0, key, transform=axes.transAxes, va="top", fontsize=7)
            axes.tick_params(length=2, labelsize=7)
        panels[-1].set_xlim(-1.04 * reach, 1.04 * reach)
        panels[-1].locator_params(axis="x", nbins=6)

    alt = f"Histogram of values, {' and '.join(rows)}"
    return _svg(name, alt, (3.3, height), draw, layout=None)


def _numbers(array: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(array.ravel(), np.float64)
    return values[np.isfinite(values)]


def draw_sizes(name: str, points: Sequence[CurvePoint]) -> str:
    """The error of the outputs against file size, from small to large; what was written is filled.

    Both axes are logarithmic, unless an error is 0.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        sizes = [point.nbytes for point in points]
        errors = [point.error for point in points]
        axes.plot(sizes, errors, color=_SOFT, linewidth=1)
        for size, error, point in zip(sizes, errors, points, strict=True):
            filled = _LINES[1] if point.is_chosen else "none"
            edge = _LINES[1] if point.is_chosen else _LINES[0]
            axes.scatter(size, error, s=36, facecolors=filled, edgecolors=edge, zorder=2)
        _log(axes, errors)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        _log_sizes(axes)
        axes.grid(True)

    alt = "Relative error of the outputs against file size, for each size that was tried"
    return _svg(name, alt, (_WIDTH, 2.8), draw)


def _log_sizes(axes: Any) -> None:
    """A logarithmic x axis of kilobytes."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(lambda nbytes, _: f"{nbytes / 1000:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("file (kB, log scale)")


def draw_front(name: str, front: Front, marked: str = "") -> str:
    """The test metric against file size for a sweep's runs, for a page; `marked` gets a ring."""
    alt = f"Test {escape(front.metric.name)} against file size for each run of the sweep"
    return _svg(name, alt, (_WIDTH, 3.0), lambda figure: _fill_front(front, figure, marked))


def front_picture(front: Front) -> bytes:
    """The test metric against file size (log axis), as an SVG file: always the same bytes."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "prune2onnx",
        "svg.fonttype": "none",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _GREY),
        **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _GREY),
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _fill_front(front, figure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _fill_front(front: Front, figure: Any, marked: str = "") -> None:
    """Draws the test metric against file size (log axis); the run named `marked` gets a ring."""
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    seeds = sorted({point.seed for point in front.points})
    colours = {seed: _SEED_COLOURS[i % len(_SEED_COLOURS)] for i, seed in enumerate(seeds)}
    for dense in front.dense:
        colour = colours[dense.seed]
        axes.axhline(dense.error, color=colour, linestyle="--", linewidth=1, alpha=0.7)
    best = front.pareto
    axes.plot([p.nbytes for p in best], [p.error for p in best], color=_GREY, zorder=1)
    for point in front.done:
        colour = colours[point.seed]
        filled = colour if point.met else "none"
        axes.scatter(point.nbytes, point.error, s=42, facecolors=filled, edgecolors=colour)
        if point.name == marked:
            axes.scatter(point.nbytes, point.error, s=150, facecolors="none", edgecolors=_GREY)
    _log_sizes(axes)
    unit = f" ({front.metric.unit})" if front.metric.unit else ""
    axes.set_ylabel(f"test {front.metric.name}{unit}", parse_math=False)
    axes.grid(True)
    axes.set_axisbelow(True)
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o"}
    shown = [Line2D([], [], color=colours[s], label=f"seed {s}", **dot) for s in seeds]
    if marked:
        ring: dict[str, Any] = {**dot, "markersize": 11, "markerfacecolor": "none"}
        shown += [Line2D([], [], color=_GREY, label="this run", **ring)]
    if front.missed:
        label = "budget missed"
        shown += [Line2D([], [], color=_GREY, markerfacecolor="none", label=label, **dot)]
    shown += [Line2D([], [], color=_GREY, label=f"Pareto front by validation {front.metric.name}")]
    if front.dense:
        nbytes = max(dense.nbytes for dense in front.dense)
        label = f"dense, {nbytes / 1000:,.1f} kB"
        shown += [Line2D([], [], color=_GREY, linestyle="--", label=label)]
    axes.legend(handles=shown, frameon=False)
