"""Adaptive Rice codes, for small files: two dozen operators decode them, Huffman's take kilobytes.

Rice & Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft television
data", IEEE Trans. Commun. 19(6), 1971; Golomb, "Run-length encodings", IEEE Trans. Inf. Theory
12(3), 1966. With a parameter k, the quotient s >> k of a number s is written in **unary**, as that
many zeros and a one, and the remainder in k bits.

All sequences of a file are one sequence of numbers. Its parameter changes with each **block** of B
numbers by one, up or down, for one bit a block: a file needs no tables, and the code follows the
density of rows and layers. The encoder finds the cheapest path of parameters (Viterbi, "Error
bounds for convolutional codes", IEEE Trans. Inf. Theory 13(2), 1967).

The stream, uint8 [N, 1], is read from the highest bit of its first byte: a bit for each block; the
low bits of all numbers; all unary parts. So decoding needs no loop: TopK finds all ones of the
unary region at once, in ascending order (in succinct data structures, that is `select`), and the
low bits of a number are the end of a window of a fixed length, modulo 2^k. With p(i) the position
of the i-th one and p(-1) = -1, what is decoded is s(i) + 1 = 2^k (p(i) - p(i-1)) - c(i), where the
k bits c are the complement of the remainder, 2^k - 1 - (s mod 2^k), the highest first.

- **Symbols** s are decoded to s + 1.
- **Rising** integers x are written as their steps, s(i) = x(i) - x(i-1) - 1 with x(-1) = 0, so the
  first one is at least 1. CumSum of what is decoded gives them.

Knows sequences of integers, but no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.protobuf import tensor
from prune2onnx.packing.codecs.function import Body

MAX_BITS = 1 << 24
"""Longest unary region: decoding takes a few int32 per bit."""

BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers in a block: one of these is chosen for a file."""

_MOST = 40
"""Highest parameter."""

_BELOW = 2
"""A path may go as far below 0, which counts as 0: so parameters may stay 0."""

_TURNING_BITS = 8 * 37
"""Bits of the node and the constant that make steps up and down of bits."""

_CLAMP_BITS = 8 * 20
"""Bits of the node that makes parameters below 0 be 0."""

_ADAPTIVE_NBYTES = 230
"""Bytes of the nodes and constants that a sequence with one parameter does not need."""

_BLOCK = 8


def about_bits(counts: NDArray[np.integer[Any]]) -> float:
    """About the bits of a sequence in which symbol s occurs counts[s] times, in any order.

    >>> about_bits(np.array([8, 0]))
    9.0
    """
    symbols, total = np.arange(counts.size), int(counts.sum())
    bits = (int(counts @ ((symbols >> low) + 1 + low)) for low in range(_MOST))
    return min(bits) + total / _BLOCK


def rising_bits(integers: NDArray[np.integer[Any]]) -> float:
    """About the bits of rising integers, [n], n at least 1."""
    wide: NDArray[np.int64] = integers.astype(np.int64)
    steps = np.diff(wide, prepend=-1) - 1
    return float(_costs(steps, _BLOCK).min(axis=1).sum()) + steps.size / _BLOCK


@dataclass(frozen=True, eq=False)
class Run:
    """A sequence to write.

    Attributes:
        name: of the value that will hold it, int32 [n]: the integers if they rise, else symbols +
            1 + base.
        integers: rising ones, the first at least 1, or symbols; [n], n at least 1.
        rising: whether they rise.
        base: added to symbols.
    """

    name: str
    integers: NDArray[np.integer[Any]]
    rising: bool = False
    base: int = 0

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """What is written: symbols, or steps less 1."""
        integers = self.integers.astype(np.int64)
        return np.diff(integers, prepend=0) - 1 if self.rising else integers


@dataclass(frozen=True, eq=False)
class Stream:
    """Numbers, coded.

    Attributes:
        data: uint8 [N, 1].
        regions: bits of the three parts of the data; those that fill the last byte are at the end
            of the first region, the one before the low bits at the begin of the second.
        block: numbers in a block, the first one short of one.
        first: the parameter before the first block's.
        highest: the highest parameter, at least 1.
        turning: whether a bit is a step up (0) or down (1); else it is a step up (1) or none (0).
        clamped: whether the path goes below 0.
    """

    data: NDArray[np.uint8]
    regions: tuple[int, int, int]
    block: int
    first: int
    highest: int
    turning: bool
    clamped: bool


