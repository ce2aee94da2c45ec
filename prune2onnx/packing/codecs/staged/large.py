"""Large weights, read a few rows at a time, and what is known of each after one reading."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs.book import Counter, by_count
from prune2onnx.packing.codecs.staged.floats import special
from prune2onnx.packing.codecs.weight import WORKING, bits_of, numpy_type

Rows = Callable[[int, int], NDArray[Any]]
"""Rows of a weight from one to before another."""

_BLOCK = 1 << 22  # elements that are looked at at once

LONGEST_GAP = 1 << 16
"""Longer gaps are counted as if they had this length."""


@dataclass(frozen=True, eq=False)
class Large:
    """A weight that is not held in memory.

    Attributes:
        name: the initializer's.
        shape: of one axis at least.
        element_type: ONNX's number.
        rows: its values.
        scale: float32, broadcastable to the weight: what is coded are multiples of it.
        levels: those multiples; None without a scale.
    """

    name: str
    shape: tuple[int, ...]
    element_type: int
    rows: Rows
    scale: NDArray[np.float32] | None = None
    levels: Rows | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements in memory."""
        return self.size * numpy_type(self.element_type).itemsize

    @property
    def working(self) -> int:
        """The type in which it is rebuilt."""
        return WORKING[self.element_type]

    def coded(self, begin: int, end: int) -> NDArray[Any]:
        """What is coded of some rows, flat, in the working type."""
        rows = self.rows if self.levels is None else self.levels
        flat = rows(begin, end).reshape(-1).astype(numpy_type(self.working), copy=False)
        return np.ascontiguousarray(flat)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Rows from one to before another, as many as are looked at at once."""
        step = max(1, _BLOCK // max(1, math.prod(self.shape[1:])))
        for begin in range(0, self.shape[0], step):
            yield begin, min(begin + step, self.shape[0])


@dataclass(frozen=True, eq=False)
class Counted:
    """Different values, by falling frequency, and how often each occurs."""

    values: NDArray[Any]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, values: NDArray[Any], counts: NDArray[np.int64]) -> Counted:
        """Those that occur, in order."""
        order = by_count(counts)[: np.count_nonzero(counts)]
        return cls(values[order], counts[order])


@dataclass(eq=False)
class Survey:
    """What is known of a large weight.

    Attributes:
        digest: CRC-32 of its data.
        nonzero: elements that are not zero; -0.0 is zero.
        entries: elements whose bits are not all zero.
        book: what is coded, if that is at most 256 different values.
        gaps: lengths of gaps between entries, less 1; None without a `book`.
        exponents: symbols of floats: exponents, or the upper bytes of half precision; None with a
            `book`, or where no float is.
        lower: whether any float has one of the lower 16 bits.
        patches: floats that `floats.Planes` does not give.
        finite: whether all floats are; also of those in a `book`.
    """

    digest: int = 0
    nonzero: int = 0
    entries: int = 0
    book: Counted | None = None
    gaps: Counted | None = None
    exponents: NDArray[np.int64] | None = None
    lower: bool = False
    patches: int = 0
    finite: bool = True

    @property
    def others(self) -> Counted | None:
        """The `book` without +0."""
        if self.book is None:
            return None
        wanted = bits_of(self.book.values) != 0
        return Counted(self.book.values[wanted], self.book.counts[wanted])


def survey(weight: Large) -> Survey:
    """Looks at a weight once, or twice where only its later rows show that it has no codebook."""
    return _with_book(weight) or _without_book(weight)


def _with_book(weight: Large) -> Survey | None:
    found = Survey()
    counter = Counter(np.dtype(f"u{numpy_type(weight.working).itemsize}"))
    lengths = _Lengths()
    for begin, end in weight.blocks():
        rows = weight.rows(begin, end)
        found.digest = zlib.crc32(_data(rows), found.digest)
        found.nonzero += int(np.count_nonzero(rows))
        bits = bits_of(weight.coded(begin, end))
        if not counter.add(bits):
            return None
        found.entries += int(np.count_nonzero(bits))
        lengths.add(bits)
    dtype = numpy_type(weight.working)
    found.book = Counted.of(counter.bits.view(dtype), counter.counts)
    found.finite = dtype.kind != "f" or bool(np.isfinite(found.book.values).all())
    found.gaps = lengths.counted()
    return found


@dataclass(eq=False)
class _Lengths:
    """Counts gaps between entries."""

    size: int = 0
    last: int = -1
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, bits: NDArray[np.unsignedinteger[Any]]) -> None:
        places = np.flatnonzero(bits) + self.size
        self.size += bits.size
        if not places.size:
            return
        gaps = np.minimum(np.diff(places, prepend=self.last) - 1, LONGEST_GAP - 1)
        self.last = int(places[-1])
        counts = np.bincount(gaps)
        for gap in np.flatnonzero(counts).tolist():
            self.counts[gap] = self.counts.get(gap, 0) + int(counts[gap])

    def counted(self) -> Counted:
        pairs = sorted(self.counts.items())
        values, counts = ([one[at] for one in pairs] for at in (0, 1))
        return Counted.of(np.array(values, np.int64), np.array(counts, np.int64))


def _without_book(weight: Large) -> Survey:
    found = Survey()
    dtype = numpy_type(weight.working)
    half = weight.working == TensorProto.FLOAT16
    planes = weight.working == TensorProto.FLOAT and weight.scale is None
    counts = np.zeros(256, np.int64)
    for begin, end in weight.blocks():
        rows = weight.rows(begin, end)
        found.digest = zlib.crc32(_data(rows), found.digest)
        found.nonzero += int(np.count_nonzero(rows))
        bits = bits_of(weight.coded(begin, end))
        found.entries += int(np.count_nonzero(bits))
        if half:
            counts += np.bincount(bits >> np.uint16(8), minlength=256)
            found.finite &= bool(np.isfinite(bits.view(dtype)).all())
        elif planes:
            exponents = (bits >> np.uint32(23)).astype(np.uint8)
            own = np.bincount(exponents, minlength=256)
            counts += own
            if own[0] or own[255]:
                found.patches += int(np.count_nonzero(special(bits)))
                found.finite &= not own[255]
            found.lower = found.lower or bool(bits.astype(np.uint16).any())
    found.exponents = counts if half or planes else None
    return found


def _data(rows: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
