"""The functions of staged decoding: gates, words, and what is made of them, one call each.

Each is called for many pieces of weights, so a piece costs a few calls. A call's inputs are streams
and values of other calls; constants stand inside.

**Gates.** onnxruntime keeps every value that it folds until the pass ends, and runs up to ten
passes. A gate is a zero that becomes known one pass later than the one before it; whatever takes it
waits for that pass. `S[j+1] = Abs(Shape(Scan(Expand(0, S[j]))))`, where the Scan copies its input:
onnxruntime learns the shape of what a node with a body gives only between two passes. So memory is
freed in between. A runtime that folds otherwise needs more memory, and gives the same weights.

**Places of escapes.** NonZero finds them. From 1.27 on onnxruntime folds only what has a known
shape. So NonZero is the last node of its function, and the graph declares the shape of its output
in `value_info` (which a function cannot).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from onnx import FunctionProto, TensorProto, helper

from prune2onnx.packing.codecs.function import Body
from prune2onnx.packing.codecs.staged.words import FIELDS, Level

MOST_GATES = 8
"""With ten a Conv and its BatchNormalization stayed apart, with twelve decoder nodes were left."""

GATES = "z"
CONSTANTS = "y"
JOIN = "j"
END = "k"
RESOLVE = ("e0", "e1")
"""The functions that put escapes in their places, without low bits of their own and with them."""

_U8, _I32, _I64 = TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64


def gates(count: int, opset: int) -> FunctionProto:
    """z() -> zeros, int64 [1] each: each becomes known a pass after the one before."""
    body = Body(GATES)
    nothing = body.node("Constant", value=TensorProto(dims=[1], data_type=_U8, int32_data=[0]))
    one = state = body.indices(1)
    zeros = []
    for _ in range(count):
        wide = body.node("Expand", nothing, state)
        inside = [body.fresh(), body.fresh()]
        given, made = (helper.make_tensor_value_info(name, _U8, []) for name in inside)
        identity = helper.make_node("Identity", inside[:1], inside[1:])
        copy = helper.make_graph([identity], "b", [given], [made])
        known = body.node("Shape", body.node("Scan", wide, body=copy, num_scan_inputs=1))
        state = body.node("Abs", known)
        zeros.append(body.node("Sub", state, one))
    return body.function(*zeros, opset=opset)


def constants(opset: int) -> FunctionProto:
    """y(gate) -> 0 [1], 4 [1] and 0 to 7 [8, 1], uint8, which are known when the gate is."""
    body = Body(CONSTANTS, 1)
    (gate,) = body.inputs
    wholes = [body.indices(4), body.constant(list(range(8)), (8, 1), _I64)]
    late = [gate, *(body.node("Add", whole, gate) for whole in wholes)]
    return body.function(*(body.node("Cast", one, to=_U8) for one in late), opset=opset)


def level_name(level: Level) -> str:
    """The function of a level's words."""
    return f"d{level.bits}" if level.is_last else f"d{level.bits}{level.low}"


def level(level: Level, opset: int) -> FunctionProto:
    """d(constants..., fields...) -> words, uint8 [n], and, but for the last, places of escapes.

    The places are int64 [1, e]. Each field needs its constant, one of `constants`.
    """
    widths = FIELDS[level.bits]
    body = Body(level_name(level), 2 * len(widths))
    words, below = "", 0
    late, fields = body.inputs[: len(widths)], body.inputs[len(widths) :]
    for wait, field, width in zip(late, fields, widths, strict=True):
        part = _field(body, wait, field, width)
        if below:
            part = body.node("BitwiseOr", words, _shifted(body, part, below, "LEFT"))
        words, below = part, below + width
    if level.is_last:
        return body.function(words, opset=opset)
    digits = _shifted(body, words, level.low, "RIGHT") if level.low else words
    escaped = body.node("Not", body.node("Cast", digits, to=TensorProto.BOOL))
    return body.function(words, body.node("NonZero", escaped), opset=opset)


def _shifted(body: Body, value: str, by: int, direction: str) -> str:
    amount = body.constant(by, element_type=_U8)
    return body.node("BitShift", value, amount, direction=direction)


def _field(body: Body, late: str, stored: str, width: int) -> str:
    """The values of a field, uint8 [n]."""
    if width == 8:
        return body.node("BitShift", stored, late, direction="RIGHT")
    if width == 1:
        row = body.node("Reshape", stored, body.indices(1, -1))
        rows = body.node("BitShift", row, late, direction="LEFT")
        return body.node("Reshape", _shifted(body, rows, 7, "RIGHT"), body.indices(-1))
    halves = [body.node("BitShift", stored, late, direction=way) for way in ("RIGHT", "LEFT")]
    halves[1] = _shifted(body, halves[1], 4, "RIGHT")
    values = body.node("Concat", *halves, axis=0)
    if width == 4:
        return values
    lower = _shifted(body, _shifted(body, values, 6, "LEFT"), 6, "RIGHT")
    return body.node("Concat", _shifted(body, values, 2, "RIGHT"), lower, axis=0)


