"""Canonical Huffman codes of at most 12 bits: construction, encoding, decoding, ONNX functions.

Construction is package-merge (Larmore & Hirschberg, "A fast algorithm for optimal length-limited
Huffman codes", JACM 37(3), 1990), so no prefix code limited to 12 bits is shorter. Codewords are
canonical (Schwartz & Kallick, "Generating a canonical prefix encoding", CACM 7(3), 1964): they
follow from the code lengths alone. Symbols are numbered so that lengths never fall as the number
rises; longer codewords come first in numerical order. At each depth the internal nodes of the code
tree then stand left of the leaves, and a code is told by as many bytes as its limit has bits, the
number of internal nodes at each depth d < limit: a window `w` of limit bits that starts with a
codeword has length

    length(w) = #{d : (w >> (limit - d)) < internal[d]},

and it means the number of codewords that are numerically higher.

One stream holds several **segments**, each with a code of its own, each starting at a 16-bit word.
The segments of a whole model share one stream, because a call that decodes costs the runtime
milliseconds, whatever it decodes.

A segment is cut into **lanes** of so many symbols, whose starts are stored, and which are decoded
side by side. Two functions do so without a loop, which onnxruntime could not fold:

- `m`, for short streams, jumps pointers in lanes of 512: with J(p) the position after the codeword
  that starts at bit p, `J = J[J]` four times jumps over 16 symbols, so that 32 leaps reach every
  16th symbol of each lane, and the others follow by halves. About a hundred nodes, a dozen passes
  over one int32 a *bit*.
- `l`, for long ones, takes 128 steps, each one symbol of every lane: some twelve hundred nodes,
  thirteen passes over one int32 a *symbol*.

Knows sequences of symbols; knows nothing of weights.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, TensorProto

from prune2onnx.codecs.function import Body
from prune2onnx.errors import Prune2OnnxError

LIMITS = (10, 12)
"""Longest codeword of a stream, in bits. 12: a word of 16 bits and 12 of the next fit an int32. 10,
where that costs next to nothing: tables of 1024 windows a segment are made in a quarter of the
time."""

_WORTH_TIME = 1.002
"""The bits that the lower limit may cost."""

LANES = {"m": 512, "l": 128}
"""The functions that decode a stream, and the symbols in a lane of theirs."""

JUMP_BITS = 1 << 20
"""Longest stream that is decoded by pointer jumping: there the steps' nodes cost as much time."""

MAX_BITS = 1 << 30
"""Longest stream: bit positions are int32."""

_DOUBLINGS = 4
"""Times that the jumps of `m` are doubled: each is a pass over one int32 a bit, and halves the
leaps, which are short nodes."""

_LEAPS = 8
"""Leaps that one function of `m` takes; the rest are calls of it."""

_WORD_BITS = 16
_WORD = 1 << _WORD_BITS
_STEPS = 8
"""Steps that one function of `l` takes; the rest are calls of it."""


def code_lengths(counts: Sequence[int], limit: int = LIMITS[-1]) -> list[int]:
    """Lengths of an optimal prefix code with no codeword longer than `limit`.

    Package-merge: a coin of denomination 2^-d and value `count` for every symbol and depth d;
    buying n - 1 whole units as cheaply as possible buys each symbol as many coins as its codeword
    has bits.

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

    Such a code needs no table of its symbols. Counts that rise are first levelled with their
    neighbours (pool adjacent violators), which changes the code little where counts fall in truth
    and rise by chance.

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
    """The code with these lengths, which must be complete and never fall; none is above the limit.

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
    """What `coded_bits` is without the limit of 12 bits and with symbols in any order; quickly."""
    heap = counts[counts > 0].tolist()
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heap[0]
        heapq.heapreplace(heap, both)
        total += both
    return total


def coded_bits(counts: NDArray[np.integer[Any]], limit: int = LIMITS[-1]) -> int:
    """Bits of a segment in which symbol s occurs counts[s] times, without its code."""
    return int(np.dot(counts, rising_lengths(counts, limit)))


