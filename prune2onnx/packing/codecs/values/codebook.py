"""Values as codes into a codebook, which holds the distinct values of a weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.book import MAX_VALUES
from prune2onnx.packing.codecs.streams import RUN_NBYTES, Streams, coded_nbytes
from prune2onnx.packing.codecs.values.kind import Entries, Group, ValueKind, Written
from prune2onnx.packing.codecs.values.lookup import looked_up, padded
from prune2onnx.packing.codecs.weight import indexed, narrowest, numpy_type


def _estimate(entries: Entries) -> float | None:
    found = entries.indexed
    if found is None or not entries.values.size or found[1].size >= MAX_VALUES:
        return None
    counts = np.append(np.bincount(found[0]), entries.fillers)
    item = numpy_type(entries.weight.storage).itemsize
    nbytes = coded_nbytes(counts, entries.coder) + item * np.count_nonzero(counts)
    return float(nbytes + RUN_NBYTES * (entries.coder == "rice"))


def _write(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> Written:
    names, bits, books = [], [], []
    base = 0
    for part in entries:
        found = indexed(part)
        assert found is not None  # `_estimate` made sure
        codes, book = found
        books.append(book)
        bits.append(streams.bits(codes) if codes.size else 0.0)
        if codes.size:
            names.append(streams.symbols(codes, base))
        base += book.size
    every = np.concatenate(books)
    if every.dtype == np.float32:
        element_type = narrowest(every)
        table = streams.table(padded(streams, every))
    else:
        element_type = group.working
        table = streams.raw(padded(streams, every), element_type)
    item = 8.0 * numpy_type(element_type).itemsize
    bits = [b + item * book.size for b, book in zip(bits, books, strict=True)]
    return looked_up(group, streams, table, streams.concatenated(names)), bits


CODEBOOK = ValueKind("codebook", _estimate, _write, is_looked_up=True)