def resolve(low: bool, opset: int) -> FunctionProto:
    """e(words, places, next level's words, table) -> words without escapes, uint8 [n].

    Args:
        low: whether escapes have low bits of their own.
        opset: of the model.
    """
    body = Body(RESOLVE[low], 4)
    words, places, following, table = body.inputs
    flat = body.node("Reshape", places, body.indices(-1))
    own = body.node("Slice", following, body.indices(0), body.node("Shape", flat))
    upper = body.node("GatherElements", table, body.node("Cast", own, to=_I32))
    if low:
        own = body.node("GatherElements", words, flat)
        upper = body.node("BitwiseOr", upper, own)
    return body.function(body.node("ScatterElements", words, flat, upper), opset=opset)


def look_up(opset: int) -> FunctionProto:
    """c(words, count, table) -> values [count]."""
    body = Body("c", 3)
    words, count, table = body.inputs
    return body.function(_looked_up(body, words, count, table), opset=opset)


def _looked_up(body: Body, words: str, count: str, table: str) -> str:
    return body.node("GatherElements", table, _index(body, words, count))


def _index(body: Body, words: str, count: str) -> str:
    own = body.node("Slice", words, body.indices(0), count)
    return body.node("Cast", own, to=_I32)


def matrix(opset: int, target: int) -> FunctionProto:
    """t(words, count, shape, table, wide) -> a matrix, in the type `target`, unless it is 0.

    The table is [rows, t], or [1, t] and expanded to the shape `wide`: each row of the matrix has
    one, so that looking up gives the matrix, which else takes three more copies.
    """
    body = Body("t" + (f"{target}" if target else ""), 5)
    words, count, shape, table, wide = body.inputs
    value = _in_rows(body, words, count, shape, table, wide)
    if target:
        value = body.node("Cast", value, to=target)
    return body.function(value, opset=opset)


def _in_rows(body: Body, words: str, count: str, shape: str, table: str, wide: str) -> str:
    own = body.node("Slice", words, body.indices(0), count)
    index = body.node("Cast", body.node("Reshape", own, shape), to=_I32)
    return body.node("GatherElements", body.node("Expand", table, wide), index, axis=1)


def float_matrix(short: bool, target: int, opset: int) -> FunctionProto:
    """u(zero, words, count, shape, units, wide, upper, table, wide[, gate, rows, lower]) -> floats.

    As `floats` and `short_floats`, for matrices, as in `matrix`; name v if short.
    """
    name = ("v" if short else "u") + (f"{target}" if target else "")
    body = Body(name, 9 if short else 12)
    zero, words, count, shape, units, wide, upper, table, wider, *lower = body.inputs
    index = _late(body, zero, upper, _I32)
    whole = body.node("GatherElements", body.node("Expand", table, wider), index, axis=1)
    if lower:
        own = body.node("Cast", body.node("Slice", lower[2], *lower[:2]), to=TensorProto.FLOAT)
        whole = body.node("Add", whole, own)
    unit = _in_rows(body, words, count, shape, units, wide)
    value = body.node("Mul", whole, unit)
    if target:
        value = body.node("Cast", value, to=target)
    return body.function(value, opset=opset)


def floats(opset: int) -> FunctionProto:
    """p(zero, words, count, units, upper, table, gate, lower) -> (table[upper] + lower) * unit."""
    body = Body("p", 8)
    zero, words, count, units, upper, table, gate, lower = body.inputs
    own = body.node("Slice", lower, gate, count)
    whole = _mantissa(body, zero, upper, table)
    whole = body.node("Add", whole, body.node("Cast", own, to=TensorProto.FLOAT))
    unit = _looked_up(body, words, count, units)
    return body.function(body.node("Mul", whole, unit), opset=opset)


def short_floats(opset: int) -> FunctionProto:
    """b(zero, words, count, units, upper, table) -> table[upper] * unit, float32."""
    body = Body("b", 6)
    zero, words, count, units, upper, table = body.inputs
    unit = _looked_up(body, words, count, units)
    return body.function(body.node("Mul", _mantissa(body, zero, upper, table), unit), opset=opset)


def halves(opset: int) -> FunctionProto:
    """h(zero, words, count, firsts, units, lower) -> first + lower * unit, float32."""
    body = Body("h", 6)
    zero, words, count, firsts, units, lower = body.inputs
    index = _index(body, words, count)
    first, unit = (body.node("GatherElements", table, index) for table in (firsts, units))
    added = body.node("Mul", _late(body, zero, lower, TensorProto.FLOAT), unit)
    return body.function(body.node("Add", first, added), opset=opset)


