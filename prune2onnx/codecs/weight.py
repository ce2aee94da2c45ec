"""A weight as the codecs see it: bit patterns, and what several codecs ask of them, asked once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

PACKABLE = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.UINT8,
)
"""Element types a codec may meet; bits are compared and stored, so the type hardly matters."""

MAX_LEVELS = 256
"""Distinct values a codebook holds: one byte a code."""

MAX_GAP = 255
"""Longest step between two entries; longer ones are bridged by filler entries of value +0."""

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Entries:
    """The elements of a weight that are written.

    Attributes:
        bits: their bit patterns, unsigned integers [n], by rising position.
        shape: in which they are written: the weight's own for all elements, else [n].
        dtype: the weight's.
        gaps: uint8 [n], the distance from the entry before, the first one from flat index 0; None
            where every element is an entry.
    """

    bits: NDArray[Any]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    gaps: NDArray[np.uint8] | None = None

    @cached_property
    def shared(self) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
        """Codes, uint8 [n], and codebook [k] in the weight's dtype; None above 256 levels."""
        found = shared(self.bits)
        return found and (found[0], found[1].view(self.dtype))


@dataclass(frozen=True, eq=False)
class Weight:
    """One named tensor.

    Attributes:
        name: the key everywhere; every error starts with it.
        array: the dense values, any shape.
    """

    name: str
    array: NDArray[Any]

    @cached_property
    def every(self) -> Entries:
        """All elements in row-major order."""
        flat = np.ascontiguousarray(self.array).reshape(-1)
        bits = flat.view(np.dtype(f"u{self.array.dtype.itemsize}"))
        return Entries(bits, self.array.shape, self.array.dtype)

    @cached_property
    def nonzero(self) -> Entries:
        """The nonzero elements and fillers, at least one.

        An element is zero if all its bits are; -0.0 is not. Where a gap is longer than 255, filler
        entries of value +0 stand every 255 elements; a weight of nothing but zeros is one filler.
        """
        bits = self.every.bits
        nonzero = np.flatnonzero(bits)
        if not nonzero.size:
            return Entries(bits[:1], (1,), self.array.dtype, np.zeros(1, np.uint8))
        distance = np.diff(nonzero, prepend=0)
        steps = np.maximum(distance - 1, 0) // MAX_GAP + 1
        last = np.cumsum(steps) - 1
        gaps = np.full(int(last[-1]) + 1, MAX_GAP, np.uint8)
        gaps[last] = distance - MAX_GAP * (steps - 1)
        values = np.zeros(gaps.size, bits.dtype)
        values[last] = bits[nonzero]
        return Entries(values, (values.size,), self.array.dtype, gaps)


def shared(bits: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    """Codes and codebook of bit patterns, or None where there are more than 256 of them.

    Returns:
        Codes, uint8 [n], and the codebook in rising order of its patterns, with
        `codebook[codes] == bits`.

    >>> codes, codebook = shared(np.array([7, 9, 7], np.uint8))
    >>> codes.tolist(), codebook.tolist()
    ([0, 1, 0], [7, 9])
    """
    codebook = bits[:0]
    # A weight that was never shared shows it in its first few thousand values.
    for begin in (0, *range(4096, bits.size, _CHUNK)):
        end = 4096 if not begin else begin + _CHUNK
        codebook = np.union1d(codebook, bits[begin:end])
        if codebook.size > MAX_LEVELS:
            return None
    codes = np.empty(bits.size, np.uint8)
    for begin in range(0, bits.size, _CHUNK):
        codes[begin : begin + _CHUNK] = np.searchsorted(codebook, bits[begin : begin + _CHUNK])
    return codes, codebook


def data_type(dtype: np.dtype[Any]) -> int:
    """ONNX's number for a numpy type."""
    return int(helper.np_dtype_to_tensor_dtype(dtype))
