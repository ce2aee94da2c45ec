"""Values stored as they are, in the narrowest type that holds them exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.streams import Streams
from prune2onnx.packing.codecs.values.kind import Entries, Group, ValueKind, Written
from prune2onnx.packing.codecs.weight import numpy_type


def _estimate(entries: Entries) -> float:
    item = numpy_type(entries.weight.storage).itemsize
    return float(item * (entries.values.size + entries.fillers))


def _write(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> Written:
    dtype = numpy_type(group.storage)
    flat = np.concatenate(entries).astype(dtype)
    name = streams.raw(flat, group.storage)
    if group.storage != group.working:
        name = streams.body.node("Cast", name, to=group.working)
    return name, [8.0 * dtype.itemsize * part.size for part in entries]


RAW = ValueKind("raw", _estimate, _write, keeps_storage=True)
