"""The number of CPU threads to train with: one, or all, whichever makes steps faster.

In a small network an operation is over before a second thread has begun, and where other programs
keep the cores busy, the two wait for each other. Sums that are split differently round differently,
so a run keeps its number in a file, for the process that continues it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

_STEPS, _SECONDS = 7, 3.0  # at most, for each number of threads
_WORTH = 0.85
"""More threads have to take at most this part of one thread's time: they keep more cores busy."""


def may_choose() -> bool:
    """Whether there is a choice, and the user has made none."""
    return torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ


def faster(step: Callable[[], object]) -> int:
    """1, or as many threads as torch uses now, whichever makes a step faster.

    Args:
        step: something like a training step.
    """
    most = torch.get_num_threads()
    times: dict[int, list[float]] = {1: [], most: []}
    with threads(most):
        step()  # the first one allocates
        until = time.monotonic() + 2 * _SECONDS
        while len(times[most]) < _STEPS and (not times[most] or time.monotonic() < until):
            for count, taken in times.items():  # interleaved: other programs come and go
                torch.set_num_threads(count)
                began = time.perf_counter()
                step()
                taken.append(time.perf_counter() - began)
    return most if median(times[most]) < _WORTH * median(times[1]) else 1


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Computes with so many threads, and afterwards with as many as before; None: as it is."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
