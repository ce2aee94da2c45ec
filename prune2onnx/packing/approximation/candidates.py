"""Candidate encodings of one weight, each with its bits and its error.

A weight is seen as [rows, inner, places]: its outputs, the inputs that are summed for each output,
and the kernel positions of each input. `approximate` chooses among candidates, `roles` says which
elements are summed, and `rounding` rounds the codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.approximation.roles import Role
from prune2onnx.packing.approximation.rounding import Metric, Sorted, grid_codes, k_means
from prune2onnx.packing.codecs.weight import entropy_bits
from prune2onnx.packing.compute.codes import BLOCK
from prune2onnx.packing.quantized import MOST_STEPS, Quantized

CORRELATION, MEAN = 0.6, 0.1
"""The model of a layer's inputs (`rounding.Metric`). Measured on ResNet-20, ResNet-32 and a face
detector: anything from 0.5 to 0.8 and from 0.05 to 0.3 works about as well."""

CALL_BITS = 8 * 32
"""Bits of a coded weight of any size: its name, entries in the call, a table of codewords."""

_SAMPLE = 1 << 16  # elements from which the candidates of a large weight are estimated
_SCALE_BITS = 16.0  # of a factor: all steps are float16 numbers
_WORST = 0.9  # largest relative squared error of a candidate
_LEVELS = (1, 2, 3, 4, 6, 8, 12, 16)  # of codebooks; above, a grid takes fewer bits at equal error
_SPAN = 2.0**10  # from the coarsest to the finest step of a weight's outputs
_ROUNDS = 40  # gradient steps to compensate for pruned elements; more do not change outputs visibly

# Steps of all grids, four per octave. They are float16 numbers, so scales take two bytes; most of
# their multiples are float16 numbers, too.
_MANTISSAS = np.array([16, 19, 23, 27]) / 16


@dataclass(frozen=True)
class Candidate:
    """A candidate encoding of a weight.

    Attributes:
        how: "grid": multiples of one step; "channel grid": of one step per output, in proportion
            to its weights; "codebook"; "float16", "bfloat16": rounded to that type; "kept".
        parameter: for a grid, the index of its step (the step itself for an integer weight); for a
            codebook, its levels.
        bits: estimated bits in the file: entropy of the codes or exponents, codebook, scale.
        error: ||dW||^2 / ||W||^2.
    """

    how: str
    parameter: int
    bits: float
    error: float


@dataclass(frozen=True, eq=False)
class Written:
    """A weight in one of its encodings: the dense array, its codes if it has any, its real bits."""

    array: NDArray[Any]
    quantized: Quantized | None
    bits: float


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight and its role in the graph.

    Attributes:
        array: its values, any float type, int8 or uint8; finite.
        role: of kind "weight" or "integer".
        only_grids: whether grids are its only encodings, besides the values that it has.
    """

    array: NDArray[Any]
    role: Role
    only_grids: bool = False

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The Pareto-optimal encodings, by rising bits and falling error; the last one is "kept".

        For a large weight they are estimated from a sample, the same every time.
        """
        found = [Candidate("kept", 0, _stored_bits(self.centred), 0.0)]
        size = self.array.size
        picked: Any = np.arange(size)
        if size > _SAMPLE:
            picked = np.sort(np.random.default_rng(0).choice(size, _SAMPLE, replace=False))
        sample = self.rows.reshape(-1)[picked]
        total = _power(sample)
        # With less power, steps would be denormal; an all-zero weight is small already.
        if not total > 1e-60 * size:
            return tuple(found)

        def add(how: str, parameter: int, bits: float, error: float) -> None:
            error /= total
            if error <= _WORST:  # it is infinite where values overflowed
                found.append(Candidate(how, parameter, bits, error))

        times = size / sample.size
        for how, parameter, counts, error in self._on_grids(sample, picked):
            steps = self._steps(how, parameter)
            bits = CALL_BITS + entropy_bits(counts[counts > 0]) * times
            add(how, parameter, bits + self._book_bits(int(np.count_nonzero(counts)), steps), error)
        if self.only_grids:
            return _pareto(found)
        if self.role.kind != "integer":
            for levels in _LEVELS:
                clustered = k_means(sample, levels)
                book = 8.0 * self.array.itemsize * levels
                bits = self._coded_bits(clustered.codes, book, times)
                add("codebook", levels, bits, _power(clustered.dense() - sample))
        if self.array.dtype == np.float32:
            for how, rounded in _ROUNDED.items():
                add(how, 0, _stored_bits(rounded(self.array)), _power(rounded(sample) - sample))
        return _pareto(found)

    def write(self, candidate: Candidate, *, diffuse: bool = True) -> Written:
        """Writes the weight in one of its encodings.

        Args:
            candidate: one of `candidates`.
            diffuse: whether rounding errors are chosen to cancel in sums; each is larger then.
        """
        array = self.array
        how, parameter = candidate.how, candidate.parameter
        if how == "kept":
            return Written(array, None, candidate.bits)
        if how in _ROUNDED:
            return Written(_ROUNDED[how](array), None, candidate.bits)
        if how == "codebook":
            clustered = k_means(array, parameter)
            book = 8.0 * array.itemsize * parameter
            bits = self._coded_bits(clustered.codes, book, 1)
            return Written(clustered.dense(), clustered, bits)
        steps = self._steps(how, parameter)
        u = self.rows / steps.reshape(-1, 1, 1)
        metric = self._metric if diffuse else None
        codes = grid_codes(u, *self._multiples(*self._bounds, parameter), metric=metric)
        return self.on_grid(codes, steps, parameter)

    def on_grid(
        self, codes: NDArray[np.integer[Any]], steps: NDArray[np.float32], parameter: int = 1
    ) -> Written:
        """The weight as whole multiples of a step.

        Args:
            codes: of the shape of `rows`.
            steps: one for each row.
            parameter: the step of an integer weight.
        """
        array, dtype = self.array, self.array.dtype
        bits = self._coded_bits(codes, self._book_bits(np.unique(codes).size, steps), 1)
        whole = self.unfolded(codes)
        if self.role.zero_point is not None:
            values = self.role.zero_point + whole.astype(np.int64) * parameter
            return Written(values.astype(dtype), None, bits)
        if dtype != np.float32:
            quantized = _quantized(whole, float(steps[0]), dtype)
            return Written(quantized.dense(), quantized, bits)
        axes = self.role.layout.rows if np.ptp(steps) and self.role.layout else ()
        every = self.unfolded(np.broadcast_to(steps.reshape(-1, 1, 1), codes.shape))
        scale = every[tuple(slice(None if a in axes else 1) for a in range(array.ndim))]
        quantized = replace(_quantized(whole, 1.0, dtype), scale=np.ascontiguousarray(scale))
        return Written(quantized.dense(), quantized, bits)

    def in_blocks(self, codes: NDArray[np.int16], steps: NDArray[np.float32]) -> Written:
        """The weight as multiples of a step for each element; both have the shape of `rows`."""
        quantized = replace(
            _quantized(self.unfolded(codes), 1.0, self.array.dtype), scale=self.unfolded(steps)
        )
        book = _SCALE_BITS * np.unique(steps).size + _entropy_bits(steps[:, ::BLOCK])
        return Written(quantized.dense(), quantized, self._coded_bits(codes, book, 1))

    def pruned(self, gone: NDArray[np.bool_]) -> Weight:
        """The weight with zeros where `gone` is true, and other elements to compensate for them.

        Where a kernel loses an element, its neighbours, whose inputs are similar, change: the
        metric's cost is minimised over the remaining elements, by projected gradient steps with
        momentum (Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009). Integers keep their values: they
        would have to be rounded again.
        """
        if self.role.zero_point is not None:
            zero = self.role.zero_point.astype(self.array.dtype)
            return replace(self, array=np.where(gone, zero, self.array))
        left = np.where(gone, np.zeros((), self.array.dtype), self.array)
        metric = self._metric
        if metric is None or self.rows.shape[2] == 1:
            return replace(self, array=left)
        kernel = metric.kernel / np.linalg.eigvalsh(metric.kernel)[-1]
        free = self._folded(~gone & (self.array != 0)).reshape(self.rows.shape)
        now = ahead = self.rows * free
        momentum = 1.0
        for _ in range(_ROUNDS):
            following = ahead + free * ((self.rows - ahead) @ kernel)
            grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = following + np.float32((momentum - 1) / grown) * (following - now)
            now, momentum = following, grown
        limit = float(np.abs(self.rows).max())  # so that no type overflows
        compensated = self.unfolded(np.clip(now, -limit, limit))
        return replace(self, array=compensated.astype(self.array.dtype))

    # The view [rows, inner, places]

    @cached_property
    def centred(self) -> NDArray[Any]:
        """The weight with its zero point subtracted, if it has one, so that zeros are 0."""
        if self.role.zero_point is None:
            return self.array
        return self.array.astype(np.int64) - self.role.zero_point

    @cached_property
    def rows(self) -> NDArray[np.float32]:
        """The weight as [rows, inner, places]."""
        return self.rows_of(self.centred)

    def rows_of(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """Other values of the weight as [rows, inner, places]."""
        values = self._folded(array)
        layout = self.role.layout
        if layout is None:
            shape = (self.array.size, 1, 1)
        else:
            places = math.prod(self.array.shape[axis] for axis in layout.kernel)
            inner = math.prod(self.array.shape[axis] for axis in layout.inner) // layout.groups
            shape = (self.array.size // (inner * places), inner, places)
        return np.ascontiguousarray(values, np.float32).reshape(shape)

    def _folded(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view with the axes in the order rows, inner, kernel."""
        layout = self.role.layout
        if layout is None:
            return array.reshape(-1, 1, 1)
        rows, inner, kernel = layout.rows, layout.inner, layout.kernel
        if layout.groups > 1:
            first = inner[0]
            split = (layout.groups, array.shape[first] // layout.groups)
            array = array.reshape(array.shape[:first] + split + array.shape[first + 1 :])

            def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
                return tuple(axis + (axis >= first) for axis in axes)

            rows, inner, kernel = (first, *moved(rows)), moved(inner), moved(kernel)
        return array.transpose(rows + inner + kernel)

    def unfolded(self, rows: NDArray[Any]) -> NDArray[Any]:
        """What has the elements of `rows`, in the shape of the weight."""
        result = np.empty(self.array.shape, rows.dtype)
        view = self._folded(result)
        view[...] = rows.reshape(view.shape)
        return result

    @cached_property
    def _metric(self) -> Metric | None:
        layout = self.role.layout
        if layout is None or not layout.summed:
            return None
        return Metric.of(tuple(self.array.shape[axis] for axis in layout.kernel), CORRELATION, MEAN)

    # Grids

    def _grids(self) -> Iterator[tuple[str, int]]:
        """Every grid to try: (how, parameter)."""
        if self.role.kind == "integer":
            yield from (("grid", step) for step in range(1, 65))
            return
        typical = _index(math.sqrt(_power(self.rows) / self.rows.size))
        indices = range(typical - 28, typical + 10)
        yield from (("grid", index) for index in indices)
        layout = self.role.layout
        if self.array.dtype == np.float32 and layout is not None and layout.groups == 1:
            yield from (("channel grid", index) for index in indices)

    def _on_grids(
        self, sample: NDArray[np.float32], picked: NDArray[np.int64]
    ) -> Iterator[tuple[str, int, NDArray[np.int64], float]]:
        """Each grid: (how, parameter), how often each code occurs, and the squared error.

        Args:
            sample: some elements, in the order of `rows`.
            picked: their places.
        """
        if self.role.kind == "integer":
            low, high = (self._picked(bound, picked) for bound in self._bounds)
            for how, step in self._grids():
                bounds = self._multiples(low, high, step)
                codes = grid_codes((sample / np.float32(step)).reshape(-1, 1, 1), *bounds)
                error = _power(codes.reshape(-1) * np.float32(step) - sample)
                yield how, step, np.unique(codes, return_counts=True)[1], error
            return
        row = picked // self.rows[0].size
        prepared: dict[tuple[str, int], Sorted] = {}
        for how, parameter in self._grids():
            # steps have four mantissas: those of an octave more are twice as large
            octave, place = divmod(parameter, len(_MANTISSAS))
            if (how, place) not in prepared:
                relative = (self._steps(how, place) / _step(np.array(place)))[row]
                prepared[how, place] = Sorted(sample / relative, np.square(relative))
            common = math.ldexp(float(_step(np.array(place))), octave)
            yield how, parameter, *prepared[how, place].on_grid(common)

    def _steps(self, how: str, parameter: int) -> NDArray[np.float32]:
        """The step of each row."""
        if self.role.kind == "integer":
            return np.full(len(self.rows), parameter, np.float32)
        if how == "grid":
            return np.full(len(self.rows), _step(np.array(parameter)), np.float32)
        rms = np.sqrt(np.square(self.rows, dtype=np.float64).mean((1, 2)))
        # An all-zero row needs no precision, but a step that is a number.
        relative = np.maximum(rms / math.sqrt(np.square(rms).mean()), 1 / _SPAN)
        return _step(parameter + np.rint(4 * np.log2(relative)).astype(np.int64))

    def _book_bits(self, levels: int, steps: NDArray[np.float32]) -> float:
        """Bits of codebook and scale; one codebook of integers serves all float32 grids."""
        if self.array.dtype != np.float32:
            return 8.0 * self.array.itemsize * levels
        return float(levels + _SCALE_BITS * (steps.size if np.ptp(steps) else 1))

    @cached_property
    def _bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Least and greatest value, in the view; for integers, the range of their type."""
        if self.role.zero_point is None:
            return np.array(-MOST_STEPS), np.array(MOST_STEPS)
        limits = np.iinfo(self.array.dtype)
        return tuple(  # type: ignore[return-value]
            self._folded(np.broadcast_to(limit - self.role.zero_point, self.array.shape)).reshape(
                self.rows.shape
            )
            for limit in (limits.min, limits.max)
        )

    def _picked(self, bound: NDArray[np.int64], picked: Any) -> NDArray[np.int64]:
        return bound if not bound.ndim else bound.reshape(-1)[picked].reshape(-1, 1, 1)

    def code_bounds(self, parameter: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Smallest and largest code at a step of integers, broadcastable to `rows`."""
        return self._multiples(*self._bounds, parameter)

    def _multiples(
        self, low: NDArray[np.int64], high: NDArray[np.int64], parameter: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bounds of the codes."""
        if self.role.kind != "integer":
            return low, high
        return -(-low // parameter), high // parameter

    def _coded_bits(self, codes: NDArray[Any], book: float, times: float) -> float:
        return CALL_BITS + _entropy_bits(codes) * times + book


def _step(index: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.ldexp(_MANTISSAS[index % 4], index // 4).astype(np.float32)


def _index(step: float) -> int:
    """The index of about the nearest step."""
    return round(4 * math.log2(step))


def _power(values: NDArray[Any]) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _bfloat16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Finite float32 values rounded to the nearest with 8 bits of significand, ties to even."""
    with np.errstate(over="ignore"):
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _float16(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).astype(np.float32)


_ROUNDED = {"bfloat16": _bfloat16, "float16": _float16}


def _entropy_bits(values: NDArray[Any]) -> float:
    """The least bits that coding a sequence takes."""
    return entropy_bits(np.unique(values, return_counts=True)[1])


def _stored_bits(values: NDArray[Any]) -> float:
    """Bits of a weight that is not on a grid: of all its elements, or of the nonzero ones.

    Exponents are coded, the other bits are stored as they are; integers are coded.
    """
    if values.dtype.kind == "i":
        coded = CALL_BITS + _entropy_bits(values) + 8 * np.unique(values).size
        return min(8.0 * values.size, coded)
    nonzero = values != 0
    found = np.ascontiguousarray(values[nonzero])
    positions = 0.0 if nonzero.mean() > 0.9 else _entropy_bits(nonzero)
    each, symbols = 8.0 * values.itemsize, None
    if values.dtype == np.float32:
        bits = found.view(np.uint32)
        each, symbols = 24.0, bits >> 23 & 0xFF
        if (_float16(found) == found).all():
            each, symbols = 8.0, found.astype(np.float16).view(np.uint16) >> 8
        elif not (bits & 0xFFFF).any():
            each = 8.0
    elif values.itemsize == 2:
        each, symbols = 8.0, found.view(np.uint16) >> 8
    coded = positions + each * found.size
    if symbols is not None:
        coded += _entropy_bits(symbols) + 8 * np.unique(symbols).size
    return float(min(8.0 * values.itemsize * values.size, CALL_BITS + coded))


def _pareto(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    """The candidates that no other one beats in both bits and error."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.bits, one.error)):
        if not best or candidate.error < best[-1].error:
            best.append(candidate)
    return tuple(best)


def _quantized(whole: NDArray[Any], step: float, dtype: np.dtype[Any]) -> Quantized:
    """Codes and codebook of multiples of a step, in the weight's type."""
    levels, place = np.unique(whole, return_inverse=True)
    values = (levels * np.float64(step)).astype(dtype)
    # In a narrow type, neighbouring levels may become equal, or zero.
    codebook, index = np.unique(values[values != 0], return_inverse=True)
    codes = np.zeros(levels.size, np.int64)
    codes[values != 0] = 1 + index.reshape(-1)
    return Quantized(codes[place.reshape(whole.shape)], codebook)
