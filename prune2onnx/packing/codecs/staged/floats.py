"""Floats, cut into an exponent, which is coded, and bits that stand as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs.weight import Weight, bits_of

_MOST_PATCHES = 1 / 64  # of the elements


@dataclass(frozen=True)
class Planes:
    """Floats, cut: value = (table[upper] + lower) * unit of the exponent.

    Attributes:
        exponents: uint8 [n].
        upper: the sign and the upper 7 bits of the mantissa, uint8 [n].
        lower: the lower 16 bits, uint16 [n]; None where they are all zero.
        patches: indices of values that this does not give: denormal ones, infinity, NaN.
    """

    exponents: NDArray[np.uint8]
    upper: NDArray[np.uint8]
    lower: NDArray[np.uint16] | None
    patches: NDArray[np.int64]

    @property
    def rest_bits(self) -> int:
        """Bits of an element besides its exponent."""
        return 8 if self.lower is None else 24

    @property
    def table(self) -> NDArray[np.float32]:
        """What the upper bits stand for; a negative value counts down from it."""
        mantissa = np.arange(128.0) + 128
        if self.lower is None:
            return np.concatenate([mantissa, -mantissa]).astype(np.float32)
        return np.concatenate([mantissa * 65536, -mantissa * 65536 - 65535]).astype(np.float32)

    def units(self, exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What exponents stand for; zero for that of zeros and those of patches."""
        point = 127 + (7 if self.lower is None else 23)
        units = np.exp2(exponents.astype(np.float64) - point)
        units[(exponents == 0) | (exponents == 255)] = 0
        return units.astype(np.float32)

    @staticmethod
    def fit(weight: Weight) -> bool:
        """Whether a weight is float32 or bfloat16, with few values that need a patch."""
        if weight.working != TensorProto.FLOAT or weight.levels is not None:
            return False
        return int(special(bits_of(weight.values)).sum()) <= _MOST_PATCHES * weight.array.size

    @classmethod
    def of(cls, weight: Weight) -> Planes:
        """Cuts a weight."""
        bits = bits_of(weight.values)
        sign = bits >> np.uint32(31)
        upper = sign << np.uint32(7) | (bits >> np.uint32(16) & np.uint32(127))
        lower: NDArray[np.uint16] | None = None
        if (bits & np.uint32(0xFFFF)).any():
            lower = bits.astype(np.uint16)
            lower = np.where(sign, np.uint16(0xFFFF) - lower, lower)
        exponents = (bits >> np.uint32(23)).astype(np.uint8)
        return cls(exponents, upper.astype(np.uint8), lower, np.flatnonzero(special(bits)))


def special(bits: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Denormal numbers, infinity and NaN."""
    exponent = bits >> np.uint32(23) & np.uint32(0xFF)
    found: NDArray[np.bool_] = (exponent == 255) | (exponent == 0) & (bits << np.uint32(1) != 0)
    return found
