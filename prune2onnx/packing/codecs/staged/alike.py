"""Which weights share the words of one code: those whose levels are distributed alike.

Each further code has tables of its own, and its own calls in each stage; weights in 2 bits and in 6
with one code would take a tenth more bytes than with two.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.staged.large import Counted
from prune2onnx.packing.codecs.weight import bits_of, entropy_bits

_MOST = 4  # codes
_CODE_NBYTES = 3 << 10  # of a further code: its tables, and a call and a split in each stage
_BITS = 8  # parts of a bit in which weights are told apart before they are compared


def parted(books: Sequence[Counted]) -> list[int]:
    """The number of the code for each of some weights.

    Args:
        books: of weights of one type: their different values, and how often each occurs.

    Returns:
        Numbers from 0 on: those of close entropy have the same; for the fewest bytes in total.
    """
    entropies = [entropy_bits(book.counts) / max(int(book.counts.sum()), 1) for book in books]
    classes = [round(_BITS * bits) for bits in entropies]
    order = sorted(set(classes))
    every = np.unique(np.concatenate([bits_of(book.values) for book in books]))
    sums = np.zeros((len(order) + 1, every.size))
    for at, book in zip(classes, books, strict=True):
        places = np.searchsorted(every, bits_of(book.values))
        np.add.at(sums[order.index(at) + 1], places, book.counts)
    ends = _ends(np.cumsum(sums, axis=0))
    return [int(np.searchsorted(ends, order.index(at), side="right")) for at in classes]


def _ends(sums: NDArray[np.float64]) -> list[int]:
    """Where runs of classes end so that all of them take the fewest bytes.

    Args:
        sums: [classes + 1, values], how often each value occurs in the classes before.
    """
    count = len(sums) - 1
    least: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, count + 1):
        best: tuple[float, list[int]] | None = None
        for begin in range(end):
            before, cuts = least[begin]
            if len(cuts) == _MOST:
                continue
            nbytes = before + entropy_bits(sums[end] - sums[begin]) / 8 + _CODE_NBYTES
            if best is None or nbytes < best[0]:
                best = nbytes, [*cuts, end]
        assert best is not None  # a single run
        least.append(best)
    ends = least[count][1]
    assert all(a < b for a, b in pairwise(ends))
    return ends
