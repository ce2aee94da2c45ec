"""The ways in which one weight can be written, each with its bits and its error.

A weight is seen as [rows, inner, places]: its outputs, the inputs that each adds up, and the
neighbouring places of each input. Which way is taken is `lossy`'s business, which elements meet in
a sum `roles`'s, and how codes are rounded `quantize`'s.
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

from prune2onnx.quantize import (
    MOST_STEPS,
    Metric,
    Quantized,
    entropy_bits,
    grid_codes,
    share_values,
)
from prune2onnx.roles import Role

LIKENESS, MEAN = 0.6, 0.1
"""The model of a layer's inputs (`quantize.Metric`). Measured on ResNet-20, ResNet-32 and a face
detector: anything from 0.5 to 0.8 and 0.05 to 0.3 does about as well."""

CALL_BITS = 8 * 32
"""What a coded weight takes whatever its size: name, places in the call, a table of codewords."""

_SAMPLE = 1 << 16  # elements from which the table of a large weight is estimated
_SCALE_BITS = 16.0  # of a factor; as steps are chosen, each is a float16 number
_WORST = 0.9  # relative squared error from which on a weight is destroyed rather than rounded
_LEVELS = (1, 2, 3, 4, 6, 8, 12, 16)  # of codebooks; above, a grid takes fewer bits at equal error
_SPAN = 2.0**10  # from the coarsest to the finest step of a weight's outputs
_ROUNDS = 40  # of making up for pruned elements; more change nothing that shows in outputs

# Steps of all grids, four to an octave: all are float16 numbers, so scales take two bytes, and most
# of their multiples are.
_MANTISSAS = np.array([16, 19, 23, 27]) / 16


@dataclass(frozen=True)
class Way:
    """One way to write a weight.

    Attributes:
        how: "grid": multiples of one step; "channel grid": of one for each output, in proportion
            to its weights; "codebook"; "float16", "bfloat16": rounded to that type; "kept".
        parameter: the step's number; of an integer weight, the step; of a codebook, its levels.
        bits: estimated bits in the file: entropy of the codes or exponents, codebook, scale.
        error: ||dW||^2 / ||W||^2.
    """

    how: str
    parameter: int
    bits: float
    error: float


@dataclass(frozen=True, eq=False)
class Written:
    """A weight in one of its ways: the dense array, its codes where it has them, its real bits."""

    array: NDArray[Any]
    quantized: Quantized | None
    bits: float


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight and what is known of its place.

    Attributes:
        array: its values, any float type, int8 or uint8; finite.
        role: of kind "weight" or "integer".
    """

    array: NDArray[Any]
    role: Role

    @cached_property
    def ways(self) -> tuple[Way, ...]:
        """The ways worth taking, by rising bits and falling error; the last is to keep it.

        Of a large weight they are estimated from a sample, the same every time.
        """
        found = [Way("kept", 0, _stored_bits(self.centred), 0.0)]
        size = self.array.size
        picked: Any = np.arange(size)
        if size > _SAMPLE:
            picked = np.sort(np.random.default_rng(0).choice(size, _SAMPLE, replace=False))
        sample = self._rows.reshape(-1)[picked]
        row = picked // self._rows[0].size
        total = _power(sample)
        # Below, steps are no normal numbers; an all-zero weight is small already.
        if not total > 1e-60 * size:
            return tuple(found)
        low, high = (self._picked(bound, picked) for bound in self._bounds)

        def add(how: str, parameter: int, bits: float, values: NDArray[Any]) -> None:
            error = _power(values - sample) / total
            if error <= _WORST:  # of values that overflowed it is infinite
                found.append(Way(how, parameter, bits, error))

        for how, parameter in self._grids():
            steps = self._steps(how, parameter)
            step = steps[row]
            codes = grid_codes(
                (sample / step).reshape(-1, 1, 1), *self._multiples(low, high, parameter)
            )
            flat = codes.reshape(-1)
            bits = self._coded_bits(flat, self._book_bits(flat, steps), size / sample.size)
            add(how, parameter, bits, flat * step)
        if self.role.kind != "integer":
            for levels in _LEVELS:
                shared = share_values(sample, levels)
                book = 8.0 * self.array.itemsize * levels
                bits = self._coded_bits(shared.codes, book, size / sample.size)
                add("codebook", levels, bits, shared.dense())
        if self.array.dtype == np.float32:
            for how, rounded in _ROUNDED.items():
                add(how, 0, _stored_bits(rounded(self.array)), rounded(sample))
        return _falling(found)

    def write(self, way: Way, *, diffuse: bool = True) -> Written:
        """Writes the weight in one of its ways.

        Args:
            way: one of `ways`.
            diffuse: whether rounding errors are chosen to cancel in sums; each is larger then.
        """
        array, dtype = self.array, self.array.dtype
        if way.how == "kept":
            return Written(array, None, way.bits)
        if way.how in _ROUNDED:
            return Written(_ROUNDED[way.how](array), None, way.bits)
        if way.how == "codebook":
            shared = share_values(array, way.parameter)
            book = 8.0 * array.itemsize * way.parameter
            return Written(shared.dense(), shared, self._coded_bits(shared.codes, book, 1))
        steps = self._steps(way.how, way.parameter)
        u = self._rows / steps.reshape(-1, 1, 1)
        metric = self._metric if diffuse else None
        codes = grid_codes(u, *self._multiples(*self._bounds, way.parameter), metric=metric)
        bits = self._coded_bits(codes, self._book_bits(codes, steps), 1)
        whole = self._unfolded(codes)
        if self.role.zero_point is not None:
            values = self.role.zero_point + whole.astype(np.int64) * way.parameter
            return Written(values.astype(dtype), None, bits)
        if dtype != np.float32:
            quantized = _quantized(whole, float(steps[0]), dtype)
            return Written(quantized.dense(), quantized, bits)
        axes = self.role.layout.rows if np.ptp(steps) and self.role.layout else ()
        every = self._unfolded(np.broadcast_to(steps.reshape(-1, 1, 1), u.shape))
        scale = every[tuple(slice(None if a in axes else 1) for a in range(array.ndim))]
        quantized = replace(_quantized(whole, 1.0, dtype), scale=np.ascontiguousarray(scale))
        return Written(quantized.dense(), quantized, bits)

    def pruned(self, gone: NDArray[np.bool_]) -> Weight:
        """The weight with zeros where `gone` is true, the others making up for them.

        Where a kernel loses an element, its neighbours, which see about the same input, take over
        part of it: the metric's cost is minimised over what is left, by projected gradient steps
        with momentum (Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009). Integers keep their
        values: they would have to be rounded again.
        """
        if self.role.zero_point is not None:
            zero = self.role.zero_point.astype(self.array.dtype)
            return Weight(np.where(gone, zero, self.array), self.role)
        left = np.where(gone, np.zeros((), self.array.dtype), self.array)
        metric = self._metric
        if metric is None or self._rows.shape[2] == 1:
            return Weight(left, self.role)
        kernel = metric.kernel / np.linalg.eigvalsh(metric.kernel)[-1]
        free = self._folded(~gone & (self.array != 0)).reshape(self._rows.shape)
        now = ahead = self._rows * free
        momentum = 1.0
        for _ in range(_ROUNDS):
            following = ahead + free * ((self._rows - ahead) @ kernel)
            grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = following + np.float32((momentum - 1) / grown) * (following - now)
            now, momentum = following, grown
        limit = float(np.abs(self._rows).max())  # no type overflows
        made_up = self._unfolded(np.clip(now, -limit, limit))
        return Weight(made_up.astype(self.array.dtype), self.role)

    # The view [rows, inner, places]

    @cached_property
    def centred(self) -> NDArray[Any]:
        """The weight with what must stay zero as zero: integers without their zero point."""
        if self.role.zero_point is None:
            return self.array
        return self.array.astype(np.int64) - self.role.zero_point

    @cached_property
    def _rows(self) -> NDArray[np.float32]:
        values = self._folded(self.centred)
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

    def _unfolded(self, rows: NDArray[Any]) -> NDArray[Any]:
        result = np.empty(self.array.shape, rows.dtype)
        view = self._folded(result)
        view[...] = rows.reshape(view.shape)
        return result

    @cached_property
    def _metric(self) -> Metric | None:
        layout = self.role.layout
        if layout is None or not layout.summed:
            return None
        return Metric.of(tuple(self.array.shape[axis] for axis in layout.kernel), LIKENESS, MEAN)

    # Grids

    def _grids(self) -> Iterator[tuple[str, int]]:
        """Every grid worth a try."""
        if self.role.kind == "integer":
            yield from (("grid", step) for step in range(1, 65))
            return
        typical = _number(math.sqrt(_power(self._rows) / self._rows.size))
        numbers = range(typical - 28, typical + 10)
        yield from (("grid", number) for number in numbers)
        layout = self.role.layout
        if self.array.dtype == np.float32 and layout is not None and layout.groups == 1:
            yield from (("channel grid", number) for number in numbers)

    def _steps(self, how: str, parameter: int) -> NDArray[np.float32]:
        """The step of each row."""
        if self.role.kind == "integer":
            return np.full(len(self._rows), parameter, np.float32)
        if how == "grid":
            return np.full(len(self._rows), _step(np.array(parameter)), np.float32)
        rms = np.sqrt(np.square(self._rows, dtype=np.float64).mean((1, 2)))
        # A row of nothing needs no precision, but some step that is a number.
        relative = np.maximum(rms / math.sqrt(np.square(rms).mean()), 1 / _SPAN)
        return _step(parameter + np.rint(4 * np.log2(relative)).astype(np.int64))

    def _book_bits(self, codes: NDArray[Any], steps: NDArray[np.float32]) -> float:
        """Bits that codebook and scale take: one codebook of integers serves all float32 grids."""
        levels: int = np.unique(codes).size
        if self.array.dtype != np.float32:
            return 8.0 * self.array.itemsize * levels
        return float(levels + _SCALE_BITS * (steps.size if np.ptp(steps) else 1))

    @cached_property
    def _bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Least and greatest value, in the view; of integers what their type leaves."""
        if self.role.zero_point is None:
            return np.array(-MOST_STEPS), np.array(MOST_STEPS)
        limits = np.iinfo(self.array.dtype)
        return tuple(  # type: ignore[return-value]
            self._folded(np.broadcast_to(limit - self.role.zero_point, self.array.shape)).reshape(
                self._rows.shape
            )
            for limit in (limits.min, limits.max)
        )

    def _picked(self, bound: NDArray[np.int64], picked: Any) -> NDArray[np.int64]:
        return bound if not bound.ndim else bound.reshape(-1)[picked].reshape(-1, 1, 1)

    def _multiples(
        self, low: NDArray[np.int64], high: NDArray[np.int64], parameter: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bounds of the codes."""
        if self.role.kind != "integer":
            return low, high
        return -(-low // parameter), high // parameter

    def _coded_bits(self, codes: NDArray[Any], book: float, share: float) -> float:
        return CALL_BITS + entropy_bits(codes) * share + book


def _step(number: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.ldexp(_MANTISSAS[number % 4], number // 4).astype(np.float32)


def _number(step: float) -> int:
    """Of the step that is nearest, about."""
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


def _stored_bits(values: NDArray[Any]) -> float:
    """Bits of a weight that is not on a grid: of all its elements, or of the nonzero ones.

    Exponents are coded, other bits stand as they are; integers are coded.
    """
    if values.dtype.kind == "i":
        coded = CALL_BITS + entropy_bits(values) + 8 * np.unique(values).size
        return min(8.0 * values.size, coded)
    nonzero = values != 0
    found = np.ascontiguousarray(values[nonzero])
    positions = 0.0 if nonzero.mean() > 0.9 else entropy_bits(nonzero)
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
        coded += entropy_bits(symbols) + 8 * np.unique(symbols).size
    return float(min(8.0 * values.itemsize * values.size, CALL_BITS + coded))


def _falling(ways: list[Way]) -> tuple[Way, ...]:
    """Those that no other way beats in both bits and error."""
    best: list[Way] = []
    for way in sorted(ways, key=lambda way: (way.bits, way.error)):
        if not best or way.error < best[-1].error:
            best.append(way)
    return tuple(best)


def _quantized(whole: NDArray[Any], step: float, dtype: np.dtype[Any]) -> Quantized:
    """Codes and codebook of multiples of a step, in the weight's type."""
    levels, place = np.unique(whole, return_inverse=True)
    values = (levels * np.float64(step)).astype(dtype)
    # In a narrow type neighbours may have become one number, or zero.
    codebook, index = np.unique(values[values != 0], return_inverse=True)
    codes = np.zeros(levels.size, np.int64)
    codes[values != 0] = 1 + index.reshape(-1)
    return Quantized(codes[place.reshape(whole.shape)], codebook)
