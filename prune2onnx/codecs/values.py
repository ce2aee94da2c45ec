"""The values of a group's entries: their streams, and the nodes that make one vector of them.

One function for each second part of a method. Where the entries stand is `groups`' business.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.codecs.methods import Group
from prune2onnx.codecs.planes import PLANES, planes_of, tables_of
from prune2onnx.codecs.streams import Streams
from prune2onnx.codecs.weight import narrowest, numpy_type, ranked, shared

LEVELS = np.array([0, *itertools.chain.from_iterable((k, -k) for k in range(1, 128)), -128])
"""The codebook of "levels": a code's integer is LEVELS[code], near ones first."""

_FLOAT_LEVELS = 20
"""Below so many a table of floats takes less than one of integers with what makes them floats."""

_LEVEL_CODES = np.argsort(LEVELS.astype(np.int8).view(np.uint8)).astype(np.uint8)


def write_values(
    group: Group, streams: Streams, entries: list[NDArray[Any]]
) -> tuple[str, list[float]]:
    """A value that holds the entries of all weights in a row, and the bits each weight takes."""
    if not any(part.size for part in entries):  # a mask without a nonzero
        entries = [np.zeros(1, entries[0].dtype), *entries[1:]]
    writer = {
        "raw": _raw,
        "planes": _planes,
        "codebook": _codebook,
        "levels": _levels,
    }[group.method.values]
    return writer(group, streams, entries)


def _raw(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> tuple[str, list[float]]:
    dtype = numpy_type(group.storage)
    flat = np.concatenate(entries).astype(dtype)
    name = streams.raw(flat, group.storage)
    if group.storage != group.working:
        name = streams.body.node("Cast", name, to=group.working)
    return name, [8.0 * dtype.itemsize * part.size for part in entries]


def _codebook(
    group: Group, streams: Streams, entries: list[NDArray[Any]]
) -> tuple[str, list[float]]:
    names, bits, books = [], [], []
    base = 0
    for part in entries:
        found = shared(part)
        assert found is not None  # the planner asked
        codes, book = found
        books.append(book)
        bits.append(streams.bits(codes) if codes.size else 0.0)
        if codes.size:
            names.append(streams.symbols(codes, base))
        base += book.size
    every = np.concatenate(books)
    if every.dtype == np.float32:
        kind = narrowest(every)
        table = streams.table(behind(streams, every))
    else:
        kind = group.working
        table = streams.raw(behind(streams, every), kind)
    item = 8.0 * numpy_type(kind).itemsize
    bits = [b + item * book.size for b, book in zip(bits, books, strict=True)]
    return _looked_up(group, streams, table, streams.concatenated(names)), bits


def level_codes(values: NDArray[Any], fills: bool) -> NDArray[np.uint8] | None:
    """Codes into LEVELS; None where a value is no integer it has, or is -0.0.

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


def _levels(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> tuple[str, list[float]]:
    fills = group.method.positions != "all"
    codes = level_codes(np.concatenate(entries), fills)
    assert codes is not None  # the planner asked
    parts = np.split(codes, np.cumsum([part.size for part in entries])[:-1])
    name, bits = streams.joined(parts)
    book = LEVELS[: int(codes.max()) + 1]
    if fills:
        highest = int(codes.max()) + (0 if _has_zero(entries) else 1)
        book = np.append(LEVELS[1 : highest + 1], 0)
    table = level_table(group, streams, behind(streams, book))
    return _looked_up(group, streams, table, name), bits


def level_table(group: Group, streams: Streams, book: NDArray[Any]) -> str:
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


def behind(streams: Streams, table: NDArray[Any]) -> NDArray[Any]:
    """A table, behind what no symbol means."""
    return np.pad(table, [(0, 0)] * (table.ndim - 1) + [(streams.origin, 0)])


def _looked_up(group: Group, streams: Streams, table: str, index: str) -> str:
    """Looks the values up, in the weight's own shape where that saves a copy."""
    body = streams.body
    if group.method.positions == "all" and group.is_single:
        index = body.node("Reshape", index, body.indices(*group.weights[0].shape))
        return body.node("Gather", table, index)
    return body.node("GatherElements", table, index)


def _planes(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> tuple[str, list[float]]:
    body = streams.body
    plan = PLANES[group.storage]
    split = [planes_of(part, group.storage) for part in entries]
    symbols = np.concatenate([symbol for symbol, _ in split])
    codes, present = ranked(symbols)
    parts = np.split(codes, np.cumsum([part.size for part in entries])[:-1])
    code, bits = streams.joined(parts)
    bits = [b + plan.width * part.size for b, part in zip(bits, entries, strict=True)]
    table = streams.table(behind(streams, tables_of(present, group.storage)))
    both = body.node("Gather", table, code, axis=1)
    first, unit = body.nodes("Split", both, body.indices(1, 1), outputs=2)
    rest = np.concatenate([part for _, part in split])
    width = plan.width // 8
    planes = np.stack([rest >> 8 * (width - 1 - i) & 0xFF for i in range(width)]).astype(np.uint8)
    whole = body.node("Cast", streams.raw(planes, TensorProto.UINT8), to=TensorProto.INT32)
    if width > 1:
        weights = [1 << 8 * (width - 1 - i) for i in range(width)]
        whole = body.node("Mul", whole, body.constant(weights, (width, 1)))
        whole = body.node("ReduceSum", whole, body.indices(0), keepdims=1)
    low = whole
    if plan.signed:
        low = body.node("Mod", whole, body.constant(1 << plan.width - 1))
    low = body.node("Cast", low, to=TensorProto.FLOAT)
    value = body.node("Add", first, body.node("Mul", low, unit))
    if plan.signed:
        negative = body.node("Div", whole, body.constant(1 << plan.width - 1))
        sign = body.node("Sub", body.constant(1), body.node("Mul", negative, body.constant(2)))
        value = body.node("Mul", value, body.node("Cast", sign, to=TensorProto.FLOAT))
    value = body.node("Reshape", value, body.indices(-1))
    if group.working != TensorProto.FLOAT:
        value = body.node("Cast", value, to=group.working)
    return value, bits
