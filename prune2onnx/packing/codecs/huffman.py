"""Canonical Huffman codes of at most 12 bits: construction, encoding, decoding, ONNX functions.

Construction is package-merge (Larmore & Hirschberg, "A fast algorithm for optimal length-limited
Huffman codes", JACM 37(3), 1990), so no prefix code limited to 12 bits is shorter. Codewords are
canonical (Schwartz & Kallick, "Generating a canonical prefix encoding", CACM 7(3), 1964): they
follow from the code lengths alone. Symbols are numbered so that lengths never fall as the number
rises; longer codewords come first in numerical order. At each depth the internal nodes of the code
tree then stand left of the leaves, and the number of internal nodes at each depth d < limit, one
byte each, describes the code. A window `w` of limit bits that starts with a codeword has length

    length(w) = #{d : (w >> (limit - d)) < internal[d]},

and its symbol is the number of codewords that are numerically higher.

One stream holds several **segments**, each with a code of its own, each starting at a 16-bit word.
All segments of a model share one stream, because each decoding call costs the runtime milliseconds,
however little it decodes.

A segment is cut into **lanes** of a fixed number of symbols, whose starts are stored, and which are
decoded in parallel. Two functions do so without a loop, which onnxruntime could not fold:

- `m`, for short streams, jumps pointers in lanes of 512: with J(p) the position after the codeword
  that starts at bit p, `J = J[J]` four times jumps over 16 symbols. Then 32 leaps reach every 16th
  symbol of each lane, and the symbols between follow by halving the distance. It has about 100
  nodes, and makes about 12 passes over one int32 per *bit*.
- `l`, for long streams, takes 128 steps, each one symbol of every lane. It has about 1200 nodes,
  and makes 13 passes over one int32 per *symbol*.

Knows sequences of symbols, but no weights.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError

LIMITS = (10, 12)
"""Longest codeword of a stream, in bits. 12: a word of 16 bits and 12 of the next fit an int32. 10,
where that adds almost no bits: the tables, 1024 windows per segment, take a quarter of the time."""

_MOST_ADDED = 1.002
"""Most bits with the lower limit, relative to those with the higher one."""

LANES = {"m": 512, "l": 128}
"""The functions that decode a stream -> the symbols in each of their lanes."""

JUMP_BITS = 1 << 20
"""Longest stream for `m`, which jumps pointers: at this length the nodes of `l` cost as much time.
"""

MAX_BITS = 1 << 30
"""Longest stream: bit positions are int32."""

DOUBLINGS = 4
"""How often `m` doubles its jumps. Each time takes a pass over one int32 per bit, and halves the
number of leaps, which are short nodes."""


WORD_BITS = 16
WORD = 1 << WORD_BITS


def code_lengths(counts: Sequence[int], limit: int = LIMITS[-1]) -> list[int]:
    """Lengths of an optimal prefix code with no codeword longer than `limit`.

    Package-merge: there is a coin of denomination 2^-d and value `count` for every symbol and depth
    d. The cheapest coins that add up to n - 1 contain, of each symbol, as many coins as its
    codeword has bits.

    Args:
        counts: how often each symbol occurs, 0 allowed, at most 2^limit of them.
        limit: longest codeword allowed, in bits.

    Returns:
        Bits of each symbol's codeword; [0] for a single symbol, which needs none.

    >>> code_lengths([1, 1, 2, 4])
    [3, 3, 2, 1]
    """
    size = len(counts)
    if not 1 <= size <= 1 << limit:
        raise Prune2OnnxError(f"{size} symbols do not fit codewords of {limit} bits")
    if size == 1:
        return [0]
    order = np.argsort(counts, kind="stable")
    coins = np.asarray(counts, np.int64)[order]
    merged, is_package = coins, np.zeros(size, bool)
    bought = []  # at each depth, the deepest first: which items are packages
    for _ in range(limit - 1):
        bought.append(is_package)
        pairs = merged[: merged.size // 2 * 2].reshape(-1, 2).sum(axis=1)
        both = np.concatenate([coins, pairs])
        place = np.argsort(both, kind="stable")
        merged, is_package = both[place], place >= size
    bought.append(is_package)
    lengths = np.zeros(size, np.int64)
    items = 2 * size - 2
    for packages in reversed(bought):
        inside = int(packages[:items].sum())
        lengths[: items - inside] += 1  # coins are bought in the order of their value
        items = 2 * inside
    result = np.empty(size, np.int64)
    result[order] = lengths
    return [int(length) for length in result]


def rising_lengths(counts: NDArray[np.integer[Any]], limit: int = LIMITS[-1]) -> list[int]:
    """Lengths of a prefix code that never fall from one symbol to the next.

    Such a code needs no table of its symbols. Counts that rise are first averaged with their
    neighbours (pool adjacent violators). Where the symbols' probabilities fall, and counts rise by
    chance only, that changes the code little.

    Args:
        counts: [k], how often each symbol occurs.
        limit: longest codeword allowed, in bits.

    >>> rising_lengths(np.array([4, 1, 2, 1]))
    [1, 2, 3, 3]
    """
    pools: list[tuple[float, int]] = []
    for count in counts.tolist():
        total, size = float(count), 1
        while pools and pools[-1][0] * size < total * pools[-1][1]:
            before, width = pools.pop()
            total, size = total + before, size + width
        pools.append((total, size))
    level = np.repeat([total / size for total, size in pools], [size for _, size in pools])
    # Package-merge breaks ties by the symbol, so equal levels still get rising lengths.
    lengths = code_lengths((level[::-1] * 1024).astype(np.int64).tolist(), limit)
    return sorted(lengths)


@dataclass(frozen=True)
class Code:
    """A canonical code.

    Attributes:
        lengths: bits of each symbol's codeword, never falling.
        codewords: of each symbol, in its low `lengths[symbol]` bits.
        internal: internal nodes of the code tree at each depth below the limit.
    """

    lengths: tuple[int, ...]
    codewords: tuple[int, ...]
    internal: tuple[int, ...]


def canonical(lengths: Sequence[int], limit: int = LIMITS[-1]) -> Code:
    """The code with these lengths, which must form a complete code, never fall, and keep the limit.

    >>> code = canonical([1, 2, 3, 3])
    >>> [f"{word:0{bits}b}" for bits, word in zip(code.lengths, code.codewords)]
    ['1', '01', '001', '000']
    >>> code.internal
    (1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    """
    window = 1 << limit
    codewords = []
    for length in lengths:
        window -= 1 << limit - length
        codewords.append(window >> (limit - length))
    internal = [int(lengths[-1] > 0)]
    for depth in range(1, limit):
        internal.append(2 * internal[-1] - sum(length == depth for length in lengths))
    return Code(tuple(lengths), tuple(codewords), tuple(internal))


def code_of(symbols: NDArray[np.uint8], limit: int = LIMITS[-1]) -> Code:
    """The code for a segment with these symbols, uint8 [n], n at least 1."""
    return canonical(rising_lengths(np.bincount(symbols), limit), limit)


def about_bits(counts: NDArray[np.integer[Any]]) -> int:
    """`coded_bits` without a limit and with symbols in the best order; fast to compute."""
    heap = counts[counts > 0].tolist()
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heap[0]
        heapq.heapreplace(heap, both)
        total += both
    return total


def coded_bits(counts: NDArray[np.integer[Any]], limit: int = LIMITS[-1]) -> int:
    """Bits of a segment in which symbol s occurs counts[s] times; the code itself not counted."""
    return int(np.dot(counts, rising_lengths(counts, limit)))


@dataclass(frozen=True)
class Stream:
    """Several segments, coded.

    Attributes:
        op: the function that decodes it, "m" or "l".
        data: uint16 [W], the bits; the first one is the highest of the first word.
        internal: uint8 [K, limit], the codes, that of the last segment first.
        starts: [B], for each lane the bits from the start of the lane before it; the first is 0.
            For "m" uint16; for "l" uint8 or uint16, less the bits in `lanes`.
        tails: int32 [K], the words from each segment's start to the end, the last segment first.
        lanes: for "l" three arrays, int32 [K] each, the last segment first: the lanes from the
            segment's start to the end; the fewest bits of its full lanes; the bits from the start
            of the lane before it to its first lane.
    """

    op: str
    data: NDArray[np.uint16]
    internal: NDArray[np.uint8]
    starts: NDArray[np.uint16]
    tails: NDArray[np.int32]
    lanes: tuple[NDArray[np.int32], ...] = ()

    @property
    def lane(self) -> int:
        """Symbols in a lane."""
        return LANES[self.op]

    @property
    def segments(self) -> NDArray[np.int64]:
        """Row of each lane's segment in `internal` and `tails`, [B]."""
        return np.searchsorted(self.tails.reshape(-1), self.data.size - (self.positions >> 4))

    @property
    def positions(self) -> NDArray[np.int64]:
        """The bit each lane starts at, [B]."""
        steps = self.starts.reshape(-1).astype(np.int64)
        if self.lanes:
            tails, least, first = (array.reshape(-1).astype(np.int64) for array in self.lanes)
            if tails[-1] != steps.size or (np.diff(tails, prepend=0) <= 0).any():
                raise Prune2OnnxError(f"Huffman segments that do not divide {steps.size:,} lanes")
            added = np.repeat(least, np.diff(tails, prepend=0))[::-1].copy()
            added[-tails] = first
            steps += added
        return np.cumsum(steps)


def limit_for(counts: Sequence[NDArray[np.integer[Any]]]) -> int:
    """The longest codeword to allow: the lower limit where that adds almost no bits.

    Args:
        counts: of each segment, how often each symbol occurs.
    """
    low, high = (sum(coded_bits(count, limit) for count in counts) for limit in LIMITS)
    return LIMITS[low > _MOST_ADDED * high]


def encode(segments: Sequence[NDArray[np.uint8]], limit: int | None = None) -> Stream:
    """Codes segments of symbols, uint8 [n], n at least 1 each.

    Args:
        segments: the symbols of each.
        limit: longest codeword; by default that of `limit_for`.

    Raises:
        Prune2OnnxError: the stream would be longer than `MAX_BITS`.
    """
    data, codes, begins_of, words = [], [], [], []
    total = 0
    limit = limit or limit_for([np.bincount(symbols) for symbols in segments])
    for symbols in segments:
        code = code_of(symbols, limit)
        length_of = np.array(code.lengths, np.uint8)
        bits = length_of[symbols]
        ends = np.cumsum(bits, dtype=np.int64)
        part = _packed(np.array(code.codewords, np.uint64)[symbols], bits, ends)
        begins_of.append(WORD_BITS * total + ends - bits)
        words.append(total)
        total += part.size
        data.append(part)
        codes.append(code.internal)
    if WORD_BITS * total > MAX_BITS:
        raise Prune2OnnxError(f"{WORD_BITS * total:,} bits of codewords, at most {MAX_BITS:,} fit")
    op = "l" if WORD_BITS * total > JUMP_BITS else "m"
    begins_of = [begins[:: LANES[op]] for begins in begins_of]
    steps = np.diff(np.concatenate(begins_of), prepend=0)
    lanes: tuple[NDArray[np.int32], ...] = ()
    if op == "l":
        sizes = np.array([begins.size for begins in begins_of])
        heads = np.cumsum(sizes) - sizes
        least = [int(np.diff(begins).min(initial=MAX_BITS)) for begins in begins_of]
        least = [0 if bits == MAX_BITS else bits for bits in least]
        first = steps[heads]
        steps = steps - np.repeat(least, sizes)
        steps[heads] = 0
        lanes = tuple(
            np.asarray(array)[::-1].astype(np.int32) for array in (steps.size - heads, least, first)
        )
    narrow = np.uint8 if op == "l" and steps.max() < 256 else np.uint16
    return Stream(
        op,
        np.concatenate(data),
        np.array(codes[::-1], np.uint8),
        steps.astype(narrow),
        (total - np.array(words[::-1])).astype(np.int32),
        lanes,
    )


def _packed(
    words: NDArray[np.uint64], bits: NDArray[np.uint8], ends: NDArray[np.int64]
) -> NDArray[np.uint16]:
    """Joins codewords into 16-bit words, at least one.

    Codewords that start in the same 32-bit unit are shifted to their position in a 64-bit word and
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
    return halves[: -(-total // WORD_BITS)]


def decode(stream: Stream) -> NDArray[np.uint8]:
    """Rebuilds the symbols, uint8 [B * lane]: lane after lane.

    A segment's last lane is filled up with symbols to be ignored.

    Raises:
        Prune2OnnxError: impossible code lengths, tails that do not fall, a lane past the end.
    """
    data = stream.data.reshape(-1)
    tails = stream.tails.reshape(-1).astype(np.int64)
    internal = stream.internal
    limit = internal.shape[1]
    if not tails.size or tails.size != len(internal):
        raise Prune2OnnxError(f"{tails.size} Huffman segments, {len(internal)} codes")
    if tails[-1] != data.size or (np.diff(tails, prepend=0) <= 0).any():
        raise Prune2OnnxError(f"Huffman segments that do not divide {data.size:,} words")
    length_of, symbol_of = tables(internal)
    position = stream.positions
    inside = position.size and 0 <= position.min() <= position.max() < WORD_BITS * data.size
    if not inside or position[0]:
        raise Prune2OnnxError("a lane starts past the end of the stream")
    table = (symbol_of << 4 | length_of).reshape(-1)
    offset = (stream.segments << limit).astype(np.int32)
    words = data.astype(np.int32)
    following = np.append(words[1:], 0)
    # Filling symbols may run past the end; in the graph they wrap around, and are ignored.
    pair = np.append(words << limit | following >> WORD_BITS - limit, 0)
    last = np.int32(WORD_BITS * data.size)
    position = position.astype(np.int32)
    symbols = np.empty((stream.lane, position.size), np.uint8)
    for step in range(stream.lane):
        window = pair[position >> 4] >> WORD_BITS - (position & 15) & (1 << limit) - 1
        entry = table[window + offset]
        symbols[step] = entry >> 4
        position = np.minimum(position + (entry & 15), last)
    return np.ascontiguousarray(symbols.T).reshape(-1)


def tables(internal: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Length and symbol of the codeword that each window of `limit` bits starts with.

    Args:
        internal: uint8 [K, limit].

    Returns:
        Both int32 [K, 2^limit].

    Raises:
        Prune2OnnxError: no complete code has these internal nodes.
    """
    limit = internal.shape[1]
    lengths = np.empty((len(internal), 1 << limit), np.int32)
    symbols = np.empty((len(internal), 1 << limit), np.int32)
    for row, counts in enumerate(internal.astype(int).tolist()):
        nodes = [*counts, 0]
        leaves = [1 - nodes[0]]
        leaves += [2 * above - here for above, here in itertools.pairwise(nodes)]
        if min(leaves) < 0 or nodes[0] > 1:
            raise Prune2OnnxError(f"impossible code lengths: internal nodes {counts}")
        length = np.repeat(np.arange(limit, -1, -1), leaves[::-1])
        windows = (1 << limit) >> length
        lengths[row] = np.repeat(length, windows)
        symbols[row] = np.repeat(np.arange(length.size)[::-1], windows)
    return lengths, symbols
