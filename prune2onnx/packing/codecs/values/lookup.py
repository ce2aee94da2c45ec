"""Tables of values, and the nodes that look values up by their codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.streams import Streams
from prune2onnx.packing.codecs.values.kind import Group


def padded(streams: Streams, table: NDArray[Any]) -> NDArray[Any]:
    """A table with unused entries in front, for symbols that start at `Streams.origin`."""
    return np.pad(table, [(0, 0)] * (table.ndim - 1) + [(streams.origin, 0)])


def looked_up(group: Group, streams: Streams, table: str, index: str) -> str:
    """Adds the nodes that look values up, in the weight's own shape where that saves a copy."""
    body = streams.body
    if group.positions == "all" and group.is_single:
        index = body.node("Reshape", index, body.indices(*group.weights[0].shape))
        return body.node("Gather", table, index)
    return body.node("GatherElements", table, index)
