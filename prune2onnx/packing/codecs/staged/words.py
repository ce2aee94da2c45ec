"""Words: an entropy code that a runtime decodes with few operators, each over whole arrays.

A symbol (0 is the most frequent) is written in several **levels**. In a level of `bits` bits with
`low` bits below, a word is a digit, its upper bits, followed by the symbol's own low bits. Digit 0
is an escape: the upper part of that symbol is written in the next level, which holds the escapes
alone, one after the other. Any other digit is the upper part plus 1. The last level has no escape.

A word is stored in **fields** of 4, 2, 1 or 8 bits, the lowest first, each in bytes of its own. Of
a field of 4 bits, the first half of the values is in the upper halves of the bytes, the second half
in the lower ones; 2 bits are halves of such halves, and of a field of 1 bit each eighth of the
values is a bit of the bytes, the first eighth the highest. So no value moves between others.

A reader finds the escapes of a level by their digit, and puts the values of the next level there.
With operators over arrays this costs a fraction of what a prefix code does, and 1 to 4 % in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.uint8]

FIELDS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
"""Bits of a word -> bits of its fields, the lowest first."""

SIMPLE = (1, 2, 4, 8)
"""Words of a single field."""

MOST_LEVELS = 4

_SPENT = 0.015  # bytes of a weight that may be spent on fewer levels, which take less time
_PRICES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of a level, in bits for each of its words


@dataclass(frozen=True)
class Level:
    """How the words of one level are made.

    Attributes:
        bits: of a word.
        low: how many of them are the symbol's own; `bits` in the last level, which has no escape.
    """

    bits: int
    low: int

    @property
    def is_last(self) -> bool:
        """Whether it has no escape."""
        return self.low == self.bits

    @property
    def origin(self) -> int:
        """What is added to every symbol in the words."""
        return 0 if self.is_last else 1 << self.low

    @property
    def digits(self) -> int:
        """Number of upper parts that have a digit; the rest escapes."""
        return (1 << self.bits - self.low) - 1


def single(count: int) -> Level:
    """The only level of so many symbols, where no field is to be joined and no escape resolved."""
    bits = 4 if count <= 16 else 8
    return Level(bits, bits)


def plan(counts: NDArray[Any], *, beside: float = 0.0, simple: bool = False) -> tuple[Level, ...]:
    """The levels that a runtime decodes fastest, among those that take few bits.

    Args:
        counts: how often each symbol occurs, falling; at most 256.
        beside: bits of each element that are stored beside the words.
        simple: whether words may have one field and no low bits, where a runtime cannot join them.
    """
    occur = np.asarray(counts, np.float64)
    total = float(occur.sum())
    chosen: tuple[Level, ...] = ()
    least = 0.0
    for price in _PRICES:
        _, levels = _best(occur, MOST_LEVELS, simple, price)
        nbits = _bits(occur, levels)
        least = least or nbits
        if nbits + beside * total > (1 + _SPENT) * (least + beside * total):
            break
        chosen = levels
    return chosen


def bits_of(counts: NDArray[Any], *, simple: bool = False) -> float:
    """About how many bits the symbols take; arguments as of `plan`."""
    return _best(np.asarray(counts, np.float64), MOST_LEVELS, simple, 0.0)[0]


def _bits(counts: NDArray[np.float64], levels: Sequence[Level]) -> float:
    level, *following = levels
    size = level.bits * float(counts.sum())
    return size if level.is_last else size + _bits(_escapes(counts, level), following)


def _escapes(counts: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """How often each symbol occurs in the next level."""
    left = counts[level.digits << level.low :]
    rows = np.pad(left, (0, -left.size % (1 << level.low))).reshape(-1, 1 << level.low)
    return np.asarray(rows.sum(1))


def _best(
    counts: NDArray[np.float64], levels: int, simple: bool, price: float
) -> tuple[float, tuple[Level, ...]]:
    """The cheapest levels, and their bits with the price of each level's words but the last's."""
    size = float(counts.sum())
    least = 8 * size
    best: tuple[Level, ...] = (Level(8, 8),)
    for bits in SIMPLE if simple else FIELDS:
        if counts.size <= 1 << bits:
            if bits * size < least:
                least, best = bits * size, (Level(bits, bits),)
            break
        if levels == 1 or bits == 8 or bits * size >= least:
            continue
        for low in range(1 if simple else bits):
            level = Level(bits, low)
            rest, following = _best(_escapes(counts, level), levels - 1, simple, price)
            total = (bits + price) * size + rest
            if total < least:
                least, best = total, (level, *following)
    return least, best


@dataclass(frozen=True)
class Coded:
    """One level of a sequence, as it is stored.

    Attributes:
        level: how its words are made.
        fields: the bytes of each field, uint8 [n * field bits / 8].
        size: number of words, a multiple of 8.
        escapes: how many of them are escapes.
    """

    level: Level
    fields: tuple[Symbols, ...]
    size: int
    escapes: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.size for field in self.fields)


def encode(symbols: Symbols, levels: Sequence[Level]) -> list[Coded]:
    """Writes symbols in these levels.

    Each level is filled up to a multiple of 8 words.

    >>> [one.size for one in encode(np.array([0, 5, 1], np.uint8), [Level(2, 0), Level(4, 4)])]
    [8, 8]
    """
    level, *following = levels
    if level.is_last:
        words = np.pad(symbols, (0, -symbols.size % 8))
        return [Coded(level, _fields(words, level.bits), words.size, 0)]
    upper: Symbols = symbols >> np.uint8(level.low)
    escaped = upper >= level.digits
    own: Symbols = symbols & np.uint8((1 << level.low) - 1)
    words = np.where(escaped, own, symbols + np.uint8(level.origin)).astype(np.uint8)
    rest: Symbols = (upper - np.uint8(level.digits))[escaped]
    if not rest.size:  # one escape that no symbol needs: an array without elements is no good
        words, rest = np.append(words, np.uint8(0)), np.zeros(1, np.uint8)
    words = np.pad(words, (0, -words.size % 8), constant_values=level.origin)
    here = Coded(level, _fields(words, level.bits), words.size, rest.size)
    return [here, *encode(rest, following)]


def fields(values: Symbols, bits: int) -> tuple[Symbols, ...]:
    """The fields of values of so many bits, each filled up to whole bytes."""
    return _fields(np.pad(values, (0, -values.size % 8)), bits)


def _fields(words: Symbols, bits: int) -> tuple[Symbols, ...]:
    fields, below = [], 0
    for width in FIELDS[bits]:
        fields.append(_packed(words >> np.uint8(below) & np.uint8((1 << width) - 1), width))
        below += width
    return tuple(fields)


def _packed(values: Symbols, width: int) -> Symbols:
    """Values of so many bits, put into bytes."""
    if width == 8:
        return values
    if width == 1:
        rows = values.reshape(8, -1)
        return np.packbits(rows, axis=0).reshape(-1)
    if width == 2:
        half = values.size // 2
        return _packed(values[:half] << np.uint8(2) | values[half:], 4)
    half = values.size // 2
    return values[:half] << np.uint8(4) | values[half:]


def escape_table(level: Level, following: Level, symbols: int) -> Symbols:
    """What a word of the next level stands for: the upper part of the symbol, in its place.

    Args:
        level: one with escapes.
        following: the next one.
        symbols: how many there are at `level`.

    Returns:
        uint8 [k], to which the symbol's low bits are added; modulo 256.
    """
    upper = np.arange(max(0, ((symbols - 1) >> level.low) + 1 - level.digits) or 1)
    values = (upper + level.digits + 1) << level.low
    return np.concatenate([np.zeros(following.origin), values]).astype(np.uint8)
