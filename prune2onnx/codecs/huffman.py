"""Canonical Huffman codes of at most 12 bits: construction, encoding, decoding, ONNX function.

Construction is package-merge (Larmore & Hirschberg, "A fast algorithm for optimal length-limited
Huffman codes", JACM 37(3), 1990), so no prefix code limited to 12 bits is shorter. Its cost is
below entropy + 1 bit a symbol, as for any Huffman code, and with 12 bits in practice within a few
hundredths of the entropy for the alphabets met here.

Codewords are canonical (Schwartz & Kallick, "Generating a canonical prefix encoding", CACM 7(3),
1964): they follow from the code lengths alone. Longer codewords come first in numerical order, so
that at each depth the internal nodes of the code tree stand left of the leaves. The table of a
code is then the number of internal nodes at the depths 0 to 11, twelve bytes: a 12-bit window
`w` that starts with a codeword has length

    length(w) = #{d in 0..11 : (w >> (12 - d)) < internal[d]},

and the codewords are numbered by `rank(w)` in numerical order. Symbols are stored in that order.

A stream is cut into B = ceil(n / 512) lanes: lane b holds the symbols b, b + B, b + 2B, ... and
the lanes follow each other without a gap. The lanes start together at known bits and are walked
together, in numpy one symbol a step, in ONNX by pointer jumping: with J(p) the position after the
codeword that starts at bit p, nine rounds of `P = concat(P, J[P]); J = J[J]` visit 512 symbols
of every lane without a loop, which onnxruntime could not fold.

Knows sequences of symbols; knows nothing of weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, TensorProto

from prune2onnx.codecs.function import Body
from prune2onnx.errors import Prune2OnnxError

LENGTH_LIMIT = 12
"""Longest codeword, in bits: a word of 16 bits and 12 of the next fit an int32."""

LANE = 512
"""Symbols in a lane: one uint16 start for 512 symbols is 0.03 bit a symbol."""

_DOUBLINGS = LANE.bit_length() - 1
_WINDOWS = 1 << LENGTH_LIMIT
_WORD_BITS = 16
_WORD = 1 << _WORD_BITS

OP = "h"
"""Name of the function that decodes a stream."""

MAX_BITS = 1 << 27
"""Longest stream: decoding in the graph holds several int32 arrays with one element a bit, and
onnxruntime from 1.27 on folds no output above 1 GB (PR 28055)."""

MAX_SYMBOLS = 1 << 28
"""Most symbols in a stream that is decoded here; a declared count is checked before it is used."""


def code_lengths(counts: Sequence[int], limit: int = LENGTH_LIMIT) -> list[int]:
    """Lengths of an optimal prefix code with no codeword longer than `limit`.

    Package-merge: a coin of denomination 2^-d and value `count` for every symbol and depth d;
    buying n - 1 whole units as cheaply as possible buys each symbol as many coins as its codeword
    has bits.

    Args:
        counts: how often each symbol occurs, each at least 1, at most 2^limit of them.
        limit: longest codeword allowed, in bits.

    Returns:
        Bits of each symbol's codeword; [0] for a single symbol, which needs none.

    >>> code_lengths([1, 1, 2, 4])
    [3, 3, 2, 1]
    """
    size = len(counts)
    if not 1 <= size <= 1 << limit:
        raise Prune2OnnxError(f"{size} symbols do not fit codewords of {limit} bits")
    lengths = [0] * size
    if size == 1:
        return lengths
    coins = sorted((count, (symbol,)) for symbol, count in enumerate(counts))
    merged: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(limit):
        packages = [
            (merged[i][0] + merged[i + 1][0], merged[i][1] + merged[i + 1][1])
            for i in range(0, len(merged) - 1, 2)
        ]
        merged = sorted(coins + packages, key=lambda package: package[0])
    for _, symbols in merged[: 2 * size - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


@dataclass(frozen=True)
class Code:
    """A canonical code.

    Attributes:
        order: the symbols by rising codeword; index into it is the rank.
        lengths: bits of the codeword of each rank, never rising.
        codewords: the codeword of each rank, in its low `lengths[rank]` bits.
        internal: internal nodes of the code tree at the depths 0 to 11.
    """

    order: tuple[int, ...]
    lengths: tuple[int, ...]
    codewords: tuple[int, ...]
    internal: tuple[int, ...]


def canonical(lengths: Sequence[int]) -> Code:
    """The canonical code with these lengths (a complete one: Kraft's sum is 1).

    Ranks go by falling length, then by rising symbol. The first codeword is all zeros; the next
    is the last plus one, cut to its own length.

    >>> code = canonical([1, 2, 3, 3])
    >>> [(symbol, f"{word:0{bits}b}") for symbol, bits, word in
    ...  zip(code.order, code.lengths, code.codewords)]
    [(2, '000'), (3, '001'), (1, '01'), (0, '1')]
    >>> code.internal
    (1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    """
    order = sorted(range(len(lengths)), key=lambda symbol: (-lengths[symbol], symbol))
    window = 0
    codewords = []
    for symbol in order:
        codewords.append(window >> (LENGTH_LIMIT - lengths[symbol]))
        window += _WINDOWS >> lengths[symbol]
    internal = [int(lengths[order[0]] > 0)]
    for depth in range(1, LENGTH_LIMIT):
        internal.append(2 * internal[-1] - sum(length == depth for length in lengths))
    return Code(
        tuple(order), tuple(lengths[symbol] for symbol in order), tuple(codewords), tuple(internal)
    )


def encode(symbols: NDArray[np.uint8]) -> tuple[Code, NDArray[np.uint16], NDArray[np.uint16]]:
    """Codes `symbols`, uint8 [n], n at least 1.

    Returns:
        The code, whose `order` holds the symbol values that occur; the bits, uint16 [W], the first
        bit the highest of the first word; the lane starts, uint16 [B], each relative to the one
        before it, the first 0.
    """
    counts = np.bincount(symbols, minlength=256)
    present = np.flatnonzero(counts)
    code = canonical(code_lengths(counts[present].tolist()))
    code = Code(
        tuple(int(present[symbol]) for symbol in code.order),
        code.lengths,
        code.codewords,
        code.internal,
    )
    length_of = np.zeros(256, np.uint8)
    word_of = np.zeros(256, np.uint64)
    length_of[list(code.order)] = code.lengths
    word_of[list(code.order)] = code.codewords

    lanes = -(-symbols.size // LANE)
    steps = -(-symbols.size // lanes)
    padded = np.zeros((steps, lanes), np.uint8)
    padded.reshape(-1)[: symbols.size] = symbols
    # The lanes that are one symbol short come last, and so do their holes.
    full = lanes - (steps * lanes - symbols.size)
    in_lanes = padded.T
    ordered = np.concatenate([in_lanes[:full].reshape(-1), in_lanes[full:, :-1].reshape(-1)])

    bits_of = length_of[ordered]
    ends = np.cumsum(bits_of, dtype=np.int64)
    heads = np.concatenate(
        [np.arange(full) * steps, full * steps + np.arange(lanes - full) * (steps - 1)]
    )
    first_bits = ends[heads] - bits_of[heads]
    starts = np.diff(first_bits, prepend=0).astype(np.uint16)
    return code, _packed(word_of[ordered], bits_of, ends), starts


def _packed(
    words: NDArray[np.uint64], bits: NDArray[np.uint8], ends: NDArray[np.int64]
) -> NDArray[np.uint16]:
    """Joins codewords into 16-bit words, at least one.

    Codewords that start in the same 32-bit unit are shifted to their place in a 64-bit word and
    summed; the low half of the sum belongs to the next unit.
    """
    total = int(ends[-1])
    if not total:
        return np.zeros(1, np.uint16)
    begins = ends - bits
    units = begins >> 5
    shifts = (64 - bits.astype(np.int64) - (begins & 31)).astype(np.uint64)
    first = np.flatnonzero(np.diff(units, prepend=-1))
    sums = np.add.reduceat(words << shifts, first)
    joined = np.zeros(-(-total // 32) + 1, np.uint64)
    joined[units[first]] = sums >> np.uint64(32)
    joined[units[first] + 1] |= sums & np.uint64(0xFFFFFFFF)
    halves = joined.astype(">u4").view(">u2").astype(np.uint16)
    return halves[: -(-total // _WORD_BITS)]


def decode(
    data: NDArray[np.uint16],
    internal: NDArray[np.uint8],
    starts: NDArray[np.uint16],
    alphabet: NDArray[Any],
    size: int,
) -> NDArray[Any]:
    """Rebuilds `size` symbols, in the alphabet's dtype.

    Args:
        data: uint16 [W], the bits.
        internal: uint8, 12 elements.
        starts: uint16 [B].
        alphabet: [k], the symbols by rank.
        size: n.

    Raises:
        Prune2OnnxError: impossible code lengths, an alphabet of another size, starts that do not
            meet the ends of the lanes, a stream that ends too soon.
    """
    length_of, rank_of = tables(internal, alphabet.size)
    data, starts = data.reshape(-1), starts.reshape(-1)
    if not 1 <= size <= MAX_SYMBOLS:
        raise Prune2OnnxError(f"{size} symbols declared, 1 to {MAX_SYMBOLS} expected")
    lanes = -(-size // LANE)
    if starts.size != lanes:
        raise Prune2OnnxError(f"{starts.size} lane starts for {size} symbols, {lanes} expected")
    padded = np.concatenate([data, np.zeros(2, np.uint16)]).astype(np.int32)
    last_bit = _WORD_BITS * data.size
    first_bits = np.cumsum(starts, dtype=np.int64)
    position = first_bits.copy()
    steps = -(-size // lanes)
    ranks = np.zeros((steps, lanes), np.uint8)
    for step in range(steps):
        active = position[: min(lanes, size - step * lanes)]
        if active.size and int(active.max()) > last_bit:
            raise Prune2OnnxError(
                f"codeword {step * lanes} starts at bit {int(active.max())} of {last_bit}; "
                "the stream is damaged"
            )
        word = active >> 4
        pair = padded[word] << LENGTH_LIMIT | padded[word + 1] >> _WORD_BITS - LENGTH_LIMIT
        window = pair >> _WORD_BITS - (active & 15) & (_WINDOWS - 1)
        ranks[step, : active.size] = rank_of[window]
        active += length_of[window]
    total = int(position[-1])
    if first_bits[0] or not np.array_equal(position[:-1], first_bits[1:]):
        raise Prune2OnnxError("the lanes do not meet; the stream is damaged")
    if max(-(-total // _WORD_BITS), 1) != data.size:
        raise Prune2OnnxError(f"{total} bits read from {data.size} words; the stream is damaged")
    return alphabet.reshape(-1)[ranks.reshape(-1)[:size]]


def tables(
    internal: NDArray[np.uint8], symbols: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Length and rank of the codeword that each 12-bit window starts with, [4096] both.

    Raises:
        Prune2OnnxError: no complete code has these internal nodes, or not this many symbols.
    """
    nodes = [*internal.reshape(-1).astype(int).tolist(), 0]
    if len(nodes) != LENGTH_LIMIT + 1:
        raise Prune2OnnxError(f"{len(nodes) - 1} internal counts, {LENGTH_LIMIT} expected")
    leaves = [1 - nodes[0]]
    leaves += [2 * above - here for above, here in itertools.pairwise(nodes)]
    if min(leaves) < 0:
        raise Prune2OnnxError(f"impossible code lengths: internal nodes {nodes[:-1]}")
    if sum(leaves) != symbols or symbols > 256:
        raise Prune2OnnxError(f"a code of {sum(leaves)} symbols for an alphabet of {symbols}")
    lengths = np.repeat(np.arange(LENGTH_LIMIT, -1, -1), leaves[::-1])
    windows = _WINDOWS >> lengths
    return np.repeat(lengths, windows), np.repeat(np.arange(symbols, dtype=np.uint8), windows)


def functions(opset: int) -> tuple[FunctionProto, ...]:
    """The ONNX functions: `d`, one round of pointer jumping, and `h`, a stream to symbols.

    `h` takes data (uint16 [W, 1]), internal (uint8 [12, 1]), starts (uint16 [B]) and the alphabet
    ([k], any type), the attributes n ([number of symbols]) and k (shape of the result), and
    returns the symbols in that shape. It ends on Gather, which copies: onnxruntime 1.24 keeps a
    dangling buffer where the last folded operator is an alias such as Reshape (issue 29788).
    """
    round_ = Body("d", inputs=2)
    positions, jumps = round_.inputs
    visited = round_.node("GatherElements", jumps, positions)
    reached = round_.node("Concat", positions, visited, axis=0)
    doubled = round_.node("GatherElements", jumps, jumps)

    h = Body(OP, inputs=4, attributes="nk")
    data, internal, starts, alphabet = h.inputs
    zero, one, full = h.constant(0), h.constant(1), h.constant(_WINDOWS)
    first = h.indices(0)

    # Indices are counted from the end (GatherElements takes -N to N - 1), here and below: one step
    # past the end is then an index from the front, and needs neither padding nor a clamp.
    word = h.node("Cast", data, to=TensorProto.INT32)
    to_end = h.node("CumSum", h.node("Clip", word, one, one), zero, reverse=1)
    following = h.node("GatherElements", word, h.node("Sub", one, to_end))

    # The window at each bit position: 12 of the 28 bits of a word and its follower, int32 [16 W].
    high = h.node("Mul", word, full)
    pair = h.node("Add", high, h.node("Div", following, h.constant(_WORD >> LENGTH_LIMIT)))
    shifted = h.node("Div", pair, h.constant([_WORD >> offset for offset in range(_WORD_BITS)]))
    window = h.node("Reshape", h.node("Mod", shifted, full), h.indices(-1))

    # Length and symbol for each of the 4096 windows, as `tables` does.
    spans = h.constant([_WINDOWS >> depth for depth in range(LENGTH_LIMIT)], (LENGTH_LIMIT, 1))
    bounds = h.node("Mul", h.node("Cast", internal, to=TensorProto.INT32), spans)
    inside = h.node("Less", h.node("Range", zero, full, one), bounds)
    inside = h.node("Cast", inside, to=TensorProto.INT32)
    length = h.node("ReduceSum", inside, first, keepdims=0)
    share = h.node("Pow", h.constant(2), length)
    rank = h.node("Div", h.node("CumSum", share, zero, exclusive=1), full)
    symbol = h.node("GatherElements", alphabet, rank)

    # J(p) = p + length.
    to_end = h.node("CumSum", h.node("Clip", window, one, one), zero, reverse=1)
    jumps = h.node("Sub", h.node("GatherElements", length, window), to_end)
    positions = h.node("CumSum", h.node("Cast", starts, to=TensorProto.INT32), zero)
    for _ in range(_DOUBLINGS - 1):
        positions, jumps = h.call("d", positions, jumps, outputs=2)
    visited_last = h.node("GatherElements", jumps, positions)
    positions = h.node("Concat", positions, visited_last, axis=0)
    positions = h.node("Slice", positions, first, h.integers("n"))
    found = h.node("Reshape", h.node("GatherElements", window, positions), h.integers("k"))
    result = h.node("Gather", symbol, found)
    return round_.function(reached, doubled, opset=opset), h.function(result, opset=opset)
