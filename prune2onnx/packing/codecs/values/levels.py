"""Values as codes into one codebook of small integers, the same for all weights, and a scale."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs import rice
from prune2onnx.packing.codecs.huffman import coded_bits
from prune2onnx.packing.codecs.streams import SEGMENT_NBYTES, Streams, coded_nbytes
from prune2onnx.packing.codecs.values.kind import (
    Entries,
    Group,
    RisingEntries,
    ValueKind,
    Written,
)
from prune2onnx.packing.codecs.values.lookup import looked_up, padded

BOOK = np.array([0, *itertools.chain.from_iterable((k, -k) for k in range(1, 128)), -128])
"""The codebook of "levels": a code's integer is BOOK[code], the smallest magnitudes first."""

_FLOAT_LEVELS = 20
"""With fewer levels, a table of floats takes fewer bytes than integers and the nodes to scale them.
"""

_LEVEL_CODES = np.argsort(BOOK.astype(np.int8).view(np.uint8)).astype(np.uint8)

_SYMBOLS_NBYTES = 170
"""About how many bytes the nodes for a sequence of symbols with a Rice code take."""


def level_codes(values: NDArray[Any], fills: bool) -> NDArray[np.uint8] | None:
    """Codes into BOOK; None where a value is -0.0 or is not in BOOK.

    Args:
        values: any numbers.
        fills: whether +0 only fills gaps; its code is then the last instead of the first.
    """
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = values == np.rint(values)
        if not whole.all() or (np.signbit(values) & (values == 0)).any():
            return None
    if values.size and not -128 <= float(values.min()) <= float(values.max()) <= 127:
        return None
    codes: NDArray[np.uint8] = _LEVEL_CODES[values.astype(np.int8).view(np.uint8)]
    if fills:
        zero = codes == 0
        codes = codes - np.uint8(1)
        codes[zero] = codes[~zero].max(initial=0) + (1 if not zero.all() else 0)
    return codes


def _estimate(entries: Entries) -> float | None:
    weight, coder = entries.weight, entries.coder
    if entries.indexed is None or not entries.values.size or weight.working == TensorProto.UINT8:
        return None
    codes = level_codes(entries.values, not entries.every)
    if codes is None:
        return None
    counts = np.append(np.bincount(codes), entries.fillers)
    # Symbols are not in the order of their counts: the smallest magnitudes come first.
    if coder == "huffman":
        nbytes = coded_bits(counts) / 8 + SEGMENT_NBYTES
    elif coder == "rice":
        nbytes = rice.code_of(counts)[1] / 8
    else:
        nbytes = coded_nbytes(counts, coder)
    return nbytes + 0.1 * int(codes.max())


def _write(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> Written:
    fills = group.positions != "all"
    codes = level_codes(np.concatenate(entries), fills)
    assert codes is not None  # `_estimate` made sure
    parts = np.split(codes, np.cumsum([part.size for part in entries])[:-1])
    name, bits = streams.joined(parts)
    book = BOOK[: int(codes.max()) + 1]
    if fills:
        highest = int(codes.max()) + (0 if _has_zero(entries) else 1)
        book = np.append(BOOK[1 : highest + 1], 0)
    table = _table(group, streams, padded(streams, book))
    return looked_up(group, streams, table, name), bits


def _write_rising(
    group: Group, streams: Streams, rising: RisingEntries
) -> tuple[str, str, list[float]] | None:
    """Writes places and levels in one sequence: entries are sorted by level, then by place.

    With N elements in the group, an entry is written as place + N * number of its level.
    """
    every = np.concatenate(rising.entries)
    if not every.size:
        return None
    book, row = np.unique(every, return_inverse=True)
    both = np.sort(row * np.int64(group.size) + rising.places)
    apart = rice.Run("", rising.places, rising=True).bits
    codes = level_codes(every, True)
    assert codes is not None  # `_estimate` made sure
    apart += rice.code_of(np.bincount(codes))[1]
    together = rice.Run("", both, rising=True).bits
    if together / 8 >= apart / 8 + _SYMBOLS_NBYTES:
        return None
    body = streams.body
    name, _ = streams.indices([both])
    size = body.constant(group.size, element_type=TensorProto.INT64)
    table = _table(group, streams, book)
    values = body.node("Gather", table, body.node("Div", name, size))
    bits = [together * part.size / every.size for part in rising.entries]
    return body.node("Mod", name, size), values, bits


def _table(group: Group, streams: Streams, book: NDArray[Any]) -> str:
    """A value that holds levels, times the group's scale if it has one."""
    if group.scale is not None and book.size < _FLOAT_LEVELS:
        return streams.table(book.astype(np.float32) * group.scale)
    table = streams.raw(book.astype(np.int8), TensorProto.INT8)
    if group.working != TensorProto.INT8:
        table = streams.body.node("Cast", table, to=group.working)
    if group.scale is not None:
        table = streams.body.node("Mul", table, streams.table(np.full(1, group.scale)))
    return table


def _has_zero(entries: list[NDArray[Any]]) -> bool:
    return any((part == 0).any() for part in entries)


LEVELS = ValueKind("levels", _estimate, _write, _write_rising, is_looked_up=True, takes_scale=True)
