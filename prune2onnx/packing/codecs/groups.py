"""Groups: weights that are written alike, joined to one vector, coded, and split again.

Weights with the same method (`methods`) form a group; the members of a group whose shapes differ at
most in the first axis form a family. In the decode function a group is one vector until its end:
Split gives the families, Reshape their shape, and another Split along the first axis the weights.
So a network of sixty weights takes hardly more nodes than one of three.

This module writes the nodes and streams of positions, and splits the weights. `values` writes those
of values, and `plan` chooses the methods.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs import rice
from prune2onnx.packing.codecs.function import zeros_of
from prune2onnx.packing.codecs.huffman import about_bits, coded_bits
from prune2onnx.packing.codecs.streams import Streams
from prune2onnx.packing.codecs.values.kind import Group, RisingEntries, Vector, Written
from prune2onnx.packing.codecs.values.lookup import padded
from prune2onnx.packing.codecs.weight import Weight, bits_of, gaps_of, narrowest, numpy_type, ranked

FILLED_GAPS = (256, 128, 64, 32)
"""Longest gaps that may be chosen; longer ones are bridged by fillers, entries of value +0."""


@dataclass(frozen=True)
class GapSymbols:
    """How gaps become symbols.

    Symbols are numbered by falling frequency (`huffman`), so the gap of fillers is the last symbol
    where they are rare, and the first where they are common.

    Attributes:
        longest: the longest gap, which is also that of a filler.
        fillers_first: if False, symbol s is gap s + 1; if True, symbol 0 is a filler's gap, and any
            other symbol s is gap s.
    """

    longest: int
    fillers_first: bool

    def symbols(self, gaps: NDArray[np.int64], real: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The symbols of gaps, uint8 [n]; `real` are the indices of those that are no fillers'."""
        if not self.fillers_first:
            return (gaps - 1).astype(np.uint8)
        symbols = np.zeros(gaps.size, np.uint8)
        symbols[real] = gaps[real]
        return symbols


GAP_SYMBOLS = tuple(
    GapSymbols(longest - first, bool(first)) for longest in FILLED_GAPS for first in (0, 1)
)
"""Every choice of symbols for gaps; each group takes the best."""


