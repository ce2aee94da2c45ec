"""The ONNX functions that decode a Huffman stream; `huffman` describes the stream."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from onnx import FunctionProto, TensorProto

from prune2onnx.packing.codecs.function import Body
from prune2onnx.packing.codecs.huffman import DOUBLINGS, LANES, WORD, WORD_BITS
from prune2onnx.packing.codecs.work import mapped

_LEAPS = 8
"""Leaps in the function `q`, which `m` calls several times."""

_STEPS = 8
"""Steps in the function `r`, which `l` calls several times."""


@functools.cache
def functions(op: str, opset: int, limit: int) -> tuple[FunctionProto, ...]:
    """The ONNX functions that decode a stream: `q` and `m`, or `r` and `l`.

    `m` and `l` take data (uint16 [W, 1]), internal (uint8 [K, limit, 1]), starts ([B]), tails and
    base (int32 [K, 1] both), `l` also the three of `Stream.lanes` (int32 [K]). They return symbols
    plus the base of their segment, int32 [lane B], lane after lane. Symbols that only fill a lane
    are to be ignored.
    """
    return _jumping(opset, limit) if op == "m" else _stepping(opset, limit)


@dataclass(frozen=True)
class _Head:
    """What both functions compute first; names of values in the body."""

    pair: str  # int32 [W, 1]: a word and 12 bits of its follower
    table: str  # int32 [W, 1]: the index at which the table of the word's code begins
    length: str  # int32 [K 2^limit]
    symbol: str  # int32 [K 2^limit]


def _head(body: Body, limit: int) -> _Head:
    data, internal, _, tails, base, *_ = body.inputs
    zero, one, full = body.constant(0), body.constant(1), body.constant(1 << limit)

    # Indices are counted from the end (GatherElements takes -N to N - 1), here and below: one past
    # the end is then an index from the front, and needs neither padding nor a clamp.
    word = body.node("Cast", data, to=TensorProto.INT32)
    to_end = body.node("CumSum", body.node("Clip", word, one, one), zero, reverse=1)
    following = body.node("GatherElements", word, body.node("Sub", one, to_end))
    high = body.node("Mul", word, full)
    low = body.node("Div", following, body.constant(WORD >> limit))
    pair = body.node("Add", high, low)

    # A mark at each segment's first word; the number of marks after a word gives its segment.
    none = body.node("Clip", word, zero, zero)
    tail = body.node("Neg", tails)
    mark = body.node("Clip", tail, full, full)
    marked = body.node("ScatterElements", none, tail, mark)
    table = body.node("CumSum", marked, zero, reverse=1, exclusive=1)

    # Length and symbol for each window of each code, as in `huffman.tables`.
    spans = body.constant([1 << limit - depth for depth in range(limit)], (limit, 1))
    bounds = body.node("Mul", body.node("Cast", internal, to=TensorProto.INT32), spans)
    inside = body.node("Less", body.node("Range", zero, full, one), bounds)
    inside = body.node("Cast", inside, to=TensorProto.INT32)
    length = body.node("ReduceSum", inside, body.indices(1), keepdims=0)
    weight = body.node("Pow", body.constant(2), length)
    after = body.node("CumSum", weight, one, exclusive=1, reverse=1)
    symbol = body.node("Add", body.node("Div", after, full), base)
    flat = body.indices(-1)
    return _Head(
        pair,
        table,
        body.node("Reshape", length, flat),
        body.node("Reshape", symbol, flat),
    )


def work(
    op: str, words: int, lanes: int, codes: int, limit: int
) -> tuple[int, Counter[str], Counter[str], int]:
    """What a runtime does for a stream of so many words, lanes and codes, as `Work.add` has it.

    Returns:
        The number of nodes; operator -> bytes of its results; operator -> bytes of its operands;
        bytes of operands that are `mapped`. What is of the size of a lane's constants is left out.
    """
    word, window = 4 * words, 4 * codes << limit
    symbol = 4 * LANES[op] * lanes
    nodes = 33
    made = Counter(
        Add=word + window,
        Cast=word + limit * window,
        Clip=2 * word,
        CumSum=2 * word + window,
        Div=word + window,
        GatherElements=word + symbol,
        Less=limit * window // 4,
        Mul=word,
        Pow=window,
        ReduceSum=window,
        Reshape=2 * window + symbol,
        ScatterElements=word,
        Sub=word,
        Transpose=symbol,
    )
    read = made + Counter(Add=word, GatherElements=word + window, ReduceSum=(limit - 1) * window)
    read["Cast"] -= word // 2 + 3 * limit * window // 4
    if op == "m":
        bit, leaps = WORD_BITS * word, LANES["m"] >> DOUBLINGS
        nodes += leaps + 3 * DOUBLINGS + 11
        more = Counter(Div=bit, Mod=bit, Add=bit, Clip=bit, CumSum=bit, Sub=bit)
        more.update(Reshape=bit + symbol, GatherElements=(1 + DOUBLINGS) * bit + 2 * symbol)
        more.update(Concat=2 * symbol)
        made.update(more)
        read.update(more)
        # each leap reads all jumps, and so does each doubling, when it is made and when it is used
        read.update(GatherElements=(leaps + 2 * DOUBLINGS + 1) * bit, Sub=bit, Div=word - bit)
    else:
        nodes += 9 * LANES["l"] + LANES["l"] // _STEPS + 13
        more = Counter(Div=2 * symbol, Mod=2 * symbol, Add=2 * symbol, GatherElements=3 * symbol)
        more.update(Concat=2 * symbol + word, Reshape=2 * word + symbol)
        made.update(more)
        read.update(more)
        # each step reads all words, and all lengths of codewords
        read.update(GatherElements=LANES["l"] * (word + window), Div=symbol, Add=2 * symbol)
    steps = LANES["l"] + 12 if op == "l" else 12
    return nodes, made, read, mapped([word] * steps + [symbol] * 4)


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
    shift = m.constant([WORD >> offset for offset in range(WORD_BITS)])
    window = m.node("Mod", m.node("Div", head.pair, shift), m.constant(1 << limit))
    flat = m.indices(-1)
    index = m.node("Reshape", m.node("Add", window, head.table), flat)

    # J(p) = p + length, then over 2, 4, 8, 16 symbols.
    one = m.constant(1)
    to_end = m.node("CumSum", m.node("Clip", index, one, one), m.constant(0), reverse=1)
    jumps = [m.node("Sub", m.node("GatherElements", head.length, index), to_end)]
    for _ in range(DOUBLINGS):
        jumps.append(m.node("GatherElements", jumps[-1], jumps[-1]))

    # Every 16th symbol of each lane by leaps, then the symbols halfway between, and so on.
    reached = m.node("CumSum", m.node("Cast", m.inputs[2], to=TensorProto.INT32), m.constant(0))
    found = []
    for _ in range(LANES["m"] >> DOUBLINGS, 0, -_LEAPS):
        several, reached = m.call("q", jumps[-1], reached, outputs=2)
        found.append(several)
    positions = m.node("Concat", *found, axis=0)
    for jump in jumps[-2::-1]:
        between = m.node("GatherElements", jump, positions)
        positions = m.node("Concat", positions, between, axis=0)
    # The axes are now the bits of a symbol's index in its lane, the lowest first, then the lane.
    axes = [2] * DOUBLINGS + [LANES["m"] >> DOUBLINGS, -1]
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
    # Bits from the lane before to each lane: the fewest of its segment plus the stored ones, or
    # a number of its own where a segment starts. Marks count segments as in the head.
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
    # A lane's table is that of its first word. Filling symbols may run past the end by the bits of
    # a lane, so zeros are appended.
    first = b.node("Div", reached, b.constant(WORD_BITS))
    flat = b.indices(-1)
    table = b.node("GatherElements", b.node("Reshape", head.table, flat), first)
    past = b.node("Expand", b.constant(0), b.indices(lane * limit // WORD_BITS))
    pairs = b.node("Concat", b.node("Reshape", head.pair, flat), past, axis=0)
    shift = b.constant([WORD >> offset for offset in range(WORD_BITS)])
    given = [pairs, head.length, shift, table, b.constant(WORD_BITS), b.constant(1 << limit)]
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
