"""Floats, cut into an exponent, which is coded, and bits that stand as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.weight import bits_of

MOST_PATCHES = 1 / 64
"""Of the elements, that may be stored as they are."""

_BLOCK = 1 << 17  # elements that stay in a core's cache


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

    @classmethod
    def of(cls, values: NDArray[np.float32], *, short: bool) -> Planes:
        """Cuts values; of `short` ones the lower 16 bits are all zero."""
        every = bits_of(values)
        exponents, upper = np.empty((2, every.size), np.uint8)
        lower = None if short else np.empty(every.size, np.uint16)
        for begin in range(0, every.size, _BLOCK):
            part = slice(begin, begin + _BLOCK)
            bits = every[part]
            sign = (bits >> np.uint32(31)).astype(np.uint8)
            mantissa = (bits >> np.uint32(16)).astype(np.uint8)
            upper[part] = sign << np.uint8(7) | (mantissa & np.uint8(127))
            exponents[part] = bits >> np.uint32(23)
            if lower is not None:  # less the lower bits from 65535, where the sign is set
                lower[part] = bits
                lower[part] ^= sign * np.uint16(0xFFFF)
        patches = np.flatnonzero((exponents == 0) | (exponents == 255))
        return cls(exponents, upper, lower, patches[special(every[patches])])


def table(*, short: bool) -> NDArray[np.float32]:
    """What the upper bits stand for; a negative value counts down from it."""
    mantissa = np.arange(128.0) + 128
    if short:
        return np.concatenate([mantissa, -mantissa]).astype(np.float32)
    return np.concatenate([mantissa * 65536, -mantissa * 65536 - 65535]).astype(np.float32)


def units(exponents: NDArray[np.uint8], *, short: bool) -> NDArray[np.float32]:
    """What exponents stand for; zero for that of zeros and those of patches."""
    found = np.exp2(exponents.astype(np.float64) - (127 + (7 if short else 23)))
    found[(exponents == 0) | (exponents == 255)] = 0
    return found.astype(np.float32)


def special(bits: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Denormal numbers, infinity and NaN."""
    exponent = bits >> np.uint32(23) & np.uint32(0xFF)
    found: NDArray[np.bool_] = (exponent == 255) | (exponent == 0) & (bits << np.uint32(1) != 0)
    return found
