"""Limits of memory and time for decoding a file, checked before anything is allocated."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.tensors import MAX_RANK, MORE_BYTES
from prune2onnx.packing.codecs.work import Work

Array = NDArray[Any]

# A step takes a core about a nanosecond, so these are 17 seconds; larger files get more.
_FREE_STEPS = 1 << 34

_STEPS_PER_BYTE = 4096

_HELD_PER_BYTE = 256


class Budget:
    """The memory and time that decoding a file may use.

    Args:
        max_bytes: the largest array that it may make. All arrays that it holds at a time may take
            twice as much, and 256 bytes for each byte of the streams.
        given: bytes of the streams: the work that decoding needs grows with them.

    Attributes:
        work: what was run so far.
    """

    def __init__(self, max_bytes: int, given: int) -> None:
        self._max_bytes = max_bytes
        self._max_held = 2 * max_bytes + _HELD_PER_BYTE * given
        self._steps = _FREE_STEPS + _STEPS_PER_BYTE * given
        self._held = 0
        self._owners: dict[int, weakref.ref[Array]] = {}
        self.work = Work()

    def take(self, shape: Sequence[int], dtype: np.dtype[Any], steps: int = 4) -> None:
        """Checks and counts a result before it is made, with its steps per element.

        Raises:
            ValueError: there is no such shape.
            Prune2OnnxError: it is too large, or all arrays together are.
        """
        self.spend(self.check(shape, dtype) * steps)

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> int:
        """Checks an array before it is made, as `take` does, without counting it.

        Returns:
            The number of its elements.
        """
        if len(shape) > MAX_RANK:
            raise ValueError(f"an array of {len(shape)} axes, at most {MAX_RANK} are known")
        extents = [int(extent) for extent in shape]
        if min(extents, default=0) < 0:
            raise ValueError(f"an array of shape {extents}")
        size = math.prod(extents)
        nbytes = size * dtype.itemsize
        if nbytes >= 1 << 64:
            raise ValueError("an array of 2^64 bytes or more")
        if nbytes > self._max_bytes:
            raise Prune2OnnxError(
                f"an array of {nbytes:,} bytes, {self._max_bytes:,} are allowed; {MORE_BYTES}"
            )
        if nbytes + self._held > self._max_held:
            raise Prune2OnnxError(
                f"arrays of {nbytes + self._held:,} bytes in all, {self._max_held:,} are allowed; "
                f"{MORE_BYTES}"
            )
        return size

    def spend(self, steps: int) -> None:
        """Counts steps.

        Raises:
            Prune2OnnxError: there were too many.
        """
        self._steps -= steps
        if self._steps < 0:
            raise Prune2OnnxError("far more work than its streams warrant")

    def keep(self, nbytes: int) -> None:
        """Counts memory that is held to the end."""
        self._held += nbytes

    def hold(self, array: Array) -> None:
        """Counts an array, or the one that it is a view of, for as long as it exists."""
        while isinstance(array.base, np.ndarray):
            array = array.base
        key, nbytes = id(array), array.nbytes
        if key in self._owners:
            return

        def release(_: object) -> None:
            del self._owners[key]
            self._held -= nbytes

        self._owners[key] = weakref.ref(array, release)
        self._held += nbytes
