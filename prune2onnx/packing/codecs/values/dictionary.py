"""Values of which many occur again: bases of transforms, anchors, masks, repeated rows.

The distinct values stand in a table, in the order in which they first occur; an element is its
place there. Where a row or a column repeats another one, in either direction, places go up or down
by one. So what is coded is either the step from each place to the next; or, for few long runs, only
where and by how much the step changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from prune2onnx.packing.codecs.book import by_count
from prune2onnx.packing.codecs.function import zeros_of
from prune2onnx.packing.codecs.streams import Streams, coded_nbytes
from prune2onnx.packing.codecs.values.kind import Entries, Group, ValueKind, Written
from prune2onnx.packing.codecs.values.planes import PLANES
from prune2onnx.packing.codecs.weight import Weight, bits_of, gaps_of, narrowest

_LEAST_SIZE = 1024
_SAMPLE = 1 << 16
_MOST_DISTINCT = 0.9  # of a sample, for the whole to be looked at
_NODES_NBYTES = 700  # about, of the nodes and constants that it adds

_LONGEST = 256  # gap between changes; longer ones are bridged by changes of 0
_SYMBOLS = 255  # numbers that have a symbol


@dataclass(frozen=True)
class _Numbers:
    """Integers as symbols, the most frequent one 0; one says that the next of a list follows.

    Attributes:
        symbols: uint8 [n].
        table: what symbols stand for, [at most 256]; 0 for the `escape`.
        others: the list; both in the narrowest type of integers.
        escape: the symbol of `others`.
    """

    symbols: NDArray[np.uint8]
    table: NDArray[Any]
    others: NDArray[Any]
    escape: int

    @classmethod
    def of(cls, numbers: NDArray[np.int64]) -> _Numbers:
        """That of any numbers of 32 bits."""
        found, which, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        order = by_count(counts)
        rank = np.argsort(order)[which]
        others = numbers[rank >= _SYMBOLS]
        own = order[:_SYMBOLS]
        escape = int(np.searchsorted(-counts[own], -others.size, side="right"))
        symbols = np.where(rank < _SYMBOLS, rank + (rank >= escape), escape)
        table = np.insert(found[own], escape, 0)
        return cls(symbols.astype(np.uint8), _narrow(table), _narrow(others), escape)

    @property
    def nbytes(self) -> float:
        """About how many bytes they take."""
        symbols = coded_nbytes(np.bincount(self.symbols), "huffman")
        listed = self.others.nbytes + (self.table.size if self.others.size else 0)
        return symbols + self.table.nbytes + listed

    def write(self, streams: Streams) -> tuple[str, float]:
        """A value with the numbers, int32 [n]; and the bits that they take."""
        body = streams.body
        name, bits = streams.joined([self.symbols])
        value = body.node("Gather", _integers(streams, self.table), name)
        if self.others.size:
            others = _integers(streams, np.insert(self.others, 0, 0))
            flags = (np.arange(self.table.size) == self.escape).astype(np.int8)
            escaped = body.node("Gather", _integers(streams, flags), name)
            which = body.node("Mul", body.node("CumSum", escaped, body.constant(0)), escaped)
            value = body.node("Add", value, body.node("GatherElements", others, which))
        return value, bits[0] + 8 * self.others.nbytes


def _narrow(numbers: NDArray[np.int64]) -> NDArray[Any]:
    """The same numbers in the narrowest type."""
    most = int(np.abs(numbers).max(initial=0))
    return numbers.astype(np.int8 if most < 1 << 7 else np.int16 if most < 1 << 15 else np.int32)


def _integers(streams: Streams, numbers: NDArray[Any]) -> str:
    """A value with these numbers, int32."""
    name = streams.raw(numbers, helper.np_dtype_to_tensor_dtype(numbers.dtype))
    return streams.body.node("Cast", name, to=TensorProto.INT32)


@dataclass(frozen=True)
class _Dictionary:
    """A weight as places in a table.

    Attributes:
        values: the table, [k], in the order of first occurrences.
        places: of the elements, int64 [n].
        columns: whether elements are taken column after column.
    """

    values: NDArray[Any]
    places: NDArray[np.int64]
    columns: bool

    @cached_property
    def steps(self) -> _Numbers:
        """From one place to the next, the first one from -1."""
        return _Numbers.of(np.diff(self.places, prepend=-1))

    @cached_property
    def changes(self) -> tuple[_Numbers, _Numbers]:
        """Where steps change: gaps from one change to the next, and by how much."""
        change = np.diff(np.diff(self.places, prepend=-1), prepend=0)
        where = np.flatnonzero(change)
        (gaps,), (ends,) = gaps_of([where], _LONGEST)
        amounts = np.zeros(gaps.size, np.int64)
        amounts[ends] = change[where]
        return _Numbers.of(gaps), _Numbers.of(amounts)

    @property
    def is_in_runs(self) -> bool:
        """Whether the changes take fewer bytes than the steps."""
        return sum(part.nbytes for part in self.changes) < self.steps.nbytes

    @property
    def nbytes(self) -> float:
        """About how many bytes it takes."""
        places = min(self.steps.nbytes, sum(part.nbytes for part in self.changes))
        each = float(self.values.itemsize)
        if self.values.dtype == np.float32:
            each = 3.4 if narrowest(self.values) == TensorProto.FLOAT else 1.6
        return places + each * self.values.size + _NODES_NBYTES


def _dictionary(weight: Weight) -> _Dictionary | None:
    """The better of both orders; None where few values occur again."""
    flat = weight.values
    sample = bits_of(flat[:_SAMPLE])
    if np.unique(sample).size > _MOST_DISTINCT * sample.size:
        return None
    bits, place = np.unique(bits_of(flat), return_inverse=True)
    values = bits.view(flat.dtype)
    if bits.size > _MOST_DISTINCT * flat.size:
        return None
    found = []
    for columns in (False, True) if len(weight.shape) > 1 else (False,):
        own = place.reshape(weight.shape[0], -1).T.reshape(-1) if columns else place
        _, first = np.unique(own, return_index=True)
        order = np.argsort(first)
        found.append(_Dictionary(values[order], np.argsort(order)[own], columns))
    return min(found, key=lambda one: one.nbytes)


def regular_nbytes(weight: Weight) -> float | None:
    """About how many bytes a weight takes, if most of it is in runs; else None."""
    found = _dictionary(weight)
    return found.nbytes if found is not None and found.is_in_runs else None


def _estimate(entries: Entries) -> float | None:
    weight = entries.weight
    if entries.coder != "huffman" or not entries.every or weight.scale is not None:
        return None
    if not _LEAST_SIZE <= weight.array.size < 1 << 31:
        return None
    found = _dictionary(weight)
    if found is None or (weight.indexed is not None and not found.is_in_runs):
        return None
    return found.nbytes


def _write(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> Written:
    body = streams.body
    (weight,) = group.weights
    found = _dictionary(weight)
    assert found is not None  # `_estimate` made sure
    if found.is_in_runs:
        gaps, amounts = found.changes
        gap, bits = gaps.write(streams)
        where = body.node("Sub", body.node("CumSum", gap, body.constant(0)), body.constant(1))
        amount, more = amounts.write(streams)
        still = zeros_of(body, (weight.array.size,), TensorProto.INT32)
        change = body.node("ScatterElements", still, where, amount)
        step, bits = body.node("CumSum", change, body.constant(0)), bits + more
    else:
        step, bits = found.steps.write(streams)
    place = body.node("CumSum", step, body.constant(0))
    place = body.node("Sub", place, body.constant(1))
    values, more = _table(group, streams, found.values)
    result = body.node("GatherElements", values, place)
    if found.columns:
        rows = weight.shape[0]
        result = body.node("Reshape", result, body.indices(-1, rows))
        result = body.node("Reshape", body.node("Transpose", result), body.indices(-1))
    return result, [bits + more]


def _table(group: Group, streams: Streams, values: NDArray[Any]) -> tuple[str, float]:
    """A value with the table; large ones of floats are in planes."""
    if group.working == TensorProto.FLOAT and np.isfinite(values).all() and values.size > 256:
        table = Weight("", values, TensorProto.FLOAT)
        inside = Group("all", PLANES, (table,), narrowest(values))
        name, bits = PLANES.write(inside, streams, [values])
        return name, bits[0]
    return streams.raw(values, group.working), 8.0 * values.nbytes


DICTIONARY = ValueKind("dictionary", _estimate, _write, is_alone=True)
