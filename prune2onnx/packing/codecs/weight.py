"""A weight as the codecs see it: its bit patterns, and what several codecs compute from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from prune2onnx.packing.codecs.book import Bits, Book, Counter, by_count

WORKING: Mapping[int, int] = {
    TensorProto.FLOAT: TensorProto.FLOAT,
    TensorProto.FLOAT16: TensorProto.FLOAT16,
    TensorProto.DOUBLE: TensorProto.DOUBLE,
    TensorProto.INT8: TensorProto.INT8,
    TensorProto.UINT8: TensorProto.UINT8,
    # Only Cast has to support these; each of their values is one of the other type.
    TensorProto.BFLOAT16: TensorProto.FLOAT,
    TensorProto.INT4: TensorProto.INT8,
    TensorProto.UINT4: TensorProto.UINT8,
}
"""Element types that are coded -> the type in which the graph rebuilds them, before a last Cast."""

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Weight:
    """One named tensor.

    Attributes:
        name: the initializer's; every error starts with it.
        array: the dense values, any shape.
        element_type: ONNX's number of the element type.
        scale: float32, broadcastable to the array; None where there is none. With it, `array` is
            `levels * scale`, rounded once.
        levels: float32, of the array's shape: what is coded in place of a scaled array.
    """

    name: str
    array: NDArray[Any]
    element_type: int
    scale: NDArray[np.float32] | None = None
    levels: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense shape."""
        return tuple(self.array.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense data in a file."""
        four_bits = self.element_type in (TensorProto.INT4, TensorProto.UINT4)
        return -(-self.array.size // 2) if four_bits else self.array.nbytes

    @property
    def working(self) -> int:
        """The type in which the graph rebuilds it (`WORKING`)."""
        return WORKING[self.element_type]

    @cached_property
    def values(self) -> NDArray[Any]:
        """The values that are coded, flat, in the working type."""
        flat = (self.array if self.levels is None else self.levels).reshape(-1)
        return np.ascontiguousarray(flat.astype(numpy_type(self.working), copy=False))

    @cached_property
    def nonzero(self) -> NDArray[np.int64]:
        """Indices of the elements that are not +0; -0.0 counts as nonzero."""
        return np.flatnonzero(bits_of(self.values))

    @cached_property
    def indexed(self) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
        """Codes, uint8 [n], and codebook of all elements; None above 256 distinct values."""
        return indexed(self.values)

    @cached_property
    def indexed_nonzero(self) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
        """Codes and codebook of the elements that are not +0; None above 256 distinct values."""
        return indexed(self.values[self.nonzero])

    @cached_property
    def storage(self) -> int:
        """The narrowest float type that holds every value of a float32 weight exactly.

        Of other weights it is the working type.
        """
        if self.working != TensorProto.FLOAT:
            return self.working
        if self.element_type == TensorProto.BFLOAT16:
            return TensorProto.BFLOAT16
        return narrowest(self.values)


def narrowest(values: NDArray[np.float32]) -> int:
    """float16 or bfloat16 where every value converts there and back exactly, else float32.

    NaN counts as inexact: some runtimes keep its payload when they convert it, others do not.
    """
    for element_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        dtype = numpy_type(element_type)
        flat = values.reshape(-1)
        for begin in (0, *range(4096, flat.size, _CHUNK)):
            part = flat[begin : 4096 if not begin else begin + _CHUNK]
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                back = part.astype(dtype).astype(np.float32)
            if np.isnan(part).any() or (bits_of(back) != bits_of(part)).any():
                break
        else:
            return element_type
    return TensorProto.FLOAT


def indexed(values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    """Codes and codebook of values, which differ if their bits do; None above 256 distinct ones.

    Returns:
        Codes, uint8 [n], and the codebook, its most frequent value first; `codebook[codes]` are
        the values, bit for bit.

    >>> codes, codebook = indexed(np.array([7, 9, 9], np.uint8))
    >>> codes.tolist(), codebook.tolist()
    ([1, 0, 0], [9, 7])
    """
    bits = bits_of(values)
    if bits.dtype == np.uint8:
        codes, occur = ranked(bits)
        return codes, occur.view(values.dtype)
    found = Counter(bits.dtype)
    if not found.add(bits):
        return None
    order = by_count(found.counts)
    rank = np.empty(order.size, np.uint8)
    rank[order] = np.arange(order.size)
    codes = Book(found.bits).codes(bits)
    return rank[codes], found.bits[order].view(values.dtype)


def ranked(values: Bits) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes of bytes, and the bytes that occur, the most frequent first: values == found[codes].

    >>> codes, found = ranked(np.array([7, 9, 9], np.uint8))
    >>> codes.tolist(), found.tolist()
    ([1, 0, 0], [9, 7])
    """
    counts = np.bincount(values, minlength=256)
    found = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].astype(np.uint8)
    code_of = np.zeros(256, np.uint8)
    code_of[found] = np.arange(found.size)
    return code_of[values], found


def bits_of(values: NDArray[Any]) -> Bits:
    """The bit patterns of an array, as unsigned integers."""
    return np.ascontiguousarray(values).view(np.dtype(f"u{values.dtype.itemsize}"))


def gaps_of(
    indices: Sequence[NDArray[np.int64]], longest: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Gaps from one entry to the next, with fillers where a gap is longer than `longest`.

    Args:
        indices: for each part of a vector the ascending indices of its entries.
        longest: the longest gap.

    Returns:
        For each part its gaps, the very first one counted from index -1; and the indices of the
        gaps that lead to an entry.

    >>> gaps, real = gaps_of([np.array([1, 12])], 5)
    >>> gaps[0].tolist(), real[0].tolist()
    ([2, 5, 5, 1], [0, 3])
    """
    gaps, real = [], []
    at = -1
    for index in indices:
        skipped = np.diff(index, prepend=at) - 1
        count = skipped // longest + 1
        last = np.cumsum(count) - 1
        own = np.full(int(last[-1]) + 1 if last.size else 0, longest, np.int64)
        own[last] = skipped - longest * (count - 1) + 1
        gaps.append(own)
        real.append(last)
        at = int(index[-1]) if index.size else at
    return gaps, real


def numpy_type(element_type: int) -> np.dtype[Any]:
    """The numpy type of an ONNX element type."""
    dtype: np.dtype[Any]
    if element_type == TensorProto.BFLOAT16:
        dtype = np.dtype(ml_dtypes.bfloat16)  # onnx 1.18 says float32
    else:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element_type))
    return dtype


def entropy_bits(counts: NDArray[np.integer[Any]]) -> float:
    """Zero-order entropy of a sequence in which symbol s occurs counts[s] times, in bits.

    >>> entropy_bits(np.array([2, 1, 1]))
    6.0
    """
    present = counts[counts > 0].astype(np.float64)
    if not present.size:
        return 0.0
    return float(math.fsum(present * (np.log2(present.sum()) - np.log2(present))))