@dataclass(frozen=True)
class Stream:
    """Several segments, coded.

    Attributes:
        op: the function that decodes it, "m" or "l".
        data: uint16 [W], the bits, the first one the highest of the first word.
        internal: uint8 [K, limit], the codes, that of the last segment first.
        starts: [B], the bits from the start of the lane before to each lane's; the first is 0. For
            "m" uint16; for "l" uint8 or uint16, less what `lanes` tells.
        tails: int32 [K], the words from each segment's start to the end, of the last segment first.
        lanes: for "l", of each segment, the last one first, int32 [K] each: the lanes from its
            start to the end; the fewest bits of a full lane; the bits from the start of the lane
            before to that of its first lane.
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
                raise Prune2OnnxError(f"Huffman segments that do not part {steps.size:,} lanes")
            added = np.repeat(least, np.diff(tails, prepend=0))[::-1].copy()
            added[-tails] = first
            steps += added
        return np.cumsum(steps)


def limit_for(counts: Sequence[NDArray[np.integer[Any]]]) -> int:
    """The longest codeword to allow: the lower limit where that costs next to nothing.

    Args:
        counts: of each segment, how often each symbol occurs.
    """
    low, high = (sum(coded_bits(count, limit) for count in counts) for limit in LIMITS)
    return LIMITS[low > _WORTH_TIME * high]


def encode(segments: Sequence[NDArray[np.uint8]], limit: int | None = None) -> Stream:
    """Codes segments of symbols, uint8 [n], n at least 1 each.

    Args:
        segments: the symbols of each.
        limit: longest codeword; by default that of `limit_for`.

    Raises:
        Prune2OnnxError: the stream would be longer than bit positions can tell.
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
        begins_of.append(_WORD_BITS * total + ends - bits)
        words.append(total)
        total += part.size
        data.append(part)
        codes.append(code.internal)
    if _WORD_BITS * total > MAX_BITS:
        raise Prune2OnnxError(f"{_WORD_BITS * total:,} bits of codewords, at most {MAX_BITS:,} fit")
    op = "l" if _WORD_BITS * total > JUMP_BITS else "m"
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


