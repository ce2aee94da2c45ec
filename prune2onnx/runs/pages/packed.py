"""The page of a packed file: bytes and error of each weight, budgets, and other sizes.

One HTML file for people, as those of `page`, and of the same look; it needs no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from prune2onnx.packing.rows import WeightRow
from prune2onnx.runs.pages.charts import draw_sizes
from prune2onnx.runs.pages.rendering import rendered
from prune2onnx.runs.report import CurvePoint, Goal


@dataclass(frozen=True)
class Packed:
    """What is known of a packed file.

    Attributes:
        source: name of the file that was read.
        target: name of the packed one.
        nbytes_before: size of the first, external data included.
        nbytes: size of the second.
        rows: its weights.
        errors: by weight, what its layer's outputs or the weight itself have lost.
        hows: by weight, how it changed.
        goals: the budgets.
        curve: other sizes that were tried, from small to large; may be empty.
        notes: what was done, in words.
        load: what a load is predicted to take, in words; "" where that is not known.
        warning: that this is much; "" where it is not.
    """

    source: str
    target: str
    nbytes_before: int
    nbytes: int
    rows: Sequence[WeightRow]
    errors: Mapping[str, float] = field(default_factory=dict)
    hows: Mapping[str, str] = field(default_factory=dict)
    goals: Sequence[Goal] = ()
    curve: Sequence[CurvePoint] = ()
    notes: Sequence[str] = ()
    load: str = ""
    warning: str = ""


def packed_page(packed: Packed) -> str:
    """The page as HTML; the same facts give the same page, byte for byte."""
    chosen = next((point for point in packed.curve if point.is_chosen), None)
    facts = {
        "title": packed.target,
        "packed": packed,
        "ratio": packed.nbytes_before / max(packed.nbytes, 1),
        "curve_svg": draw_sizes("sizes", packed.curve) if len(packed.curve) > 1 else "",
        "error": None if chosen is None else chosen.error,
        "has_drops": any(point.drop is not None for point in packed.curve),
        "own": sum(row.nbytes for row in packed.rows),
        "version": version("prune2onnx"),
    }
    return rendered("packed.html.j2", facts)