def encode(numbers: NDArray[np.int64], block: int | None = None) -> Stream:
    """Codes numbers, [n], n at least 2.

    Args:
        numbers: at least 0 each.
        block: numbers in a block, by default that of `BLOCKS` with the fewest bits.

    Raises:
        Prune2OnnxError: the unary parts are longer than `MAX_BITS`.

    >>> stream = encode(np.array([0, 2, 4, 24]), block=4)
    >>> [f"{byte:08b}" for byte in stream.data.ravel()], stream.regions, stream.first
    (['01000001', '10111111', '11010001'], (6, 10, 8), 2)
    """
    sizes = [block] if block else BLOCKS
    tried = [(*path, size) for size in sizes for path in _paths(numbers, size)]
    _, path, turning, size = min(tried, key=lambda one: one[0])
    choices = (int(path[0]) + turning, int(path[0]) - 1)
    first = next((k for k in choices if k in (0, 2, size)), choices[0])  # constants that exist
    steps = np.diff(path, prepend=first)
    turns = steps < 0 if turning else steps > 0
    low = np.maximum(path, 0)[np.arange(1, numbers.size + 1) // size]
    lows, unary = _parts(numbers, low)
    data, filling = _filled(turns, np.pad(lows, (1, 0)), unary)
    regions = (turns.size + filling, lows.size + 1, unary.size)
    highest = max(1, int(low.max()))
    return Stream(data, regions, size, first, highest, turning, bool(path.min() < 0))


def _fixed(numbers: NDArray[np.int64]) -> Stream:
    """Codes numbers with one parameter, `first`, which is the highest, too."""
    low = int(_costs(numbers, numbers.size).argmin())
    lows, unary = _parts(numbers, np.full(numbers.size, low))
    unary = np.pad(unary, (1, 0))  # p(i) is then one more: the sum of steps
    data, filling = _filled(lows[:0], lows, unary)
    return Stream(data, (0, lows.size, unary.size + filling), 0, low, low, False, False)


def _parts(
    numbers: NDArray[np.int64], low: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The bits of all remainders, and those of all unary parts."""
    quotients = numbers >> low
    unary_bits = int(quotients.sum()) + numbers.size
    if unary_bits > MAX_BITS:
        raise Prune2OnnxError(f"{unary_bits:,} bits of a Rice code, at most {MAX_BITS:,}")
    unary = np.zeros(unary_bits, np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    ends = np.cumsum(low)
    lows = np.zeros(int(ends[-1]), np.uint8)
    for place in range(int(low.max())):
        inside = low > place
        lows[ends[inside] - 1 - place] = ~numbers[inside] >> place & 1
    return lows, unary


def _filled(
    turns: NDArray[Any], lows: NDArray[np.uint8], unary: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], int]:
    """Bits as bytes, [N, 1], and the number of zeros that fill the last byte.

    They stand after `turns`; if there are none, at the end.
    """
    filling = -(turns.size + lows.size + unary.size) % 8
    if turns.size:
        turns = np.pad(turns, (0, filling))
    bits = np.concatenate([turns.astype(np.uint8), lows, unary])
    return np.packbits(bits).reshape(-1, 1), filling


def _costs(numbers: NDArray[np.int64], block: int, offset: int = 0) -> NDArray[np.int64]:
    """The bits of each block with each parameter, [blocks, parameters]."""
    starts = np.arange(-offset, numbers.size, block)
    starts[0] = 0
    most = min(_MOST, int(numbers.max(initial=0)).bit_length() + 1)
    columns = [np.add.reduceat((numbers >> low) + 1 + low, starts) for low in range(most + 1)]
    return np.stack(columns, axis=1)


def _paths(numbers: NDArray[np.int64], block: int) -> Iterator[tuple[int, NDArray[np.int64], bool]]:
    """The best path of each kind: bits of numbers, blocks and nodes; parameters; `turning`."""
    costs = _costs(numbers, block, offset=1)
    yield *_cheapest(costs, same=True), False
    bits, path = _cheapest(costs)
    yield bits + _TURNING_BITS, path, True
    bits, path = _cheapest(np.pad(costs, ((0, 0), (_BELOW, 0)), mode="edge"))
    yield bits + _TURNING_BITS + _CLAMP_BITS, path - _BELOW, True


def _cheapest(costs: NDArray[np.int64], *, same: bool = False) -> tuple[int, NDArray[np.int64]]:
    """Viterbi: a column for each row, with the least sum of costs; it and a bit for each row.

    Each column is next to the one before, or (`same`) the same or the next higher one.
    """
    count, width = costs.shape
    total = np.full(width + 2, np.int64(1) << 60)
    total[1:-1] = costs[0]
    other = slice(1, -1) if same else slice(2, None)
    from_other = np.zeros((count, width), bool)
    for row in range(1, count):
        np.less(total[other], total[:-2], out=from_other[row])
        total[1:-1] = np.minimum(total[other], total[:-2]) + costs[row]
    path = np.empty(count, np.int64)
    path[-1] = int(total[1:-1].argmin())
    for row in range(count - 1, 0, -1):
        path[row - 1] = path[row] + ((0 if same else 1) if from_other[row, path[row]] else -1)
    return int(total[1:-1].min()) + count, path


def write(body: Body, runs: Sequence[Run]) -> None:
    """Adds the stream of sequences to a function, and the nodes that decode it."""
    # Those with low parameters first: steps of indices are long.
    runs = sorted(runs, key=lambda run: run.numbers.mean())
    numbers = np.concatenate([run.numbers for run in runs])
    filling = max(0, 2 - numbers.size)
    stream = encode(np.pad(numbers, (0, filling)))
    if len(runs) == 1 and runs[0].rising:
        alone = _fixed(numbers)
        if alone.data.size <= stream.data.size + _ADAPTIVE_NBYTES:
            body.rename(_rising(body, alone, numbers.size), runs[0].name)
            return
    sizes = [run.integers.size for run in runs]
    values = body.split(_decoded(body, stream, numbers.size + filling), *sizes, filling)
    for run, value in zip(runs, values, strict=False):
        if run.rising:
            value = body.node("CumSum", value, body.constant(0))
        elif run.base:
            value = body.node("Add", value, body.constant(run.base))
        body.rename(value, run.name)


def _bits(body: Body, stream: Stream) -> list[str]:
    """Values with the bits of the regions, int32."""
    data = body.give(tensor("", stream.data, TensorProto.UINT8))
    bits = body.node("Cast", data, to=TensorProto.INT32)
    bits = body.node("Div", bits, body.constant([1 << place for place in reversed(range(8))]))
    bits = body.node("Mod", bits, body.constant(2))
    return body.split(
        body.node("Reshape", bits, body.indices(8 * stream.data.size)), *stream.regions
    )


def _rising(body: Body, stream: Stream, count: int) -> str:
    """A value with rising integers, int32 [count], of a stream with one parameter."""
    _, lows, unary = _bits(body, stream)
    places = body.nodes("TopK", unary, body.indices(count), outputs=2)[1]
    integers = body.node("Cast", places, to=TensorProto.INT32)
    if low := stream.first:
        integers = body.node("Mul", integers, body.constant(1 << low))
        rows = body.node("Reshape", lows, body.indices(count, low))
        weights = body.constant([1 << place for place in reversed(range(low))])
        rests = body.node("CumSum", body.node("MatMul", rows, weights), body.constant(0))
        integers = body.node("Sub", integers, rests)
    return integers


def _decoded(body: Body, stream: Stream, count: int) -> str:
    """A value with the numbers plus 1, int32 [count]."""
    zero, two = body.constant(0), body.constant(2)
    turns, lows, unary = _bits(body, stream)

    # 1, 2, ..., n, from the ones themselves: which block, and where the one before is.
    ones, places = body.nodes("TopK", unary, body.indices(count), outputs=2)
    places = body.node("Cast", places, to=TensorProto.INT32)
    number = body.node("CumSum", ones, zero)
    if stream.turning:
        turns = body.node("Pow", body.constant(-1), turns)
    path = body.node("CumSum", turns, zero)
    path = body.node("Add", path, body.constant(stream.first))
    low = body.node("Gather", path, body.node("Div", number, body.constant(stream.block)))
    if stream.clamped:
        low = body.node("Max", low, zero)

    # The one before the first is the last (index -1), and the region ends with it: modulo the
    # region's length, it is at -1.
    before = body.node("Gather", places, body.node("Sub", number, two))
    steps = body.node("Sub", places, before)
    steps = body.node("Mod", steps, body.constant(stream.regions[2]))

    # A window of the bits up to the end of each number's own; before the first bit it wraps around.
    back = body.constant(range(stream.highest), (stream.highest, 1))
    index = body.node("Sub", body.node("CumSum", low, zero), back)
    weights = body.constant([1 << place for place in range(stream.highest)])
    rest = body.node("MatMul", weights, body.node("Gather", lows, index))
    unit = body.node("Pow", two, low)
    rest = body.node("Mod", rest, unit)
    return body.node("Sub", body.node("Mul", steps, unit), rest)
