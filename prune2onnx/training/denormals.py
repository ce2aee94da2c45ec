"""Denormal numbers, on which a CPU is 40 times slower: flushed in training, exact in coding.

Pruned weights, their gradients and Adam's moments decay into denormals. Coded weights must be
restored bit for bit, so the mode is reset whenever a file is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def denormals(*, flushed: bool) -> Iterator[None]:
    """Sets the processor's mode, which is that of the whole process, and restores it afterwards.

    Args:
        flushed: whether denormals become zero.
    """
    before = float(torch.tensor(1e-39) * 0.5) == 0
    torch.set_flush_denormal(flushed)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
