"""Rice codes, for small files: a few operators decode them, while Huffman's take kilobytes.

Rice & Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft television
data", IEEE Trans. Commun. 19(6), 1971; Golomb, "Run-length encodings", IEEE Trans. Inf. Theory
12(3), 1966. With a parameter k, the quotient s >> k of a symbol is written in **unary**, as that
many zeros and a one, and the remainder in k bits. Geometric sources, such as the gaps between
random positions, take 0.03 to 0.1 bits per symbol more than their entropy.

The stream, uint8 [B, 1], is read from the highest bit of its first byte. First come the low bits
of all sequences (except where k = 8: those are a stream of their own, uint8 [n], which takes fewer
nodes), then all unary parts. So decoding needs no loop: TopK finds all ones of the unary region at
once, in ascending order (in succinct data structures, that is `select`). With p(i) the position of
the i-th one, the quotients are q(i) = p(i) - p(i-1) - 1.

- A sequence of **symbols** s is decoded to s + 1 = 2^k (q + 1) - c, where the k bits c are the
  complement of the remainder, c = 2^k - 1 - (s mod 2^k), the highest first.
- **Rising** indices x(i) need not be cut into gaps and summed up again: with s(i) = x(i) - x(i-1) -
  1 and x(-1) = -2^k, x(i) = 2^k p(i) - (c(0) + ... + c(i)), where p is counted from the start of
  the sequence's unary part.
- A **flat** sequence of symbols has each s + 1 in k bits, and no unary part.

Sequences of rising indices stand first; if there are none, a single 1 begins the unary region.
Zeros fill the last byte.

Knows sequences of integers, but no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
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
"""Longest unary part of a sequence: decoding takes a few int64 per bit."""

_NODES_BITS = 8 * 85
"""Bits of the nodes that turn the low bits of a sequence into numbers."""

_LOWS = 40
"""Number of parameters to choose from."""


@dataclass(frozen=True)
class Code:
    """How a sequence is written.

    Attributes:
        low: the parameter k, the bits of each remainder.
        flat: whether there is no unary part.
    """

    low: int
    flat: bool = False

    @property
    def nodes_bits(self) -> int:
        """Bits of the nodes for the remainders, besides the sequence; 0 for remainders in bytes."""
        return _NODES_BITS * (self.low not in (0, 8))

    def bits(self, symbols: NDArray[np.integer[Any]]) -> int:
        """The bits that symbols take."""
        unary = 0 if self.flat else int((symbols.astype(np.int64) >> self.low).sum()) + symbols.size
        return symbols.size * self.low + unary


def code_of(counts: NDArray[np.integer[Any]]) -> tuple[Code, int]:
    """The code that takes the fewest bytes, and its bits, where symbol s occurs counts[s] times.

    >>> code_of(np.array([3, 1]))
    (Code(low=0, flat=False), 5)
    """
    symbols = np.arange(counts.size)
    bits = {Code(low): int(counts @ ((symbols >> low) + 1 + low)) for low in range(_LOWS)}
    flat = Code(max(2, counts.size.bit_length()), flat=True)
    bits[flat] = int(counts.sum()) * flat.low
    best = min(bits, key=lambda code: bits[code] + code.nodes_bits)
    return best, bits[best]


def rising_code(indices: NDArray[np.integer[Any]]) -> Code:
    """The code that takes the fewest bytes for rising indices, [n], n at least 1."""
    integers: NDArray[np.int64] = indices.astype(np.int64)
    steps = np.diff(integers, prepend=-1) - 1
    return min(map(Code, range(_LOWS)), key=lambda code: code.bits(steps) + code.nodes_bits)


@dataclass(frozen=True, eq=False)
class Run:
    """A sequence to write.

    Attributes:
        name: of the value that will hold it, int64 [n]: indices, or symbols + 1 + base.
        integers: ascending indices, or symbols; [n], n at least 1.
        rising: whether they are indices.
        base: added to symbols.
    """

    name: str
    integers: NDArray[np.integer[Any]]
    rising: bool = False
    base: int = 0

    @cached_property
    def code(self) -> Code:
        """How it is written."""
        return rising_code(self.integers) if self.rising else code_of(np.bincount(self.integers))[0]

    @cached_property
    def parts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Quotients, and the numbers that are written in low bits."""
        integers = self.integers.astype(np.int64)
        if self.code.flat:
            return np.zeros(0, np.int64), integers + 1
        if self.rising:
            integers = np.diff(integers, prepend=-(1 << self.code.low)) - 1
        return integers >> self.code.low, ~integers & (1 << self.code.low) - 1

    @property
    def bits(self) -> int:
        """All bits of the sequence."""
        return self.integers.size * self.code.low + self.unary_bits

    @property
    def unary_bits(self) -> int:
        """Bits of its unary part."""
        quotients = self.parts[0]
        return int(quotients.sum()) + quotients.size


