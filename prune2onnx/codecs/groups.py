"""Groups: weights that are written alike, joined to one vector, coded, and parted again.

A **method** is two choices, how the positions and how the values of a weight's elements are
written. Weights with the same method form a group; the members of a group that have the same shape
but for the first axis form a family. In the decode function a group is one vector until its end:
each family is cut off, gets its shape, and Split along the first axis gives the weights. So a
network of sixty weights takes hardly more nodes than one of three.

This file writes the nodes and the streams; which weight takes which method is `plan`'s business.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.codecs.function import tensor
from prune2onnx.codecs.huffman import about_bits, coded_bits
from prune2onnx.codecs.planes import PLANES, planes_of, tables_of
from prune2onnx.codecs.streams import Streams
from prune2onnx.codecs.weight import Weight, bits_of, narrowest, numpy_type, ranked, shared

Positions = Literal["all", "gap", "mask"]
Values = Literal["raw", "planes", "codebook", "levels"]


@dataclass(frozen=True)
class Method:
    """How a weight is written.

    Attributes:
        positions: "all" elements; "gap", the steps from one nonzero to the next; "mask", a bit an
            element, eight of them a symbol (n:m sparsity is a mask of few symbols).
        values: "raw", as they are, in the narrowest type that holds them exactly; "planes", the
            exponents coded, the other bits as they are; "codebook", codes into one codebook a
            weight; "levels", the same with one codebook of small integers for all.
    """

    positions: Positions
    values: Values

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return self.values if self.positions == "all" else f"{self.positions}-{self.values}"


METHODS = tuple(
    Method(positions, values)
    for positions in ("all", "gap", "mask")
    for values in ("raw", "planes", "codebook", "levels")
)
"""Every method, the numbers by which a file names them. Append only."""

FILLED_GAPS = (256, 128, 64, 32)
"""Longest steps that may be chosen; longer ones are bridged by entries of value +0."""


@dataclass(frozen=True)
class Steps:
    """How steps become symbols.

    Symbols are numbered by falling frequency (`huffman`), so it matters where the step of fillers
    stands: last where they are rare, first where they are common.

    Attributes:
        longest: that of a filler; no step is longer.
        fillers_first: symbol s is step s + 1; or, if set, symbol 0 is a filler's and s is step s.
    """

    longest: int
    fillers_first: bool

    def symbols(self, steps: NDArray[np.int64], real: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The symbols of steps, uint8 [n]; `real` are the places of those that are no fillers."""
        if not self.fillers_first:
            return (steps - 1).astype(np.uint8)
        symbols = np.zeros(steps.size, np.uint8)
        symbols[real] = steps[real]
        return symbols


STEPS = tuple(Steps(longest - first, bool(first)) for longest in FILLED_GAPS for first in (0, 1))
"""Every way to write steps; the best is taken for a group."""

LEVELS = np.array([0, *itertools.chain.from_iterable((k, -k) for k in range(1, 128)), -128])
"""The codebook of "levels": a code's integer is LEVELS[code], near ones first."""

_LEVEL_CODES = np.argsort(LEVELS.astype(np.int8).view(np.uint8)).astype(np.uint8)


@dataclass(frozen=True)
class Group:
    """Weights written by one method, families together.

    Attributes:
        method: the method.
        weights: members, of one working type; all have a scale or none has.
        storage: the type raw values and planes are stored in.
    """

    method: Method
    weights: tuple[Weight, ...]
    storage: int

    @property
    def working(self) -> int:
        """The type in which the graph rebuilds it."""
        return self.weights[0].working

    @property
    def size(self) -> int:
        """Elements of all weights."""
        return sum(weight.array.size for weight in self.weights)


def family_key(weight: Weight) -> tuple[Any, ...]:
    """What weights must have in common to be parted by one Split."""
    trailing = weight.shape[1:]
    if weight.scale is None or weight.scale.size == 1 or _by_rows(weight):
        return trailing
    return *trailing, weight.name


def _by_rows(weight: Weight) -> bool:
    """Whether the scale has one factor for each index of the first axis."""
    assert weight.scale is not None
    lead = weight.array.ndim - weight.scale.ndim
    return lead == 0 and weight.scale.size == weight.scale.shape[0] == weight.shape[0]


def write(group: Group, streams: Streams) -> dict[str, tuple[str, float]]:
    """Adds a group's nodes and streams.

    Returns:
        Weight name -> (name of its value, bytes of its own in the streams).
    """
    if group.method.positions == "all":
        entries = [weight.values for weight in group.weights]
        flat, bits = _values(group, streams, entries)
    elif group.method.positions == "gap":
        flat, bits = _gap(group, streams)
    else:
        flat, bits = _mask(group, streams)
    names = _parted(group, streams, flat, bits)
    return {
        weight.name: (name, part / 8)
        for weight, name, part in zip(group.weights, names, bits, strict=True)
    }


# --- positions ---


