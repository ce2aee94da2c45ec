"""Floats cut in two: a symbol with the exponent, which is entropy-coded, and the other bits.

The exponents of trained weights lie within a few octaves; signs and mantissas are like noise, which
no code makes smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs.streams import Streams, coded_nbytes
from prune2onnx.packing.codecs.values.kind import Entries, Group, ValueKind, Written
from prune2onnx.packing.codecs.values.lookup import padded
from prune2onnx.packing.codecs.weight import Weight, bits_of, numpy_type, ranked


@dataclass(frozen=True)
class _Planes:
    """How a float is cut into a symbol and other bits.

    The value is `first[symbol] + rest * unit[symbol]`, exact in float32; if `signed`, the highest
    of the other bits is the sign.
    """

    width: int  # the other bits, the sign among them if `signed`
    signed: bool


_PLANES: Mapping[int, _Planes] = {
    TensorProto.FLOAT: _Planes(24, True),
    TensorProto.BFLOAT16: _Planes(8, True),
    TensorProto.FLOAT16: _Planes(8, False),
}


def planes_of(values: NDArray[Any], storage: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """The symbols, uint8 [n], and the other bits, uint32 [n], of floats in their storage type."""
    bits = bits_of(values.astype(numpy_type(storage), copy=False)).astype(np.uint32)
    if storage == TensorProto.FLOAT16:
        return (bits >> 8).astype(np.uint8), bits & 0xFF
    mantissa = 23 if storage == TensorProto.FLOAT else 7
    sign = bits >> (mantissa + 8)
    rest = bits & ((1 << mantissa) - 1)
    return (bits >> mantissa & 0xFF).astype(np.uint8), sign << mantissa | rest


def tables_of(symbols: NDArray[np.uint8], storage: int) -> NDArray[np.float32]:
    """`first` and `unit` of the symbols, float32 [2, k]."""
    wide = symbols.astype(np.uint32)
    if storage == TensorProto.FLOAT16:
        first = (wide << 8).astype(np.uint16).view(np.float16).astype(np.float64)
        unit = ((wide << 8) + 1).astype(np.uint16).view(np.float16).astype(np.float64) - first
    else:
        mantissa = 23 if storage == TensorProto.FLOAT else 7
        exponent = np.maximum(wide.astype(int), 1) - 127
        first = np.where(wide > 0, np.exp2(exponent), 0.0)
        unit = np.exp2(exponent - mantissa)
    return np.stack([first, unit]).astype(np.float32)


def _fits(weight: Weight) -> bool:
    if weight.storage not in _PLANES:
        return False
    if weight.working != TensorProto.FLOAT and weight.element_type != TensorProto.FLOAT16:
        return False
    return bool(np.isfinite(weight.values).all())


def _estimate(entries: Entries) -> float | None:
    weight = entries.weight
    if entries.coder == "none" or entries.indexed is not None or not _fits(weight):
        return None
    symbols, _ = planes_of(entries.values, weight.storage)
    rest = _PLANES[weight.storage].width // 8
    counts = np.append(np.bincount(symbols, minlength=1), entries.fillers)
    nbytes = coded_nbytes(counts, entries.coder) + rest * counts.sum()
    return float(nbytes + 4 * np.count_nonzero(counts))


def _write(group: Group, streams: Streams, entries: list[NDArray[Any]]) -> Written:
    body = streams.body
    plan = _PLANES[group.storage]
    split = [planes_of(part, group.storage) for part in entries]
    symbols = np.concatenate([symbol for symbol, _ in split])
    codes, present = ranked(symbols)
    parts = np.split(codes, np.cumsum([part.size for part in entries])[:-1])
    code, bits = streams.joined(parts)
    bits = [b + plan.width * part.size for b, part in zip(bits, entries, strict=True)]
    table = streams.table(padded(streams, tables_of(present, group.storage)))
    both = body.node("Gather", table, code, axis=1)
    first, unit = body.nodes("Split", both, body.indices(1, 1), outputs=2)
    rest = np.concatenate([part for _, part in split])
    width = plan.width // 8
    planes = np.stack([rest >> 8 * (width - 1 - i) & 0xFF for i in range(width)]).astype(np.uint8)
    whole = body.node("Cast", streams.raw(planes, TensorProto.UINT8), to=TensorProto.INT32)
    if width > 1:
        weights = [1 << 8 * (width - 1 - i) for i in range(width)]
        whole = body.node("Mul", whole, body.constant(weights, (width, 1)))
        whole = body.node("ReduceSum", whole, body.indices(0), keepdims=1)
    low = whole
    if plan.signed:
        low = body.node("Mod", whole, body.constant(1 << plan.width - 1))
    low = body.node("Cast", low, to=TensorProto.FLOAT)
    value = body.node("Add", first, body.node("Mul", low, unit))
    if plan.signed:
        negative = body.node("Div", whole, body.constant(1 << plan.width - 1))
        sign = body.node("Sub", body.constant(1), body.node("Mul", negative, body.constant(2)))
        value = body.node("Mul", value, body.node("Cast", sign, to=TensorProto.FLOAT))
    value = body.node("Reshape", value, body.indices(-1))
    if group.working != TensorProto.FLOAT:
        value = body.node("Cast", value, to=group.working)
    return value, bits


PLANES = ValueKind("planes", _estimate, _write, keeps_storage=True)
