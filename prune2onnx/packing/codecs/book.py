"""Codebooks: the distinct values of an array, how often each occurs, and the code of each element.

Values differ if their bits do. They are found by a table: 16 bits of a product tell them apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger[Any]]

MAX_VALUES = 256
"""Most distinct values of a codebook: a code is one byte."""

_FIRST = 4096  # an array without a codebook shows it in its first few thousand values
_CHUNK = 1 << 18  # elements that stay in a core's cache with what is made of them


class Book:
    """Distinct values.

    Args:
        bits: their bit patterns, unsigned, ascending; at most 256.
    """

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        width = 8 * bits.dtype.itemsize
        self._shift = np.array(max(0, width - 16), bits.dtype)
        self._factor = np.array(1, bits.dtype)
        draw = np.random.default_rng(0)
        while np.unique(slots := self._slots(bits)).size < bits.size:
            self._factor = np.array(int(draw.integers(1 << 62)) % (1 << width) | 1, bits.dtype)
        self._table = np.zeros(1 << 16, np.uint8)
        self._table[slots] = np.arange(bits.size)

    def _slots(self, bits: Bits) -> Bits:
        """Places in the table: the upper bits of a product; narrow values themselves."""
        return (bits * self._factor) >> self._shift

    def codes(self, bits: Bits) -> NDArray[np.uint8]:
        """The place of each value among `bits`; any place for one that is not among them."""
        codes = np.empty(bits.size, np.uint8)
        for begin in range(0, bits.size, _CHUNK):
            part = bits[begin : begin + _CHUNK]
            codes[begin : begin + part.size] = self._table[self._slots(part)]
        return codes


class Counter:
    """Counts distinct values, array after array.

    Attributes:
        bits: the values so far, ascending.
        counts: how often each occurs, int64.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.bits: Bits = np.zeros(0, dtype)
        self.counts = np.zeros(0, np.int64)
        self._book: Book | None = None

    def add(self, bits: Bits) -> bool:
        """Counts more values.

        Returns:
            Whether there are at most 256 distinct ones so far; else the counts mean nothing.
        """
        for begin, end in _spans(bits.size):
            part = bits[begin:end]
            while True:
                unknown = part if self._book is None else self._unknown(part)
                if not unknown.size:
                    break
                if not self._learn(np.unique(unknown[:_FIRST])):
                    return False
            assert self._book is not None
            self.counts += np.bincount(self._book.codes(part), minlength=self.counts.size)
        return True

    def _unknown(self, bits: Bits) -> Bits:
        assert self._book is not None
        known: NDArray[np.bool_] = self.bits[self._book.codes(bits)] == bits
        return np.asarray(bits[~known])

    def _learn(self, new: Bits) -> bool:
        bits: Bits = np.union1d(self.bits, new)
        if bits.size > MAX_VALUES:
            return False
        counts = np.zeros(bits.size, np.int64)
        counts[np.searchsorted(bits, self.bits)] = self.counts
        self.bits, self.counts, self._book = bits, counts, Book(bits)
        return True


def _spans(size: int) -> list[tuple[int, int]]:
    begins = [0, *range(_FIRST, size, _CHUNK)]
    return [(a, b) for a, b in zip(begins, [*begins[1:], size], strict=True) if a < b]


def by_count(counts: NDArray[Any]) -> NDArray[np.int64]:
    """The places of counts, the largest first; of equal ones the first."""
    return np.argsort(-counts, kind="stable")