def family_key(weight: Weight) -> tuple[Any, ...]:
    """What weights must have in common to come from one Split."""
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
        Weight name -> (name of its value, its bytes in the streams).
    """
    if group.positions == "all":
        entries = [weight.values for weight in group.weights]
        vector = Vector(*write_values(group, streams, entries))
    elif group.positions == "gap":
        vector = _gap(group, streams)
    else:
        vector = Vector(*_mask(group, streams))
    names, bits = _split(group, streams, vector)
    return {
        weight.name: (name, part / 8)
        for weight, name, part in zip(group.weights, names, bits, strict=True)
    }


def write_values(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> Written:
    """A value with the entries of all weights in a row, and the bits that each weight takes."""
    if not any(part.size for part in entries):  # a mask without a nonzero
        entries = [np.zeros(1, entries[0].dtype), *entries[1:]]
    return group.values.write(group, streams, entries)


# --- positions ---


def _gap(group: Group, streams: Streams) -> Vector:
    body = streams.body
    offsets = np.cumsum([0, *(weight.array.size for weight in group.weights)])
    indices = [
        weight.nonzero + offset for weight, offset in zip(group.weights, offsets, strict=False)
    ]
    if not any(index.size for index in indices):
        indices[0] = np.zeros(1, np.int64)
    if streams.coder == "rice":
        return _rising(group, streams, indices)
    index, gap_bits, entries = _symbol_gaps(group, streams, indices)
    values, bits = write_values(group, streams, entries)
    bits = [a + b for a, b in zip(bits, gap_bits, strict=True)]
    if group.is_single and len(group.weights[0].shape) > 1:
        # Directly into the weight's shape: a Reshape of the result would be another copy.
        shape = group.weights[0].shape
        wide = body.node("Reshape", index, body.indices(-1, 1))
        step = body.constant([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
        place = body.node("Mod", body.node("Div", wide, step), body.constant(list(shape)))
        place = body.node("Cast", place, to=TensorProto.INT64)
        zeros = zeros_of(body, shape, group.working)
        return Vector(body.node("ScatterND", zeros, place, values), bits)
    zeros = zeros_of(body, (group.size,), group.working)
    return Vector(body.node("ScatterElements", zeros, index, values), bits)


def _rising(group: Group, streams: Streams, indices: list[NDArray[np.int64]]) -> Vector:
    """Entries with Rice codes: an integer is an index plus 1, so it may be the first one."""
    entries = [weight.values[weight.nonzero] for weight in group.weights]
    places = np.concatenate(indices)
    if together := group.values.write_rising(group, streams, RisingEntries(places, entries)):
        return together
    index = streams.rising_integers(places + 1)
    values, bits = write_values(group, streams, entries)
    each = rice.rising_bits(places) / places.size
    zeros = zeros_of(streams.body, (group.size + 1,), group.working)
    scattered = streams.body.node("ScatterElements", zeros, index, values)
    return Vector(
        scattered, [b + each * own.size for b, own in zip(bits, indices, strict=True)], leading=1
    )


def _symbol_gaps(
    group: Group, streams: Streams, indices: list[NDArray[np.int64]]
) -> tuple[str, list[float], list[NDArray[Any]]]:
    """A value with the indices of entries; for each weight their bits, and its entries."""
    body = streams.body
    chosen, symbols, real = _best_gap_symbols(group, indices)
    entries = []
    for weight, part, places in zip(group.weights, symbols, real, strict=True):
        entry = np.zeros(part.size, weight.values.dtype)
        entry[places] = weight.values[weight.nonzero] if weight.nonzero.size else 0
        entries.append(entry)
    gaps, bits = streams.joined(symbols, base=chosen.longest - 1 if chosen.fillers_first else 1)
    if chosen.fillers_first:  # symbol 0 becomes the longest gap, the others stay
        turned = body.node("Mod", gaps, body.constant(chosen.longest))
        gaps = body.node("Add", turned, body.constant(1))
    index = body.node("Sub", body.node("CumSum", gaps, body.constant(0)), body.constant(1))
    return index, bits, entries


def _best_gap_symbols(
    group: Group, indices: list[NDArray[np.int64]]
) -> tuple[GapSymbols, list[NDArray[np.uint8]], list[NDArray[np.int64]]]:
    """The choice with the fewest bits; for each weight its symbols, and indices as of `gaps_of`."""
    levels = [np.bincount(found[0]) for w in group.weights if (found := w.indexed_nonzero)]
    coded = group.values.is_looked_up and len(levels) == len(group.weights)

    def bits(symbols: list[NDArray[np.uint8]], real: list[NDArray[np.int64]]) -> float:
        total = float(coded_bits(np.bincount(np.concatenate(symbols))))
        for index, (part, places) in enumerate(zip(symbols, real, strict=True)):
            fillers = part.size - places.size
            if fillers and coded:  # one more level
                total += about_bits(np.append(levels[index], fillers)) - about_bits(levels[index])
            else:
                total += 8 * numpy_type(group.working).itemsize * fillers
        return total

    best: tuple[float, GapSymbols, list[NDArray[np.uint8]], list[NDArray[np.int64]]] | None = None
    for choice in GAP_SYMBOLS:
        gaps, real = gaps_of(indices, choice.longest)
        symbols = [choice.symbols(g, r) for g, r in zip(gaps, real, strict=True)]
        cost = bits(symbols, real)
        if best is None or cost < best[0]:
            best = cost, choice, symbols, real
        if choice.longest >= FILLED_GAPS[0] and sum(g.size for g in gaps) == sum(
            r.size for r in real
        ):
            break  # nothing to fill
    assert best is not None
    return best[1:]


def masks_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    """A bit for each element, set where it is not +0; eight per byte, the first in the highest."""
    return np.packbits(bits_of(values) != 0)


def _mask(group: Group, streams: Streams) -> tuple[str, list[float]]:
    body = streams.body
    every = np.concatenate([weight.values for weight in group.weights])
    codes, patterns = ranked(masks_of(every))
    name, mask_bits = streams.joined([codes])
    values, bits = write_values(
        group, streams, [weight.values[weight.nonzero] for weight in group.weights]
    )
    pattern = streams.raw(padded(streams, patterns), TensorProto.UINT8)
    byte = body.node("Cast", body.node("Gather", pattern, name), to=TensorProto.INT32)
    byte = body.node("Reshape", byte, body.indices(-1, 1))
    bit = body.node("Div", byte, body.constant([128 >> place for place in range(8)]))
    bit = body.node("Mod", bit, body.constant(2))
    bit = body.node("Reshape", bit, body.indices(-1))
    if group.size % 8:
        bit = body.node("Slice", bit, body.indices(0), body.indices(group.size))
    # Zero stands before the values. (Not by Where: onnxruntime's loses -0.0.)
    zero = streams.raw(np.zeros(1, numpy_type(group.working)), group.working)
    values = body.node("Concat", zero, values, axis=0)
    which = body.node("Mul", body.node("CumSum", bit, body.constant(0)), bit)
    own = [mask_bits[0] * weight.array.size / every.size for weight in group.weights]
    found = body.node("GatherElements", values, which)
    return found, [a + b for a, b in zip(bits, own, strict=True)]


# --- weights ---


def _is_shaped(group: Group, streams: Streams) -> bool:
    """Whether the group's vector already has its only weight's shape."""
    if not group.is_single:
        return False
    if group.positions == "gap":
        return streams.coder != "rice"
    return group.positions == "all" and group.values.is_looked_up


def _split(group: Group, streams: Streams, vector: Vector) -> tuple[list[str], list[float]]:
    """Splits the vector of a group into its weights; their bits are those of scales, too."""
    body, bits = streams.body, vector.bits
    is_scaled = vector.scaled or group.scale is not None
    families = [
        list(members)
        for _, members in itertools.groupby(
            # Vectors need no shape, so one Split is enough for them.
            group.weights,
            key=lambda weight: family_key(weight) if len(weight.shape) > 1 else weight.name,
        )
    ]
    sizes = [sum(w.array.size for w in family) for family in families]
    _, *pieces = body.split(vector.name, vector.leading, *sizes)
    factors = {} if is_scaled else _factors(group, streams, bits)
    names: list[str] = []
    for piece, family in zip(pieces, families, strict=True):
        shape = family[0].shape
        copied = len(shape) == 1 and (len(families) > 1 or vector.leading > 0)
        copied = copied or _is_shaped(group, streams)
        if len(shape) > 1 and not copied:
            rows = sum(weight.shape[0] for weight in family)
            piece = body.node("Reshape", piece, body.indices(rows, *shape[1:]))
        if family[0].scale is not None and not is_scaled and family[0].name not in factors:
            piece = body.node("Mul", piece, _scale(family, streams, bits, len(names)))
            copied = True
        parts = body.split(piece, *(weight.shape[0] for weight in family))
        for weight, part in zip(family, parts, strict=True):
            if weight.name in factors:
                part = body.node("Mul", part, factors[weight.name])
            elif weight.element_type != group.working:
                part = body.node("Cast", part, to=weight.element_type)
            elif not copied and len(family) == 1:
                # The last operator must copy: onnxruntime 1.24 keeps a dangling buffer where the
                # last folded operator is an alias such as Reshape (issue 29788).
                part = body.copy(part, group.working)
            names.append(part)
    return names, bits


def _factors(group: Group, streams: Streams, bits: list[float]) -> dict[str, str]:
    """Weight name -> value of its scale, in families in which every scale is a single factor."""
    families = itertools.groupby(enumerate(group.weights), key=lambda pair: family_key(pair[1]))
    single: dict[int, NDArray[np.float32]] = {}
    for _, family in families:
        scales = {index: weight.scale for index, weight in family if weight.scale is not None}
        if all(scale.size == 1 for scale in scales.values()):
            single |= {index: scale.reshape(1) for index, scale in scales.items()}
    if not single:
        return {}
    every = np.concatenate(list(single.values()))
    for index in single:
        bits[index] += 8.0 * numpy_type(narrowest(every)).itemsize
    names = streams.body.split(streams.table(every), *[1] * every.size)
    return {group.weights[i].name: name for i, name in zip(single, names, strict=True)}


def _scale(family: list[Weight], streams: Streams, bits: list[float], at: int) -> str:
    """A value with a family's scales: a factor for each row, or in the only member's own shape."""
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
