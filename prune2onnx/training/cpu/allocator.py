"""The C library's allocator, told to keep memory that training will ask for again in a moment.

Each operation of a pruning function makes a tensor of the weight's size. By default glibc gives
such blocks back to the system as soon as they are free, and each new one costs a page fault for
every 4 kB: two thirds of the time of such an operation on a weight of 1 MB.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt's parameters, from malloc.h
_KEPT = 256 << 20
_LARGEST_BLOCK = 32 << 20  # more is refused


def keep_freed_memory() -> None:
    """Lets this process keep up to 256 MB that it has freed, for good; on Linux with glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_TRIM_THRESHOLD, _KEPT)