def gaps_of(
    group_indices: Sequence[NDArray[np.int64]], longest: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Steps from one entry to the next, with fillers where a step is longer than `longest`.

    Args:
        group_indices: for each weight the rising indices of its nonzeros in the group's vector.
        longest: the longest step.

    Returns:
        For each weight its steps, the very first one from index -1; and which of its steps lead to
        a nonzero: their positions, as many as it has nonzeros.

    >>> steps, real = gaps_of([np.array([1, 12])], 5)
    >>> steps[0].tolist(), real[0].tolist()
    ([2, 5, 5, 1], [0, 3])
    """
    steps, real = [], []
    at = -1
    for index in group_indices:
        skipped = np.diff(index, prepend=at) - 1
        count = skipped // longest + 1
        last = np.cumsum(count) - 1
        gaps = np.full(int(last[-1]) + 1 if last.size else 0, longest, np.int64)
        gaps[last] = skipped - longest * (count - 1) + 1
        steps.append(gaps)
        real.append(last)
        at = int(index[-1]) if index.size else at
    return steps, real


def _gap(group: Group, streams: Streams) -> tuple[str, list[float]]:
    body = streams.body
    offsets = np.cumsum([0, *(weight.array.size for weight in group.weights)])
    indices = [
        weight.nonzero + offset for weight, offset in zip(group.weights, offsets, strict=False)
    ]
    if not any(index.size for index in indices):
        indices[0] = np.zeros(1, np.int64)
    way, symbols, real = _best_steps(group, indices)
    entries = []
    for weight, part, places in zip(group.weights, symbols, real, strict=True):
        entry = np.zeros(part.size, weight.values.dtype)
        entry[places] = weight.values[weight.nonzero] if weight.nonzero.size else 0
        entries.append(entry)
    gaps, gap_bits = streams.joined(symbols, base=way.longest - 1 if way.fillers_first else 1)
    if way.fillers_first:  # 0 becomes the longest, the others stay
        turned = body.node("Mod", gaps, body.constant(way.longest))
        gaps = body.node("Add", turned, body.constant(1))
    values, bits = _values(group, streams, entries)
    bits = [a + b for a, b in zip(bits, gap_bits, strict=True)]
    dtype = numpy_type(group.working)
    zero: dict[str, Any] = {}
    if group.working != TensorProto.FLOAT:
        zero["value"] = tensor("", np.zeros(1, dtype), group.working)
    index = body.node("Sub", body.node("CumSum", gaps, body.constant(0)), body.constant(1))
    if _is_single(group) and len(group.weights[0].shape) > 1:
        # Straight into the weight's own shape: a Reshape of the result would be another copy.
        shape = group.weights[0].shape
        wide = body.node("Reshape", index, body.indices(-1, 1))
        step = body.constant([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
        place = body.node("Mod", body.node("Div", wide, step), body.constant(list(shape)))
        place = body.node("Cast", place, to=TensorProto.INT64)
        zeros = body.node("ConstantOfShape", body.indices(*shape), **zero)
        return body.node("ScatterND", zeros, place, values), bits
    zeros = body.node("ConstantOfShape", body.indices(group.size), **zero)
    return body.node("ScatterElements", zeros, index, values), bits


def _best_steps(
    group: Group, indices: list[NDArray[np.int64]]
) -> tuple[Steps, list[NDArray[np.uint8]], list[NDArray[np.int64]]]:
    """The way to write a group's steps that takes the fewest bits; symbols, places of nonzeros."""
    levels = [np.bincount(found[0]) for w in group.weights if (found := w.shared_nonzero)]
    coded = group.method.values in ("codebook", "levels") and len(levels) == len(group.weights)

    def bits(symbols: list[NDArray[np.uint8]], real: list[NDArray[np.int64]]) -> float:
        total = float(coded_bits(np.bincount(np.concatenate(symbols))))
        for index, (part, places) in enumerate(zip(symbols, real, strict=True)):
            fillers = part.size - places.size
            if fillers and coded:  # one more level
                total += about_bits(np.append(levels[index], fillers)) - about_bits(levels[index])
            else:
                total += 8 * numpy_type(group.working).itemsize * fillers
        return total

    best: tuple[float, Steps, list[NDArray[np.uint8]], list[NDArray[np.int64]]] | None = None
    for way in STEPS:
        steps, real = gaps_of(indices, way.longest)
        symbols = [way.symbols(s, r) for s, r in zip(steps, real, strict=True)]
        cost = bits(symbols, real)
        if best is None or cost < best[0]:
            best = cost, way, symbols, real
        if way.longest >= FILLED_GAPS[0] and sum(s.size for s in steps) == sum(
            r.size for r in real
        ):
            break  # nothing to fill
    assert best is not None
    return best[1:]


def masks_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    """A bit for each element, set where it is not +0; eight to a byte, the first one highest."""
    return np.packbits(bits_of(values) != 0)


def _mask(group: Group, streams: Streams) -> tuple[str, list[float]]:
    body = streams.body
    every = np.concatenate([weight.values for weight in group.weights])
    codes, patterns = ranked(masks_of(every))
    name, mask_bits = streams.joined([codes])
    values, bits = _values(
        group, streams, [weight.values[weight.nonzero] for weight in group.weights]
    )
    pattern = streams.raw(patterns, TensorProto.UINT8)
    byte = body.node("Cast", body.node("Gather", pattern, name), to=TensorProto.INT32)
    byte = body.node("Reshape", byte, body.indices(-1, 1))
    bit = body.node("Div", byte, body.constant([128 >> place for place in range(8)]))
    bit = body.node("Mod", bit, body.constant(2))
    bit = body.node("Reshape", bit, body.indices(-1))
    if group.size % 8:
        bit = body.node("Slice", bit, body.indices(0), body.indices(group.size))
    # Zero stands before the values. (Where would do, were it not that onnxruntime's loses -0.0.)
    zero = tensor("", np.zeros(1, numpy_type(group.working)), group.working)
    values = body.node("Concat", body.node("Constant", value=zero), values, axis=0)
    which = body.node("Mul", body.node("CumSum", bit, body.constant(0)), bit)
    share = [mask_bits[0] * weight.array.size / every.size for weight in group.weights]
    found = body.node("GatherElements", values, which)
    return found, [a + b for a, b in zip(bits, share, strict=True)]


# --- values ---


def _values(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> tuple[str, list[float]]:
    """A value that holds the entries of all weights in a row, and the bits each weight takes."""
    if not any(part.size for part in entries):  # a mask without a nonzero
        entries = [np.zeros(1, entries[0].dtype), *entries[1:]]
    write_values = {
        "raw": _raw,
        "planes": _planes,
        "codebook": _codebook,
        "levels": _levels,
    }[group.method.values]
    flat, bits = write_values(group, streams, entries)
    return flat, bits


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
        table = streams.table(every)
    else:
        kind = group.working
        table = streams.raw(every, kind)
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
    table = streams.raw(book.astype(np.int8), TensorProto.INT8)
    if group.working != TensorProto.INT8:
        table = streams.body.node("Cast", table, to=group.working)
    return _looked_up(group, streams, table, name), bits


def _has_zero(entries: list[NDArray[Any]]) -> bool:
    return any((part == 0).any() for part in entries)


def _looked_up(group: Group, streams: Streams, table: str, index: str) -> str:
    """Looks the values up, in the weight's own shape where that saves a copy."""
    body = streams.body
    if group.method.positions == "all" and _is_single(group):
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
    table = streams.table(tables_of(present, group.storage))
    both = body.node("Gather", table, code, axis=1)
    first, unit = body.nodes("Split", both, body.indices(1, 1), outputs=2, axis=0)
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


# --- weights ---


def _is_single(group: Group) -> bool:
    return len(group.weights) == 1


def _is_shaped(group: Group) -> bool:
    """Whether the group's vector already has its only weight's shape."""
    if not _is_single(group):
        return False
    if group.method.positions == "gap":
        return True
    return group.method.positions == "all" and group.method.values in ("codebook", "levels")


def _parted(group: Group, streams: Streams, flat: str, bits: list[float]) -> list[str]:
    """The weights of a group from its vector; adds the bits of scales to `bits`."""
    body = streams.body
    families = [list(members) for _, members in itertools.groupby(group.weights, key=family_key)]
    pieces = [flat]
    if len(families) > 1:
        sizes = [sum(weight.array.size for weight in family) for family in families]
        pieces = body.nodes("Split", flat, body.indices(*sizes), outputs=len(sizes), axis=0)
    names: list[str] = []
    for piece, family in zip(pieces, families, strict=True):
        shape = family[0].shape
        if len(shape) > 1 and not _is_shaped(group):
            rows = sum(weight.shape[0] for weight in family)
            piece = body.node("Reshape", piece, body.indices(rows, *shape[1:]))
        if family[0].scale is not None:
            piece = body.node("Mul", piece, _scale(family, streams, bits, len(names)))
        if len(family) > 1:
            sizes = [weight.shape[0] for weight in family]
            parts = body.nodes("Split", piece, body.indices(*sizes), outputs=len(sizes), axis=0)
        elif family[0].scale is not None or _is_shaped(group) or family[0].kind != group.working:
            parts = [piece]
        else:
            # Ends on an operator that copies: onnxruntime 1.24 keeps a dangling buffer where the
            # last folded operator is an alias such as Reshape (issue 29788).
            parts = [body.node("Concat", piece, axis=0)]
        for weight, part in zip(family, parts, strict=True):
            if weight.kind != group.working:
                part = body.node("Cast", part, to=weight.kind)
            names.append(part)
    return names


def _scale(family: list[Weight], streams: Streams, bits: list[float], at: int) -> str:
    """The factors of a family, one for each row, or in the only member's own shape."""
    scales = []
    for weight in family:
        assert weight.scale is not None
        if len(family) == 1 and not _by_rows(weight):
            scales.append(np.atleast_1d(weight.scale))
        else:
            shape = (weight.shape[0], *[1] * (len(weight.shape) - 1))
            scales.append(np.broadcast_to(weight.scale, shape))
    every = np.concatenate(scales)
    for index, scale in enumerate(scales):
        bits[at + index] += 8.0 * scale.size * numpy_type(narrowest(every)).itemsize
    return streams.table(every)