def encode(runs: Sequence[Run]) -> NDArray[np.uint8]:
    """The stream of sequences, those of indices first; uint8 [B, 1].

    Raises:
        Prune2OnnxError: a unary part is longer than `MAX_BITS`.

    >>> stream = encode([Run("x", np.array([2, 3]), rising=True), Run("s", np.array([0, 2]))])
    >>> [f"{byte:08b}" for byte in stream.ravel()]  # k = 0: 001 1, 1 001
    ['00111001']
    """
    lows, unary = [], [] if runs[0].rising else [np.ones(1, np.uint8)]
    for run in runs:
        if run.unary_bits > MAX_BITS:
            raise Prune2OnnxError(f"{run.unary_bits:,} bits of a Rice code, at most {MAX_BITS:,}")
        quotients, rests = run.parts
        if run.code.low != 8:
            places = np.arange(run.code.low)[::-1]
            lows.append((rests[:, None] >> places & 1).astype(np.uint8).ravel())
        unary.append(np.zeros(run.unary_bits, np.uint8))
        unary[-1][np.cumsum(quotients + 1) - 1] = 1
    return np.packbits(np.concatenate([*lows, *unary])).reshape(-1, 1)


def write(body: Body, runs: Sequence[Run]) -> None:
    """Adds the stream of sequences to a function, and the nodes that decode it.

    Args:
        body: the function.
        runs: the sequences, those of indices first.
    """
    data = encode(runs)
    stream = body.give(tensor("", data, TensorProto.UINT8))
    integers = body.node("Cast", stream, to=TensorProto.INT64)
    bits = body.node("Mod", body.node("Div", integers, _powers(body, 8)), _scalar(body, 2))
    bits = body.node("Reshape", bits, body.indices(8 * data.size))
    sizes = [run.integers.size * run.code.low * (run.code.low != 8) for run in runs]
    *lows, unary = body.split(bits, *sizes, 8 * data.size - sum(sizes))
    rests = {run.name: _numbers(body, run, part) for run, part in zip(runs, lows, strict=True)}
    found = _multiples(body, unary, [run for run in runs if not run.code.flat])
    for run in runs:
        value, rest = found.get(run.name), rests[run.name]
        if value is None:
            value = rest
        elif run.code.low:
            if run.rising:
                rest = body.node("CumSum", rest, _scalar(body, 0))
            value = body.node("Sub", value, rest)
        if run.base:
            value = body.node("Add", value, _scalar(body, run.base))
        body.rename(value, run.name)


def _scalar(body: Body, value: int) -> str:
    return body.constant(value, element_type=TensorProto.INT64)


def _powers(body: Body, bits: int) -> str:
    return body.indices(*(1 << bit for bit in reversed(range(bits))))


def _numbers(body: Body, run: Run, bits: str) -> str:
    """The low bits of a sequence as numbers; with k < 2, the bits are the numbers."""
    if run.code.low < 2:
        return bits
    if run.code.low == 8:
        whole = body.give(tensor("", run.parts[1].astype(np.uint8), TensorProto.UINT8))
        return body.node("Cast", whole, to=TensorProto.INT64)
    rows = body.node("Reshape", bits, body.indices(run.integers.size, run.code.low))
    return body.node("MatMul", rows, _powers(body, run.code.low))


def _multiples(body: Body, bits: str, runs: Sequence[Run]) -> dict[str, str]:
    """Sequence with a unary part -> value of 2^k (q + 1), or for indices of 2^k p."""
    rising = [run for run in runs if run.rising]
    others = runs[len(rising) :]
    before = [run.integers.size for run in rising] or [1]
    sizes = [run.integers.size for run in others]
    if not runs:
        return {}
    count = body.indices(sum(before) + sum(sizes))
    ones = body.nodes("TopK", bits, count, outputs=2)[1]
    *places, here = body.split(ones, *before, sum(sizes))
    found = []
    begin = 0
    for run, place in zip(rising, places, strict=False):
        found.append(body.node("Sub", place, _scalar(body, begin)) if begin else place)
        begin += run.unary_bits
    if others:
        _, last, _ = body.split(ones, sum(before) - 1, sum(sizes), 1)
        found += body.split(body.node("Sub", here, last), *sizes)
    return {
        run.name: body.node("Mul", value, _scalar(body, 1 << run.code.low))
        if run.code.low
        else value
        for run, value in zip(runs, found, strict=True)
    }
