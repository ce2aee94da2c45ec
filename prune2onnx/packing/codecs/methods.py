"""Methods: where a weight's values stand and how they are stored, numbered as in the file."""

from __future__ import annotations

from dataclasses import dataclass

from prune2onnx.packing.codecs.values.codebook import CODEBOOK
from prune2onnx.packing.codecs.values.dictionary import DICTIONARY
from prune2onnx.packing.codecs.values.kind import Positions, ValueKind
from prune2onnx.packing.codecs.values.levels import LEVELS
from prune2onnx.packing.codecs.values.planes import PLANES
from prune2onnx.packing.codecs.values.raw import RAW


@dataclass(frozen=True)
class Method:
    """How a weight is written: the positions of its values, and how the values are stored."""

    positions: Positions
    values: ValueKind

    @property
    def name(self) -> str:
        """The name in reports."""
        values = self.values.name
        return values if self.positions == "all" else f"{self.positions}-{values}"


VALUES = (RAW, PLANES, CODEBOOK, LEVELS)
"""The kinds of values that any positions have."""

METHODS = (
    *(Method(where, values) for where in ("all", "gap", "mask") for values in VALUES),
    Method("all", DICTIONARY),
)
"""Every method; a file holds their indices. Append only: those of a new kind of values go last."""

GAP_LEVELS = Method("gap", LEVELS)


def method(name: str) -> Method:
    """The method of this name."""
    return next(one for one in METHODS if one.name == name)