def decode(stream: Stream) -> NDArray[np.uint8]:
    """Rebuilds the symbols, uint8 [B * lane]: lane after lane.

    A segment's last lane is filled up with symbols that mean nothing.

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
        raise Prune2OnnxError(f"Huffman segments that do not part a stream of {data.size:,} words")
    length_of, symbol_of = tables(internal)
    position = stream.positions
    inside = position.size and 0 <= position.min() <= position.max() < _WORD_BITS * data.size
    if not inside or position[0]:
        raise Prune2OnnxError("a lane starts past the end of the stream")
    table = (symbol_of << 4 | length_of).reshape(-1)
    offset = (stream.segments << limit).astype(np.int32)
    words = data.astype(np.int32)
    following = np.append(words[1:], 0)
    # Filling symbols may run past the end; in the graph they wrap around, and nobody reads them.
    pair = np.append(words << limit | following >> _WORD_BITS - limit, 0)
    last = np.int32(_WORD_BITS * data.size)
    position = position.astype(np.int32)
    symbols = np.empty((stream.lane, position.size), np.uint8)
    for step in range(stream.lane):
        window = pair[position >> 4] >> _WORD_BITS - (position & 15) & (1 << limit) - 1
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


def work(op: str, words: int, lanes: int, codes: int, limit: int) -> tuple[int, int]:
    """Operators, and bytes of their results, when a runtime decodes a stream."""
    tables = codes * (5 * limit + 28) << limit
    if op == "m":
        return 120, tables + 4 * _WORD_BITS * words * (8 + _DOUBLINGS)
    return 100 + 9 * LANES[op], tables + 4 * LANES[op] * lanes * 13


@functools.cache
def functions(op: str, opset: int, limit: int) -> tuple[FunctionProto, ...]:
    """The ONNX functions that decode a stream: `q` and `m`, or `r` and `l`.

    `m` and `l` take data (uint16 [W, 1]), internal (uint8 [K, limit, 1]), starts ([B]), tails and
    base (int32 [K, 1] both), `l` also the three of `Stream.lanes` (int32 [K]), and return int32
    [lane B], lane after lane: symbols, base of their segment added. Symbols that only fill a lane
    mean nothing.
    """
    return _jumping(opset, limit) if op == "m" else _stepping(opset, limit)


@dataclass(frozen=True)
class _Head:
    """What both functions work out first; names of values in the body."""

    pair: str  # int32 [W, 1]: a word and 12 bits of its follower
    table: str  # int32 [W, 1]: where the table of the word's code begins
    length: str  # int32 [K 2^limit]
    symbol: str  # int32 [K 2^limit]


def _head(body: Body, limit: int) -> _Head:
    data, internal, _, tails, base, *_ = body.inputs
    zero, one, full = body.constant(0), body.constant(1), body.constant(1 << limit)

    # Indices are counted from the end (GatherElements takes -N to N - 1), here and below: one step
    # past the end is then an index from the front, and needs neither padding nor a clamp.
    word = body.node("Cast", data, to=TensorProto.INT32)
    to_end = body.node("CumSum", body.node("Clip", word, one, one), zero, reverse=1)
    following = body.node("GatherElements", word, body.node("Sub", one, to_end))
    high = body.node("Mul", word, full)
    low = body.node("Div", following, body.constant(_WORD >> limit))
    pair = body.node("Add", high, low)

    # A mark at each segment's first word; the marks after a word count the segments after it.
    none = body.node("Clip", word, zero, zero)
    tail = body.node("Neg", tails)
    mark = body.node("Clip", tail, full, full)
    marked = body.node("ScatterElements", none, tail, mark)
    table = body.node("CumSum", marked, zero, reverse=1, exclusive=1)

    # Length and symbol for each window of each code, as `tables` does.
    spans = body.constant([1 << limit - depth for depth in range(limit)], (limit, 1))
    bounds = body.node("Mul", body.node("Cast", internal, to=TensorProto.INT32), spans)
    inside = body.node("Less", body.node("Range", zero, full, one), bounds)
    inside = body.node("Cast", inside, to=TensorProto.INT32)
    length = body.node("ReduceSum", inside, body.indices(1), keepdims=0)
    share = body.node("Pow", body.constant(2), length)
    after = body.node("CumSum", share, one, exclusive=1, reverse=1)
    symbol = body.node("Add", body.node("Div", after, full), base)
    flat = body.indices(-1)
    return _Head(
        pair,
        table,
        body.node("Reshape", length, flat),
        body.node("Reshape", symbol, flat),
    )


def _jumping(opset: int, limit: int) -> tuple[FunctionProto, ...]:
    # Leaps with the same jumps, one after the other.
    q = Body("q", inputs=2)
    leap, reached = q.inputs
    visited = []
    for _ in range(_LEAPS):
        visited.append(reached)
        reached = q.node("GatherElements", leap, reached)
    leaps = q.function(q.node("Concat", *visited, axis=0), reached, opset=opset)

    m = Body("m", inputs=5)
    head = _head(m, limit)
    # The window at each bit position, int32 [16 W], and the table it is looked up in.
    shift = m.constant([_WORD >> offset for offset in range(_WORD_BITS)])
    window = m.node("Mod", m.node("Div", head.pair, shift), m.constant(1 << limit))
    flat = m.indices(-1)
    index = m.node("Reshape", m.node("Add", window, head.table), flat)

    # J(p) = p + length, then over 2, 4, 8, 16 symbols.
    one = m.constant(1)
    to_end = m.node("CumSum", m.node("Clip", index, one, one), m.constant(0), reverse=1)
    jumps = [m.node("Sub", m.node("GatherElements", head.length, index), to_end)]
    for _ in range(_DOUBLINGS):
        jumps.append(m.node("GatherElements", jumps[-1], jumps[-1]))

    # Every 16th symbol of each lane by leaps, then those half way between, and so on.
    reached = m.node("CumSum", m.node("Cast", m.inputs[2], to=TensorProto.INT32), m.constant(0))
    found = []
    for _ in range(LANES["m"] >> _DOUBLINGS, 0, -_LEAPS):
        several, reached = m.call("q", jumps[-1], reached, outputs=2)
        found.append(several)
    positions = m.node("Concat", *found, axis=0)
    for jump in jumps[-2::-1]:
        between = m.node("GatherElements", jump, positions)
        positions = m.node("Concat", positions, between, axis=0)
    # The axes are now the bits of a symbol's number in its lane, the lowest first, then the lane.
    axes = [2] * _DOUBLINGS + [LANES["m"] >> _DOUBLINGS, -1]
    lanes = m.node("Transpose", m.node("Reshape", positions, m.indices(*axes)))
    found_index = m.node("GatherElements", index, m.node("Reshape", lanes, flat))
    result = m.node("GatherElements", head.symbol, found_index)
    return leaps, m.function(result, opset=opset)


def _stepping(opset: int, limit: int) -> tuple[FunctionProto, ...]:
    # A few symbols of every lane: their indices in the tables, and the position after them.
    r = Body("r", inputs=7)
    pair, length, shift, table, word_bits, full, position = r.inputs
    found = []
    for _ in range(_STEPS):
        two = r.node("GatherElements", pair, r.node("Div", position, word_bits))
        offset = r.node("GatherElements", shift, r.node("Mod", position, word_bits))
        window = r.node("Mod", r.node("Div", two, offset), full)
        found.append(r.node("Add", window, table))
        position = r.node("Add", position, r.node("GatherElements", length, found[-1]))
    several = r.node("Concat", *found, axis=0)

    b = Body("l", inputs=8)
    lane = LANES["l"]
    head = _head(b, limit)
    zero, one = b.constant(0), b.constant(1)
    # From the lane before to each lane: the fewest bits of its segment and what is stored, or
    # another number where a segment starts. Marks count segments as in the head.
    stored = b.node("Cast", b.inputs[2], to=TensorProto.INT32)
    heads = b.node("Neg", b.inputs[5])
    marked = b.node(
        "ScatterElements",
        b.node("Clip", stored, zero, zero),
        heads,
        b.node("Clip", heads, one, one),
    )
    segment = b.node("CumSum", marked, zero, reverse=1, exclusive=1)
    least = b.node("GatherElements", b.inputs[6], segment)
    least = b.node("ScatterElements", least, heads, b.inputs[7])
    reached = b.node("CumSum", b.node("Add", least, stored), zero)
    # A lane's table is that of its first word. Positions of filling symbols may pass the end by
    # the bits of a lane: zeros stand there.
    first = b.node("Div", reached, b.constant(_WORD_BITS))
    flat = b.indices(-1)
    table = b.node("GatherElements", b.node("Reshape", head.table, flat), first)
    past = b.node("Expand", b.constant(0), b.indices(lane * limit // _WORD_BITS))
    pairs = b.node("Concat", b.node("Reshape", head.pair, flat), past, axis=0)
    shift = b.constant([_WORD >> offset for offset in range(_WORD_BITS)])
    given = [pairs, head.length, shift, table, b.constant(_WORD_BITS), b.constant(1 << limit)]
    found = []
    for _ in range(lane // _STEPS):
        symbols, reached = b.call("r", *given, reached, outputs=2)
        found.append(symbols)
    lanes = b.node("Reshape", b.node("Concat", *found, axis=0), b.indices(lane, -1))
    lanes = b.node("Reshape", b.node("Transpose", lanes), flat)
    result = b.node("GatherElements", head.symbol, lanes)
    return (
        r.function(several, position, opset=opset),
        b.function(result, opset=opset),
    )
