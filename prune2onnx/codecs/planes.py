"""Floats cut in two: a symbol with the exponent, which is worth a code, and bits that are not.

Trained weights have exponents within a few octaves, and signs and mantissas like noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.codecs.weight import bits_of, numpy_type


@dataclass(frozen=True)
class Planes:
    """How a float is cut into a symbol and other bits.

    The value is `first[symbol] + rest * unit[symbol]`, exact in float32, negated where the highest
    of the other bits is set, if `signed`.
    """

    width: int  # bits that are stored as they are, the sign among them if `signed`
    signed: bool


PLANES: Mapping[int, Planes] = {
    TensorProto.FLOAT: Planes(24, True),
    TensorProto.BFLOAT16: Planes(8, True),
    TensorProto.FLOAT16: Planes(8, False),
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
