"""Few levels instead of many values (numpy in, `Quantized` out): codebooks and integer grids.

- `share_values`: Deep Compression (Han et al., arXiv 1510.00149), k-means over the surviving
  values, started from levels spread evenly over their range, which keeps the rare large values
  apart.
- `grid_codes`: whole multiples of a step, chosen by error and by the bits they will take.

No training lives here (see `sharing`), no choice of levels per weight (see `lossy`), and no file
format (see `codecs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError

_LEAST_STEP = np.float32(1e-30)
"""Smaller values are left alone: their quotients may be denormal, which some runtimes flush."""

MOST_STEPS = 127
"""Largest multiple of a step: a codebook of 255 levels and the zero is what a byte can count."""


@dataclass(frozen=True)
class Quantized:
    """A weight as integer codes, a codebook and a scale: codebook[code] * scale.

    Attributes:
        codes: int64, the weight's shape; 0 where the weight is zero, else 1 + the level's index.
        codebook: [levels], the weight's dtype, ascending, without the zero.
        scale: float32, positive, broadcastable to the weight, such as [out, 1, 1, 1]; None: 1.
            Only float32 weights have one: their product is one IEEE multiplication, the same in
            numpy and in every onnxruntime. Of float16 and bfloat16 that is not so (kernels
            compute in float32, or are missing), so their codebook holds the final values.
    """

    codes: NDArray[np.int64]
    codebook: NDArray[Any]
    scale: NDArray[np.float32] | None = None

    def dense(self) -> NDArray[Any]:
        """The weight, of the codes' shape and the codebook's dtype; code 0 is +0 exactly."""
        zero = np.zeros(1, self.codebook.dtype)
        values: NDArray[Any] = np.concatenate([zero, self.codebook])[self.codes]
        return values if self.scale is None else values * self.scale


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


def step_of(values: NDArray[np.float32]) -> np.float32 | None:
    """The largest step s of which all values are multiples: value = k * s, rounded once.

    Args:
        values: float32, few and none zero: a codebook.

    Returns:
        A step with |k| <= 127; None where there is none, or nothing to tell it by.

    >>> step_of(np.float32([0.75, -0.5])), step_of(np.float32([0.75, 0.001]))
    (np.float32(0.25), None)
    """
    magnitudes = np.unique(np.abs(values))
    if not magnitudes.size or not np.isfinite(magnitudes).all() or magnitudes[0] < _LEAST_STEP:
        return None
    near = magnitudes[-1] / np.arange(1, MOST_STEPS + 1, dtype=np.float32)
    # The largest value was rounded, and so is the quotient: the step is this one or a neighbour.
    steps = np.stack(
        [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))]
    )
    steps = steps.T.reshape(-1, 1)
    with np.errstate(over="ignore"):
        equal = np.rint(magnitudes / steps) * steps == magnitudes
    found = np.flatnonzero(equal.all(axis=1))
    return steps[found[0], 0] if found.size else None


def to_half(w: NDArray[np.floating]) -> NDArray[np.floating] | None:
    """The weight rounded to float16 and back, or None where a value would overflow."""
    with np.errstate(over="ignore"):
        rounded = w.astype(np.float16).astype(w.dtype)
    return rounded if np.isfinite(rounded).all() else None


@dataclass(frozen=True, eq=False)
class Metric:
    """What rounding errors e of one output's weights, [inner, places], cost together.

    The output errs by sum_j e_j x_j; its mean square is e' E[x x'] e. Without data, x is modelled
    as activations usually are: neighbouring places of one channel alike, channels independent but
    for a mean that is not zero (after a ReLU). So the cost is

        sum_i e_i' `kernel` e_i + `mean` * (sum e)^2

    SQuant (Guo et al., arXiv 2202.07471) derives the same two terms from the Hessian; it bounds
    the sums where this minimises the cost.

    Attributes:
        kernel: [places, places], symmetric, its diagonal 1 - mean.
        mean: share of an input's power that all inputs have in common.
    """

    kernel: NDArray[np.float32]
    mean: float

    @staticmethod
    def of(kernel_shape: tuple[int, ...], likeness: float, mean: float) -> Metric:
        """Places on a grid, inputs d steps apart correlated by likeness^d (1-norm)."""
        places = np.indices(kernel_shape).reshape(len(kernel_shape), math.prod(kernel_shape))
        apart = np.abs(places[:, :, None] - places[:, None, :]).sum(0)
        return Metric(((1 - mean) * likeness**apart).astype(np.float32), mean)

    @property
    def gain(self) -> float:
        """By what factor codes chosen for this cost lower it, against rounding to nearest.

        The mean conditional variance of the kernel: an error is made up for by the places still
        free (the noise of sequential rounding, Frantar et al., arXiv 2210.17323).
        """
        return float(np.square(np.diag(np.linalg.cholesky(self.kernel.astype(float)))).mean())


def code_bits(codes: NDArray[np.integer[Any]], widest: int = MOST_STEPS) -> NDArray[np.float32]:
    """Bits of each integer -widest ... widest under a code fit to `codes`: -log2 of its share.

    What did not occur is charged as if it had occurred a tenth of a time, at most 16 bits.
    """
    counts = np.bincount(codes.reshape(-1) + widest, minlength=2 * widest + 1)
    bits = -np.log2(np.maximum(counts, 0.1) / max(1, codes.size))
    return np.clip(bits, 0, 16).astype(np.float32)


def entropy_bits(codes: NDArray[np.integer[Any]]) -> float:
    """Bits that coding the sequence takes at least: n times its entropy."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / max(1, codes.size))).sum()) + 0.0