def _mantissa(body: Body, zero: str, upper: str, table: str) -> str:
    return body.node("GatherElements", table, _late(body, zero, upper, _I32))


def _late(body: Body, zero: str, stored: str, to: int) -> str:
    """Stored bytes in another type, which wait for a zero."""
    return body.node("Cast", body.node("BitShift", stored, zero, direction="RIGHT"), to=to)


def raw(target: int, opset: int) -> FunctionProto:
    """r(gate, count, stored) -> the first rows, which are all, in another type."""
    body = Body(f"r{target}", 3)
    gate, count, stored = body.inputs
    own = body.node("Slice", stored, gate, count)
    return body.function(body.node("Cast", own, to=target), opset=opset)


def patched(opset: int) -> FunctionProto:
    """x(values, places, own) -> values with these in their places."""
    body = Body("x", 3)
    return body.function(body.node("ScatterElements", *body.inputs), opset=opset)


def low_name(bits: int) -> str:
    """The function of the low bits of gaps."""
    return f"g{bits}"


def places(bits: int, opset: int) -> FunctionProto:
    """g(words, count, steps, constants..., fields...) -> where entries are, int32 [count].

    Args:
        bits: of a step that are stored as they are, below what a word stands for.
        opset: of the model.
    """
    widths = FIELDS[bits] if bits else ()
    body = Body(low_name(bits), 3 + 2 * len(widths))
    words, count, steps, *rest = body.inputs
    step = _looked_up(body, words, count, steps)
    late, fields, below = rest[: len(widths)], rest[len(widths) :], 0
    for wait, field, width in zip(late, fields, widths, strict=True):
        part = body.node("Slice", _field(body, wait, field, width), body.indices(0), count)
        part = body.node("Cast", part, to=_I32)
        if below:
            part = body.node("Mul", part, body.constant(1 << below))
        step, below = body.node("Add", step, part), below + width
    total = body.node("CumSum", step, body.constant(0))
    return body.function(body.node("Sub", total, body.constant(1)), opset=opset)


def sparse(opset: int) -> FunctionProto:
    """s(gate, size, zero, places, values) -> zeros [size] with these values in these places."""
    body = Body("s", 5)
    gate, size, zero, where, values = body.inputs
    zeros = body.node("Expand", zero, body.node("Add", size, gate))
    return body.function(body.node("ScatterElements", zeros, where, values), opset=opset)


def blank(opset: int) -> FunctionProto:
    """o(gate, size, zero) -> zeros [size]."""
    body = Body("o", 3)
    gate, size, zero = body.inputs
    return body.function(body.node("Expand", zero, body.node("Add", size, gate)), opset=opset)


def end(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    scaled: Sequence[bool],
    targets: Sequence[int],
    working: int,
    opset: int,
) -> FunctionProto:
    """k(vector, factors...) -> the pieces that follow each other in a vector.

    Args:
        name: of the function.
        shapes: of the pieces; those that differ in the first extent alone stand together.
        scaled: whether a piece is multiplied by factors, which are then an input.
        targets: the element type of each piece.
        working: that of the vector.
        opset: of the model.
    """
    body = Body(name, 1 + sum(scaled))
    vector, *rest = body.inputs
    factors = iter(rest)
    families = [list(own) for _, own in itertools.groupby(shapes, key=lambda shape: shape[1:])]
    sizes = [sum(map(math.prod, family)) for family in families]
    results: list[str] = []
    for part, family in zip(body.split(vector, *sizes), families, strict=True):
        copied = len(families) > 1
        if len(family[0]) > 1:
            rows = sum(shape[0] for shape in family)
            part = body.node("Reshape", part, body.indices(rows, *family[0][1:]))
            copied = False
        pieces = body.split(part, *(shape[0] for shape in family))
        for piece in pieces:
            at = len(results)
            if scaled[at]:
                piece = body.node("Mul", piece, next(factors))
            if targets[at] != working:
                piece = body.node("Cast", piece, to=targets[at])
            elif not scaled[at] and len(family) == 1 and not copied:
                piece = body.copy(piece, working)  # see `join`
            results.append(piece)
    return body.function(*results, opset=opset)


def join(pieces: int, target: int, opset: int) -> FunctionProto:
    """j(pieces...) -> the rows of all, one after the other; in the type `target`, unless it is 0.

    The last operator of a weight copies, since onnxruntime 1.24 keeps a dangling buffer where the
    last one that is folded is an alias (issue 29788).
    """
    body = Body(f"{JOIN}{pieces}" + (f"t{target}" if target else ""), pieces)
    whole = body.node("Concat", *body.inputs, axis=0)
    if target:
        whole = body.node("Cast", whole, to=target)
    return body.function(whole, opset=opset)
