"""Values as codes into one codebook of small integers, the same for all weights, and a scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs import rice
from prune2onnx.packing.codecs.function import Body, zeros_of
from prune2onnx.packing.codecs.huffman import coded_bits
from prune2onnx.packing.codecs.streams import SEGMENT_NBYTES, Streams, coded_nbytes
from prune2onnx.packing.codecs.values.kind import (
    Entries,
    Group,
    RisingEntries,
    ValueKind,
    Vector,
    Written,
)
from prune2onnx.packing.codecs.values.lookup import looked_up, padded
from prune2onnx.packing.codecs.weight import entropy_bits

BOOK = np.array([0, *itertools.chain.from_iterable((k, -k) for k in range(1, 128)), -128])
"""The codebook of "levels": a code's integer is BOOK[code], the smallest magnitudes first."""

_FLOAT_LEVELS = 20
"""With fewer levels, a table of floats takes fewer bytes than integers and the nodes to scale them.
"""

_LEVEL_CODES = np.argsort(BOOK.astype(np.int8).view(np.uint8)).astype(np.uint8)

_SYMBOLS_NBYTES = 20
"""About how many more bytes the nodes for a sequence of symbols take than those for rows."""

_MOST_BY_WEIGHT = 1 << 22
"""Most comparisons of an entry with a weight's bound."""


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
        # In one sequence with positions they take about their entropy.
        nbytes = (entropy_bits(counts) if entries.rising else rice.about_bits(counts)) / 8
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


@dataclass(frozen=True)
class _Rows:
    """Levels as numbers of rows, in which the places of entries are counted.

    Attributes:
        numbers: each entry's row, int64 [n].
        levels: row -> level or magnitude; where rows are counted from each weight's lowest
            magnitude, weight -> that.
        signed: whether rows are of magnitudes, and a bit behind the place is the sign.
        by_weight: whether rows are counted from each weight's lowest magnitude.
    """

    numbers: NDArray[np.int64]
    levels: NDArray[np.int64]
    signed: bool = False
    by_weight: bool = False


def _rows(group: Group, rising: RisingEntries) -> Iterator[_Rows]:
    """Every way to number rows that fits."""
    every = np.concatenate(rising.entries).astype(np.int64)
    yield _Rows(*_by_frequency(every))
    if group.working == TensorProto.FLOAT:
        yield _Rows(*_by_frequency(np.abs(every)), signed=True)
        scales = [weight.scale.size for weight in group.weights if weight.scale is not None]
        count = len(group.weights)
        if count > 1 and max(scales, default=1) == 1 and every.size * count <= _MOST_BY_WEIGHT:
            least = [np.abs(part).min() if part.size else 1 for part in rising.entries]
            each = np.repeat(least, [part.size for part in rising.entries])
            own = np.asarray(least, np.int64)
            yield _Rows(np.abs(every) - each.astype(np.int64), own, signed=True, by_weight=True)


def _by_frequency(levels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of levels, and the levels by them, the most frequent first."""
    found, places, counts = np.unique(levels, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return np.argsort(order)[places], found[order]


def _integers(group: Group, rising: RisingEntries, rows: _Rows) -> NDArray[np.int64]:
    """What is written, ascending: the row, then the place, then (`signed`) the sign."""
    found = rows.numbers * (group.size + 1) + rising.places + 1
    if rows.signed:
        found = 2 * found + (np.concatenate(rising.entries) < 0)
    return np.sort(found)


def _nodes_nbytes(group: Group, rows: _Rows) -> int:
    """About the bytes of the nodes and constants that depend on the choice of rows."""
    scaled = group.weights[0].scale is not None and group.scale is None
    if rows.by_weight:
        return 75 + 145 + (8 if scaled else 4) * len(group.weights)
    return 75 * rows.signed + 22 * len(group.weights) * scaled


def _write_rising(group: Group, streams: Streams, rising: RisingEntries) -> Vector | None:
    """Writes places and levels in one sequence: entries are sorted by level, then by place."""
    count = sum(part.size for part in rising.entries)
    if not count:
        return None
    tried: list[tuple[float, float, int, _Rows]] = []
    for rows in _rows(group, rising):
        nbytes = rice.rising_bits(_integers(group, rising, rows)) / 8
        tried.append((nbytes + _nodes_nbytes(group, rows), nbytes, len(tried), rows))
    cost, nbytes, _, rows = min(tried)
    codes = level_codes(np.concatenate(rising.entries), True)
    assert codes is not None  # `_estimate` made sure
    apart = (rice.rising_bits(rising.places) + rice.about_bits(np.bincount(codes))) / 8
    apart += _SYMBOLS_NBYTES
    if cost - _nodes_nbytes(group, _Rows(rows.numbers, rows.levels)) >= apart:
        return None
    body = streams.body
    integers = streams.rising_integers(_integers(group, rising, rows))
    row_size = body.constant((1 + rows.signed) * (group.size + 1))
    row = body.node("Div", integers, row_size)
    place = body.node("Mod", integers, row_size)
    if rows.signed:
        two, minus_one = body.constant(2), body.constant(-1)
        sign = body.node("Pow", minus_one, body.node("Mod", place, two))
        place = body.node("Div", place, two)
        scale = streams.table(np.full(1, group.scale)) if group.scale is not None else ""
        if rows.by_weight:
            which = _which(group, body, place)
            least = body.node("Gather", body.constant(rows.levels.tolist()), which)
            level = body.node("Add", row, least)
            scales = [weight.scale for weight in group.weights if weight.scale is not None]
            if scales and not scale:
                table = streams.table(np.concatenate([one.reshape(1) for one in scales]))
                scale = body.node("Gather", table, which)
        else:
            level = body.node("Gather", body.constant(rows.levels.tolist()), row)
        values = body.node("Cast", body.node("Mul", level, sign), to=TensorProto.FLOAT)
        values = body.node("Mul", values, scale) if scale else values
    else:
        values = body.node("Gather", _table(group, streams, rows.levels), row)
    zeros = zeros_of(body, (group.size + 1,), group.working)
    vector = body.node("ScatterElements", zeros, place, values)
    bits = [8 * nbytes * part.size / count for part in rising.entries]
    return Vector(vector, bits, leading=1, scaled=rows.by_weight)


def _which(group: Group, body: Body, place: str) -> str:
    """A value with the weights, by their numbers, in which places are; the first place is 1."""
    ends = np.cumsum([weight.array.size for weight in group.weights]) + 1
    before = body.node("Less", place, body.constant(ends.tolist(), (ends.size, 1)))
    before = body.node("Cast", before, to=TensorProto.UINT8)
    return body.node("ArgMax", before, keepdims=0)  # the first whose end is behind the place


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
