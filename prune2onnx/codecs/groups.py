"""Groups: weights that are written alike, joined to one vector, coded, and parted again.

Weights with the same method (`methods`) form a group; the members of a group that have the same
shape but for the first axis form a family. In the decode function a group is one vector until its
end: each family is cut off, gets its shape, and Split along the first axis gives the weights. So a
network of sixty weights takes hardly more nodes than one of three.

This file writes the nodes and streams of positions, and parts the weights; `values` writes those of
values. Which weight takes which method is `plan`'s business.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.codecs import rice
from prune2onnx.codecs.function import tensor
from prune2onnx.codecs.huffman import about_bits, coded_bits
from prune2onnx.codecs.methods import Group
from prune2onnx.codecs.streams import Streams
from prune2onnx.codecs.values import behind, level_codes, level_table, write_values
from prune2onnx.codecs.weight import Weight, bits_of, narrowest, numpy_type, ranked

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

_SYMBOLS_NBYTES = 170
"""What the nodes for a sequence of symbols with a Rice code take, about."""


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
        flat, bits = write_values(group, streams, entries)
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
    if streams.coder == "rice":
        index, values, bits = _scanned(group, streams, indices)
    else:
        index, gap_bits, entries = _stepped(group, streams, indices)
        values, bits = write_values(group, streams, entries)
        bits = [a + b for a, b in zip(bits, gap_bits, strict=True)]
    dtype = numpy_type(group.working)
    zero: dict[str, Any] = {}
    if group.working != TensorProto.FLOAT:
        zero["value"] = tensor("", np.zeros(1, dtype), group.working)
    if streams.coder != "rice" and group.is_single and len(group.weights[0].shape) > 1:
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


def _scanned(
    group: Group, streams: Streams, indices: list[NDArray[np.int64]]
) -> tuple[str, str, list[float]]:
    """Values that hold the indices and the values of entries, with Rice codes; bits of weights.

    Levels need no sequence of their own if the entries are sorted by level, then by index: with
    N elements in the group, the index of an entry becomes index + N * number of its level.
    """
    entries = [weight.values[weight.nonzero] for weight in group.weights]
    every, places = np.concatenate(entries), np.concatenate(indices)
    if group.method.values == "levels" and every.size:
        book, row = np.unique(every, return_inverse=True)
        both = np.sort(row * np.int64(group.size) + places)
        apart = rice.Run("", places, rising=True).bits
        codes = level_codes(every, True)
        assert codes is not None  # the planner asked
        apart += rice.code_of(np.bincount(codes))[1]
        together = rice.Run("", both, rising=True).bits
        if together / 8 < apart / 8 + _SYMBOLS_NBYTES:
            body = streams.body
            name, _ = streams.indices([both])
            size = body.constant(group.size, kind=TensorProto.INT64)
            table = level_table(group, streams, book)
            values = body.node("Gather", table, body.node("Div", name, size))
            bits = [together * part.size / every.size for part in entries]
            return body.node("Mod", name, size), values, bits
    index, gap_bits = streams.indices(indices)
    values, bits = write_values(group, streams, entries)
    return index, values, [a + b for a, b in zip(bits, gap_bits, strict=True)]


def _stepped(
    group: Group, streams: Streams, indices: list[NDArray[np.int64]]
) -> tuple[str, list[float], list[NDArray[Any]]]:
    """A value that holds the indices of entries; their bits, and the entries, of each weight."""
    body = streams.body
    way, symbols, real = _best_steps(group, indices)
    entries = []
    for weight, part, places in zip(group.weights, symbols, real, strict=True):
        entry = np.zeros(part.size, weight.values.dtype)
        entry[places] = weight.values[weight.nonzero] if weight.nonzero.size else 0
        entries.append(entry)
    gaps, bits = streams.joined(symbols, base=way.longest - 1 if way.fillers_first else 1)
    if way.fillers_first:  # 0 becomes the longest, the others stay
        turned = body.node("Mod", gaps, body.constant(way.longest))
        gaps = body.node("Add", turned, body.constant(1))
    index = body.node("Sub", body.node("CumSum", gaps, body.constant(0)), body.constant(1))
    return index, bits, entries


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
    values, bits = write_values(
        group, streams, [weight.values[weight.nonzero] for weight in group.weights]
    )
    pattern = streams.raw(behind(streams, patterns), TensorProto.UINT8)
    byte = body.node("Cast", body.node("Gather", pattern, name), to=TensorProto.INT32)
    byte = body.node("Reshape", byte, body.indices(-1, 1))
    bit = body.node("Div", byte, body.constant([128 >> place for place in range(8)]))
    bit = body.node("Mod", bit, body.constant(2))
    bit = body.node("Reshape", bit, body.indices(-1))
    if group.size % 8:
        bit = body.node("Slice", bit, body.indices(0), body.indices(group.size))
    # Zero stands before the values. (Where would do, were it not that onnxruntime's loses -0.0.)
    zero = streams.raw(np.zeros(1, numpy_type(group.working)), group.working)
    values = body.node("Concat", zero, values, axis=0)
    which = body.node("Mul", body.node("CumSum", bit, body.constant(0)), bit)
    share = [mask_bits[0] * weight.array.size / every.size for weight in group.weights]
    found = body.node("GatherElements", values, which)
    return found, [a + b for a, b in zip(bits, share, strict=True)]


# --- weights ---


def _is_shaped(group: Group, streams: Streams) -> bool:
    """Whether the group's vector already has its only weight's shape."""
    if not group.is_single:
        return False
    if group.method.positions == "gap":
        return streams.coder != "rice"
    return group.method.positions == "all" and group.method.values in ("codebook", "levels")


def _parted(group: Group, streams: Streams, flat: str, bits: list[float]) -> list[str]:
    """The weights of a group from its vector; adds the bits of scales to `bits`."""
    body = streams.body
    families = [
        list(members)
        for _, members in itertools.groupby(
            # Vectors need no shape, so one Split is enough for them.
            group.weights,
            key=lambda weight: family_key(weight) if len(weight.shape) > 1 else weight.name,
        )
    ]
    pieces = body.split(flat, *(sum(w.array.size for w in family) for family in families))
    factors = _factors(group, streams, bits)
    names: list[str] = []
    for piece, family in zip(pieces, families, strict=True):
        shape = family[0].shape
        copied = (len(families) > 1 and len(shape) == 1) or _is_shaped(group, streams)
        if len(shape) > 1 and not copied:
            rows = sum(weight.shape[0] for weight in family)
            piece = body.node("Reshape", piece, body.indices(rows, *shape[1:]))
        if family[0].scale is not None and not group.scale and family[0].name not in factors:
            piece = body.node("Mul", piece, _scale(family, streams, bits, len(names)))
            copied = True
        parts = body.split(piece, *(weight.shape[0] for weight in family))
        for weight, part in zip(family, parts, strict=True):
            if weight.name in factors:
                part = body.node("Mul", part, factors[weight.name])
            elif weight.kind != group.working:
                part = body.node("Cast", part, to=weight.kind)
            elif not copied and len(family) == 1:
                # Ends on an operator that copies: onnxruntime 1.24 keeps a dangling buffer where
                # the last folded operator is an alias such as Reshape (issue 29788).
                part = body.copy(part, group.working)
            names.append(part)
    return names


def _factors(group: Group, streams: Streams, bits: list[float]) -> dict[str, str]:
    """Names of the scales of a single factor, in families where all are."""
    families = itertools.groupby(enumerate(group.weights), key=lambda pair: family_key(pair[1]))
    single: dict[int, NDArray[np.float32]] = {}
    for _, family in families:
        scales = {index: weight.scale for index, weight in family if weight.scale is not None}
        if not group.scale and all(scale.size == 1 for scale in scales.values()):
            single |= {index: scale.reshape(1) for index, scale in scales.items()}
    if not single:
        return {}
    every = np.concatenate(list(single.values()))
    for index in single:
        bits[index] += 8.0 * numpy_type(narrowest(every)).itemsize
    names = streams.body.split(streams.table(every), *[1] * every.size)
    return {group.weights[i].name: name for i, name in zip(single, names, strict=True)}


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
