"""Few levels instead of many values, in numpy: codebooks by k-means, and integer grids.

- `k_means`: Deep Compression (Han et al., arXiv 1510.00149), k-means over the surviving values,
  started from levels spread evenly over their range, which keeps the rare large values distinct.
- `grid_codes`: whole multiples of a step, chosen by error and by the bits that they will take.

For training on levels see `training.levels`, for the choice of levels per weight `approximate`, and
for the file format `codecs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.packing.quantized import MOST_STEPS, Quantized


def k_means(
    w: NDArray[np.floating], levels: int, *, zero_is_pruned: bool = True, iterations: int = 100
) -> Quantized:
    """Replaces the values of a weight by at most `levels` cluster means.

    Minimises the squared error by Lloyd's iterations, which in one dimension need no distances:
    the values are sorted once, a cluster is a range of them, and its mean comes from a running
    sum. Weights with no more distinct values than levels keep them exactly.

    Args:
        w: any shape, floating and finite.
        levels: 1 to 256; there are fewer where clusters become empty.
        zero_is_pruned: zeros stay zero and are not counted among the levels; values whose only
            mean is zero become zero. If False, zeros are values like any other.
        iterations: the most iterations; it stops when no boundary moves.

    Returns:
        Codes and codebook; deterministic.

    Raises:
        Prune2OnnxError: levels out of range, or values that are not finite.

    >>> k_means(np.float32([0, 1, 1.5, -2]), 2).dense().tolist()
    [0.0, 1.25, 1.25, -2.0]
    """
    if not 1 <= levels <= 256:
        raise Prune2OnnxError(f"{levels} levels, expected 1 to 256")
    if not np.isfinite(w).all():
        raise Prune2OnnxError("NaN or infinite values cannot be clustered")
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
    if not codebook.size:  # the only mean is zero, which is not a level
        return Quantized(codes.reshape(w.shape), codebook)
    middles = (codebook[1:].astype(np.float64) + codebook[:-1]) / 2
    codes[member] = 1 + np.searchsorted(middles, flat[member])
    return Quantized(codes.reshape(w.shape), codebook)


def to_half(w: NDArray[np.floating]) -> NDArray[np.floating] | None:
    """The weight rounded to float16 and back, or None where a value would overflow."""
    with np.errstate(over="ignore"):
        rounded = w.astype(np.float16).astype(w.dtype)
    return rounded if np.isfinite(rounded).all() else None


@dataclass(frozen=True, eq=False)
class Metric:
    """The cost of the rounding errors e of one output's weights, [inner, places].

    The output's error is sum_j e_j x_j, with mean square e' E[x x'] e. Without data, x is modelled
    as activations usually are: neighbouring places of one channel are correlated, and channels are
    independent except for a mean that is not zero (after a ReLU). So the cost is

        sum_i e_i' `kernel` e_i + `mean` * (sum e)^2

    SQuant (Guo et al., arXiv 2202.07471) derives the same two terms from the Hessian; it bounds
    the sums, while the cost is minimised here.

    Attributes:
        kernel: [places, places], symmetric, with a diagonal of 1 - mean.
        mean: the fraction of an input's power that all inputs have in common.
    """

    kernel: NDArray[np.float32]
    mean: float

    @staticmethod
    def of(kernel_shape: tuple[int, ...], correlation: float, mean: float) -> Metric:
        """Places on a grid; inputs at a distance d (1-norm) have a correlation of correlation^d."""
        places = np.indices(kernel_shape).reshape(len(kernel_shape), math.prod(kernel_shape))
        distance = np.abs(places[:, :, None] - places[:, None, :]).sum(0)
        return Metric(((1 - mean) * correlation**distance).astype(np.float32), mean)

    @property
    def gain(self) -> float:
        """The factor by which codes chosen for this cost lower it, against rounding to nearest.

        It is the mean conditional variance of the kernel, since the places still to be rounded
        compensate for an error (the noise of sequential rounding, Frantar et al., arXiv
        2210.17323).
        """
        return float(np.square(np.diag(np.linalg.cholesky(self.kernel.astype(float)))).mean())


def code_bits(codes: NDArray[np.integer[Any]], widest: int = MOST_STEPS) -> NDArray[np.float32]:
    """Bits of each integer -widest ... widest in a code for `codes`: -log2 of its frequency.

    Integers that do not occur count as if they occurred 0.1 times; no integer takes more than 16
    bits.
    """
    counts = np.bincount(codes.reshape(-1) + widest, minlength=2 * widest + 1)
    return bits_of(counts)


def bits_of(counts: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """The same of each integer that occurs so often."""
    bits = -np.log2(np.maximum(counts, 0.1) / max(1, counts.sum()))
    clipped: NDArray[np.float32] = np.clip(bits, 0, 16).astype(np.float32)
    return clipped


PRICE = math.log(2) / 6
"""Squared steps for a bit, on a fine grid: a step s has the error s^2 / 12 and costs -log2 s bits,
which gives ln 2 / 6 steps^2 per bit (entropy-constrained quantization; Sullivan, IEEE Trans. Inf.
Theory 42, 1996)."""


class Sorted:
    """Values in order, so that what rounding makes of them on any grid is known at once.

    For one step and one price of bits, values that become the same code lie between two bounds:
    codes are counted by bisection, and errors are differences of sums.

    Args:
        values: [n], finite.
        weights: [n] of their squared errors.
    """

    def __init__(self, values: NDArray[np.floating], weights: NDArray[np.floating]) -> None:
        self._size = values.size
        self._sides = [_Side.of(sign * values, weights) for sign in (-1, 1)]

    def on_grid(self, step: float, rounds: int = 2) -> tuple[NDArray[np.int64], float]:
        """What `grid_codes` makes of `values / step`, without a metric.

        Returns:
            How often each code -127 ... 127 occurs; the sum of weighted squared errors.
        """
        whole = np.arange(MOST_STEPS + 1, dtype=np.float64)
        parts = [side.coded(step, whole - 0.5, whole * 0.0) for side in self._sides]
        for _ in range(rounds):
            bits = PRICE * bits_of(self._joined(parts)).astype(np.float64)
            zero, middle, parts = bits[MOST_STEPS], MOST_STEPS, []
            for side, own in zip(self._sides, (bits[middle::-1], bits[middle:]), strict=True):
                # from where on each code is better than the one below it, and than zero
                above = np.clip(whole - 0.5 + (own - np.roll(own, 1)) / 2, whole - 1, whole)
                nonzero = whole / 2 + (own - zero) / (2 * np.maximum(whole, 1))
                parts.append(side.coded(step, above, nonzero))
        return self._joined(parts), sum(error for _, error in parts)

    def _joined(self, parts: Sequence[tuple[NDArray[np.int64], float]]) -> NDArray[np.int64]:
        """The counts of all codes, from those of both signs."""
        below, above = (counts for counts, _ in parts)
        zeros = self._size - below.sum() - above.sum()
        return np.concatenate([below[:0:-1], [zeros], above[1:]])


@dataclass(frozen=True, eq=False)
class _Side:
    """The values of one sign, ascending.

    Attributes:
        values: magnitudes.
        sums: of weights, of values and of their squares, up to each place.
    """

    values: NDArray[np.float64]
    sums: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

    @staticmethod
    def of(values: NDArray[np.floating], weights: NDArray[np.floating]) -> _Side:
        """Those above 0."""
        inside = np.flatnonzero(values > 0)
        order = inside[np.argsort(values[inside], kind="stable")]
        v, w = values[order].astype(np.float64), weights[order].astype(np.float64)
        first, second, third = (np.append(0.0, np.cumsum(each)) for each in (w, w * v, w * v * v))
        return _Side(v, (first, second, third))

    def coded(
        self, step: float, above: NDArray[np.float64], nonzero: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], float]:
        """How many get each code, of those that are not zero, and the error of all.

        Args:
            step: of the grid.
            above: [codes] where each begins, in steps.
            nonzero: [codes] from where on each is better than zero.
        """
        first = np.searchsorted(self.values, above * step)
        last = np.append(first[1:], len(self.values))
        first = np.clip(np.searchsorted(self.values, nonzero * step), first, last)
        first[0] = last[0]  # of zero
        whole = np.arange(len(above)) * step
        count, value, square = (each[last] - each[first] for each in self.sums)
        error = square - 2 * whole * value + whole * whole * count
        zeros = self.sums[2][-1] - square.sum()
        return last - first, float(error.sum() + zeros)


def grid_codes(
    u: NDArray[np.floating],
    low: NDArray[np.integer[Any]] | int = -MOST_STEPS,
    high: NDArray[np.integer[Any]] | int = MOST_STEPS,
    *,
    metric: Metric | None = None,
    rounds: int = 2,
) -> NDArray[np.int16]:
    """Rounds to whole numbers, by error and by bits.

    Minimises error + PRICE * bits, alternating between two steps: bits are taken from the codes'
    histogram, then each code becomes the best of its two neighbours and zero. With a metric, the
    error is its cost, and codes are chosen one by one, so that later ones compensate for earlier
    ones.

    Args:
        u: the weight in steps, [rows, inner, places]; finite. Zeros stay zero.
        low: smallest code, broadcastable to u, at most 0.
        high: largest code, broadcastable to u, at least 0.
        metric: the cost of errors within one row; None: their squares.
        rounds: how often each code is chosen.

    Returns:
        Codes, of u's shape; deterministic.

    >>> grid_codes(np.float32([[[0.4, 0.4, 0.4]]]), metric=Metric.of((3,), 0.9, 0.0)).tolist()
    [[[0, 1, 0]]]
    """
    codes = np.clip(np.rint(u), low, high).astype(np.int16)
    widest = max(int(np.max(high)), -int(np.min(low)))
    low, high = np.broadcast_to(low, u.shape), np.broadcast_to(high, u.shape)
    if metric is None or u.shape[1] * u.shape[2] == 1:
        for _ in range(rounds):
            bits = PRICE * code_bits(codes, widest)
            codes = cheapest(u, bits, low, high)
        codes[u == 0] = 0
        return np.asarray(codes, np.int16)
    # rows last: those that are rounded together are then contiguous in memory
    u, low, high = (np.ascontiguousarray(np.moveaxis(a, 0, -1)) for a in (u, low, high))
    codes = np.moveaxis(codes, 0, -1).copy()
    errors = np.zeros(u.shape, np.float32)  # in the first round, codes not yet chosen are exact
    sums = np.zeros(u.shape[-1], np.float32)
    for _ in range(rounds):
        bits = PRICE * metric.gain * code_bits(codes, widest)
        for i, p in np.ndindex(u.shape[:2]):
            weight = float(metric.kernel[p, p]) + metric.mean
            here, own = u[i, p], errors[i, p].copy()
            pull = metric.kernel[p] @ errors[i] + metric.mean * sums - weight * own
            code = cheapest(here + pull / weight, bits / weight, low[i, p], high[i, p])
            code[here == 0] = 0
            errors[i, p] = here - code
            sums += errors[i, p] - own
            codes[i, p] = code
    result: NDArray[np.int16] = np.moveaxis(codes, -1, 0)
    return result


def cheapest(
    target: NDArray[Any],
    bits: NDArray[np.float32],
    low: NDArray[Any] | int = -MOST_STEPS,
    high: NDArray[Any] | int = MOST_STEPS,
    price: NDArray[Any] | float = 1.0,
) -> NDArray[np.int16]:
    """The integer of least (target - code)^2 + price * bits: a neighbour of `target`, or zero.

    Args:
        target: a weight in steps.
        bits: of each integer from the least to the greatest, zero in the middle.
        low: smallest code, broadcastable to `target`, at most 0.
        high: largest code, the same.
        price: of a bit, broadcastable to `target`.
    """
    middle = len(bits) // 2
    least, greatest = (np.asarray(bound, target.dtype) for bound in (low, high))
    below = np.floor(target)
    best, cost = np.zeros_like(target), np.square(target) + price * bits[middle]
    for neighbour in (below, below + 1):
        code = np.minimum(np.maximum(neighbour, least), greatest)
        own = np.square(target - code) + price * bits[(code + middle).astype(np.intp)]
        better = own < cost
        np.copyto(cost, own, where=better)
        np.copyto(best, code, where=better)
    return best.astype(np.int16)
