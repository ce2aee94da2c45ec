"""Codebooks: a weight's values are shared by a few levels (numpy in, `Quantized` out).

Deep Compression (Han et al., arXiv 1510.00149): k-means over the surviving values, started from
levels spread evenly over their range, which keeps the rare large values apart. No training lives
here (see `sharing`), and no file format (see `codecs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError


@dataclass(frozen=True)
class Quantized:
    """A weight as integer codes and a codebook.

    Attributes:
        codes: int64, the weight's shape; 0 where the weight is zero, else 1 + the level's index.
        codebook: [levels], the weight's dtype, ascending, without the zero.
    """

    codes: NDArray[np.int64]
    codebook: NDArray[np.floating]

    def dense(self) -> NDArray[np.floating]:
        """The weight, of the codes' shape and the codebook's dtype."""
        zero = np.zeros(1, self.codebook.dtype)
        return np.concatenate([zero, self.codebook])[self.codes]


def share_values(
    w: NDArray[np.floating], levels: int, *, zero_is_pruned: bool = True, iterations: int = 100
) -> Quantized:
    """Shares the values of a weight among at most `levels` values.

    Minimises the squared error by Lloyd's iterations, which in one dimension need no distances:
    the values are sorted once, a cluster is a range of them, and its mean comes from a running
    sum. Weights with no more distinct values than levels keep them exactly.

    Args:
        w: any shape, floating and finite.
        levels: 1 to 256; fewer come back where clusters fall empty.
        zero_is_pruned: zeros stay zero and are not counted among the levels; if False they are
            values like any other.
        iterations: at most so many; it stops when no boundary moves.

    Returns:
        Codes and codebook; deterministic.

    Raises:
        Prune2OnnxError: levels out of range, or values that are not finite.

    >>> share_values(np.float32([0, 1, 1.5, -2]), 2).dense().tolist()
    [0.0, 1.25, 1.25, -2.0]
    """
    if not 1 <= levels <= 256:
        raise Prune2OnnxError(f"{levels} levels, expected 1 to 256")
    if not np.isfinite(w).all():
        raise Prune2OnnxError("NaN or infinite values cannot be shared")
    flat = w.reshape(-1)
    member = flat != 0 if zero_is_pruned else np.ones(flat.shape, bool)
    values = np.sort(flat[member]).astype(np.float64)
    codes = np.zeros(flat.shape, np.int64)
    if not values.size:
        return Quantized(codes.reshape(w.shape), np.zeros(0, w.dtype))

    distinct = np.unique(values)
    if distinct.size <= levels:
        centroids = distinct
    else:
        centroids = np.linspace(values[0], values[-1], levels)
        sums = np.concatenate([[0.0], np.cumsum(values)])
        edges = np.zeros(0, np.int64)
        for _ in range(iterations):
            inner = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
            moved = np.concatenate([[0], inner, [values.size]])
            if np.array_equal(moved, edges):
                break
            edges = moved
            counts = np.diff(edges)
            filled = counts > 0
            centroids = np.diff(sums[edges])[filled] / counts[filled]
            edges = np.concatenate([[0], edges[1:][filled]])
    codebook = np.unique(centroids.astype(w.dtype))
    codebook = codebook[codebook != 0] if zero_is_pruned else codebook
    middles = (codebook[1:].astype(np.float64) + codebook[:-1]) / 2
    codes[member] = 1 + np.searchsorted(middles, flat[member])
    return Quantized(codes.reshape(w.shape), codebook)


def to_half(w: NDArray[np.floating]) -> NDArray[np.floating] | None:
    """The weight rounded to float16 and back, or None where a value would overflow."""
    with np.errstate(over="ignore"):
        rounded = w.astype(np.float16).astype(w.dtype)
    return rounded if np.isfinite(rounded).all() else None