def grid_codes(
    u: NDArray[np.floating],
    low: NDArray[np.integer[Any]] | int = -MOST_STEPS,
    high: NDArray[np.integer[Any]] | int = MOST_STEPS,
    *,
    metric: Metric | None = None,
    rounds: int = 2,
) -> NDArray[np.int16]:
    """Rounds to whole numbers, by error and by bits.

    Minimises error + price * bits by turns: bits from the codes' histogram, then every code the
    best of its two neighbours and zero. The price is what a bit is worth on a fine grid: a step
    s errs by s^2 / 12 and costs -log2 s bits, so ln 2 / 6 steps^2 a bit (entropy-constrained
    quantisation; Sullivan, IEEE Trans. Inf. Theory 42, 1996). With a metric the error is its
    cost, and codes are visited one after the other, so that later ones make up for earlier ones.

    Args:
        u: the weight in steps, [rows, inner, places]; finite. Zeros stay zero.
        low: smallest code, broadcastable to u, at most 0; `high`: largest, at least 0.
        high: see low.
        metric: cost of errors within one row; None: their squares.
        rounds: how often each code is visited.

    Returns:
        Codes, of u's shape; deterministic.

    >>> grid_codes(np.float32([[[0.4, 0.4, 0.4]]]), metric=Metric.of((3,), 0.9, 0.0)).tolist()
    [[[0, 1, 0]]]
    """
    codes = np.clip(np.rint(u), low, high).astype(np.int16)
    price = math.log(2) / 6
    widest = max(int(np.max(high)), -int(np.min(low)))
    low, high = np.broadcast_to(low, u.shape), np.broadcast_to(high, u.shape)
    if metric is None or u.shape[1] * u.shape[2] == 1:
        for _ in range(rounds):
            bits = price * code_bits(codes, widest)
            codes = _cheapest(u, low, high, bits).astype(np.int16)
        codes[u == 0] = 0
        return np.asarray(codes, np.int16)
    # places first: the rows that are worked on together lie side by side in memory
    u, low, high = (np.ascontiguousarray(np.moveaxis(a, 0, -1)) for a in (u, low, high))
    codes = np.moveaxis(codes, 0, -1).copy()
    errors = np.zeros(u.shape, np.float32)  # in the first round a code to come counts as exact
    sums = np.zeros(u.shape[-1], np.float32)
    for _ in range(rounds):
        bits = price * metric.gain * code_bits(codes, widest)
        for i, p in np.ndindex(u.shape[:2]):
            weight = float(metric.kernel[p, p]) + metric.mean
            here, own = u[i, p], errors[i, p].copy()
            pull = metric.kernel[p] @ errors[i] + metric.mean * sums - weight * own
            code = _cheapest(here + pull / weight, low[i, p], high[i, p], bits / weight)
            code[here == 0] = 0
            errors[i, p] = here - code
            sums += errors[i, p] - own
            codes[i, p] = code
    result: NDArray[np.int16] = np.moveaxis(codes, -1, 0)
    return result


def _cheapest(
    target: NDArray[Any], low: NDArray[Any], high: NDArray[Any], bits: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Of the integers beside `target` and zero the one with least (target - code)^2 + bits."""
    floor = np.floor(target).astype(np.int64)
    middle = len(bits) // 2
    best = np.zeros(target.shape, np.int64)
    least = np.square(target) + bits[middle]
    for neighbour in (floor, floor + 1):
        code = np.clip(neighbour, low, high)
        cost = np.square(target - code) + bits[code + middle]
        better = cost < least
        least = np.where(better, cost, least)
        best = np.where(better, code, best)
    return best
