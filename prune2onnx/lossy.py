"""Approximates a trained model's weights without training: fewer levels, zeros, half precision.

How much a weight may lose is one problem for all weights together (rate and distortion; Shoham and
Gersho, IEEE Trans. ASSP 36, 1988): each weight has a table of ways to be written (`ways`), and in
the best choice every weight trades error for bits at one slope. So a single number, be it bits or
an error, spreads over the layers by itself.

What is compared between weights is ||dW||^2 / ||W||^2: to random inputs a linear layer's noise
relative to its signal is the relative error of its weight, and the noise of many layers adds up in
squares on its way to the outputs.

The result is a plain dense model, which `pack` codes without further loss. Nothing here runs a
model: `search` is given a function that does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.inline import is_packed
from prune2onnx.quantize import Quantized, to_half
from prune2onnx.roles import Role, roles
from prune2onnx.ways import CALL_BITS, Way, Weight, Written

_FEWEST = 32  # elements of a weight that is worth a table of ways
_FEWEST_HALVED = 16  # elements of a vector; pack leaves smaller ones dense
_HALF_PRECISION = 2.0**-10  # what rounding to float16 may change, relative to an element
_CORRECTIONS = 3  # codes whose errors cancel take a little more than the table says
_LEAST_BITS, _FIRST_BITS, _MOST_BITS = 0.5, 5.0, 33.0  # of a search; more keeps every weight
_CLOSE_BITS, _CLOSE_ERROR = 0.02, 0.98  # where a search has settled
_FINEST, _COARSEST = 2.0**-100, 2.0**20  # slopes: relative squared error per bit


@dataclass(frozen=True)
class Approximated:
    """What became of one initializer.

    Attributes:
        name: the initializer's.
        shape: its extents.
        how: "grid", "channel grid", "codebook", "float16" (see `ways.Way`), "pruned" or "kept".
        reason: why it may not be touched; "" for all others.
        nnz: elements that are not zero (of integers: not the zero point).
        relative_error: ||W' - W||_2 / ||W||_2 against the initializer that was given.
        nbytes: estimated bytes in the file: entropy of the codes, codebook, scale, call.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    reason: str
    nnz: int
    relative_error: float
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Approximation:
    """A model with approximated weights.

    Attributes:
        model: the model given, with other values in some initializers.
        quantized: of the weights that have codes: `quantized[name].dense()` is the initializer,
            bit for bit.
        rows: one per initializer, in the model's order.
        bits: estimated bits per element of all weights that may be touched, without their calls.
        output_error: what `evaluate` said of this model, in `search`; else None.
    """

    model: ModelProto
    quantized: Mapping[str, Quantized]
    rows: tuple[Approximated, ...]
    bits: float
    output_error: float | None = None

    @property
    def nbytes(self) -> int:
        """Estimated bytes of all initializers."""
        return sum(row.nbytes for row in self.rows)


def approximate(
    model: ModelProto,
    *,
    bits: float | None = None,
    prune: float | None = None,
    max_rel_error: float | None = None,
) -> Approximation:
    """Approximates weights: to a size, to an error each, or by zeros alone.

    Zeros stay zeros, int8 and uint8 weights stay on their grid (on a coarser part of it), every
    tensor keeps its type. With `bits` or an error, biases and the factors of normalisations are
    rounded to float16 where that is within the error and changes no element by more than 0.1 %,
    so that a variance stays a positive number. Everything else stays as it is.

    Args:
        model: not modified; unpacked, external data loaded. Weights have to be initializers of
            the main graph (see `intake`).
        bits: 1 to 8, fractions too: all weights together take as many bits as codes of that
            width would; those whose error matters more get more of them.
        prune: D, 0 <= D < 1: this share of all weights' elements becomes zero, zeros that are
            there included; first those of the smallest LAMP score (Lee et al., arXiv 2010.07611),
            w^2 over the sum of squares of all in the same tensor that are not smaller, so that no
            layer runs dry.
        max_rel_error: E, above 0: each weight takes the fewest bits with ||dW|| <= E ||W||, where
            W is what pruning has left.

    Returns:
        Deterministic.

    Raises:
        RecipeError: an argument is out of range, none is given, or bits and an error are.
        Prune2OnnxError: the model is packed, or external data are missing.
    """
    if bits is not None and max_rel_error is not None:
        raise RecipeError("bits and a relative error: give one of them, it settles the other")
    if bits is None and max_rel_error is None and prune is None:
        raise RecipeError("nothing to do: give bits, a share to prune or a relative error")
    if bits is not None and not 1 <= bits <= 8:
        raise RecipeError(f"{bits} bits for each weight, expected 1 to 8")
    _check_error(max_rel_error)
    subject = _Subject(model, prune)
    if bits is not None:
        asked = bits
        made = subject.rounded(subject.within(asked))
        for _ in range(_CORRECTIONS):
            if made.bits <= bits:
                break
            asked -= 1.1 * (made.bits - bits)
            made = subject.rounded(subject.within(asked))
        return made
    if max_rel_error is not None:
        return subject.rounded_each(max_rel_error)
    return subject.result({}, halve=0.0)


def search(
    model: ModelProto,
    evaluate: Callable[[ModelProto], float],
    limit: float,
    *,
    prune: float | None = None,
    evaluations: int = 10,
    single: int = 32,
) -> Approximation:
    """Finds the fewest bits with which a model's outputs stay within an error.

    One slope for all weights; about one bit more for each weight halves the outputs' error, so
    each trial is placed where the last ones predict the limit.

    Args:
        model: as for `approximate`.
        evaluate: a model -> ||Y' - Y||_2 / ||Y||_2, its outputs against those of the model given.
        limit: above 0: the largest error to accept.
        prune: as for `approximate`.
        evaluations: the most calls of `evaluate`, at least 2.
        single: a model of no more weights than this is evaluated once for each weight, too, to
            measure what that weight alone does to the outputs; this then takes the place of the
            relative error when weights are compared (4 to 20 % fewer bytes on the models tried).

    Returns:
        Of the trials within the limit the one with the fewest bits; deterministic if `evaluate`
        is.

    Raises:
        RecipeError: an argument is out of range.
        Prune2OnnxError: no trial was within the limit; or as for `approximate`.
    """
    _check_error(limit)
    if evaluations < 2:
        raise RecipeError(f"{evaluations} evaluations, expected 2 or more")
    subject = _Subject(model, prune)

    tried: list[Approximation] = []

    def trial(bits: float) -> float:
        made = subject.rounded(subject.within(bits))
        error = float(evaluate(made.model))
        tried.append(replace(made, output_error=error if math.isfinite(error) else math.inf))
        # where an error of half as much for each bit meets the limit; never far from here
        return bits + math.log2(min(max(error / limit, 1 / 8), 8.0)) if error == error else bits + 3

    low, high, bits = _LEAST_BITS, _MOST_BITS, _FIRST_BITS
    if 0 < len(subject.weights) <= single:
        bits = min(max(trial(bits), low), high)
        subject.measure(evaluate, subject.within(bits))
    while len(tried) < evaluations and high - low > _CLOSE_BITS:
        guess = trial(bits)
        error = tried[-1].output_error or 0.0
        if _CLOSE_ERROR * limit <= error <= limit:
            break
        if error <= limit:
            high = bits
        else:
            low = bits
        room = min((high - low) / 8, 0.25)
        bits = min(max(guess, low + room), high - room)
    within = [made for made in tried if (made.output_error or 0.0) <= limit]
    if not within:
        best = min(tried, key=lambda made: made.output_error or 0.0)
        raise Prune2OnnxError(
            f"the outputs err by {best.output_error:.3g} with {best.bits:.1f} bits for each "
            f"weight, {limit:.3g} was asked for; allow more, or prune less"
        )
    return min(within, key=lambda made: made.nbytes)


def _check_error(error: float | None) -> None:
    if error is not None and not 0 < error < math.inf:
        raise RecipeError(f"a relative error of {error}, expected a number above 0, such as 0.01")


class _Subject:
    """A model on the way: its weights, pruned, with their tables."""

    def __init__(self, model: ModelProto, prune: float | None) -> None:
        if prune is not None and not 0 <= prune < 1:
            raise RecipeError(f"a share of {prune} to prune, expected 0 <= D < 1, such as 0.5")
        if is_packed(model):
            raise Prune2OnnxError("the model is packed; unpack it before it is approximated")
        self.model = model
        self.roles = roles(model)
        self.arrays: dict[str, NDArray[Any]] = {}
        self.weights: dict[str, Weight] = {}
        for tensor in model.graph.initializer:
            role = self.roles[tensor.name]
            if not role.kind:
                continue
            array = _array(tensor)
            reason = ""
            if role.kind in ("weight", "integer") and array.size < _FEWEST:
                reason = f"{array.size} elements are too few to gain from"
            elif not np.isfinite(array).all():
                reason = "it holds NaN or infinity"
            if reason:
                self.roles[tensor.name] = Role("", reason)
                continue
            self.arrays[tensor.name] = array
            if role.kind in ("weight", "integer"):
                self.weights[tensor.name] = Weight(array, role)
        if prune:
            self.weights = _pruned(self.weights, prune)
        self.importance = dict.fromkeys(self.weights, 1.0)

    # Choosing

    def within(self, bits: float) -> dict[str, Way]:
        """The ways with the least error that take no more than so many bits per element.

        Codes of uniform width would have to be called and named too, so that is not counted.
        """
        size = sum(weight.array.size for weight in self.weights.values())
        budget = bits * size + CALL_BITS * len(self.weights)
        fine, coarse = math.log2(_FINEST), math.log2(_COARSEST)
        for _ in range(60):
            middle = (fine + coarse) / 2
            if _bits(self._at(2.0**middle).values()) <= budget:
                coarse = middle
            else:
                fine = middle
        chosen = self._at(2.0**coarse)
        # What the slope leaves of the budget goes where it buys most.
        while steps := list(self._finer(chosen, budget - _bits(chosen.values()))):
            name, way = max(steps, key=lambda step: self._worth(step[0], chosen[step[0]], step[1]))
            chosen[name] = way
        return chosen

    def _at(self, slope: float) -> dict[str, Way]:
        return {
            name: min(
                weight.ways, key=lambda way: self.importance[name] * way.error + slope * way.bits
            )
            for name, weight in self.weights.items()
        }

    def _finer(self, chosen: Mapping[str, Way], spare: float) -> Iterable[tuple[str, Way]]:
        for name, way in chosen.items():
            ways = self.weights[name].ways
            following = ways.index(way) + 1
            if following < len(ways) and ways[following].bits - way.bits <= spare:
                yield name, ways[following]

    def _worth(self, name: str, way: Way, finer: Way) -> float:
        return self.importance[name] * (way.error - finer.error) / (finer.bits - way.bits)

    def measure(self, evaluate: Callable[[ModelProto], float], chosen: Mapping[str, Way]) -> None:
        """Sets each weight's importance to what its error does to the outputs by itself."""
        for name, way in chosen.items():
            if not way.error:
                continue
            alone = {other: self.weights[other].ways[-1] for other in chosen} | {name: way}
            error = float(evaluate(self.rounded(alone, halve=0.0).model))
            if math.isfinite(error):
                self.importance[name] = max(error**2, 1e-12) / way.error

    # Writing

    def rounded(self, chosen: Mapping[str, Way], halve: float = math.inf) -> Approximation:
        """All weights in the ways chosen."""
        written = {name: weight.write(chosen[name]) for name, weight in self.weights.items()}
        hows = {name: way.how for name, way in chosen.items()}
        return self.result(written, hows, halve=halve)

    def rounded_each(self, limit: float) -> Approximation:
        """Each weight in the way with the fewest bits whose own error is within the limit.

        Rounding errors are not made to cancel: each would be larger for it.
        """
        written, hows = {}, {}
        for name, weight in self.weights.items():
            allowed = limit * _norm(weight.centred)
            for way in weight.ways:  # by rising bits; the last one errs by nothing
                if math.sqrt(way.error) > 1.1 * limit and way.how != "kept":
                    continue
                made = weight.write(way, diffuse=False)
                if _distance(made.array, weight.array) <= allowed:
                    written[name], hows[name] = made, way.how
                    break
        return self.result(written, hows, halve=limit)

    def result(
        self,
        written: Mapping[str, Written],
        hows: Mapping[str, str] | None = None,
        *,
        halve: float,
    ) -> Approximation:
        """The model with what was written, and float16 vectors where they err by no more."""
        model = ModelProto()
        model.CopyFrom(self.model)
        rows, quantized = [], {}
        touched = bits = 0.0
        for tensor in model.graph.initializer:
            name, role = tensor.name, self.roles[tensor.name]
            if not role.kind:
                nbytes = tensor.ByteSize()
                shape = tuple(tensor.dims)
                rows.append(Approximated(name, shape, "kept", role.reason, -1, 0.0, nbytes))
                continue
            original = new = self.arrays[name]
            how, nbits = "kept", 8.0 * original.nbytes
            if name in self.weights:
                weight = self.weights[name]
                made = written.get(name)
                new = made.array if made else weight.array
                how = (hows or {}).get(name, "kept")
                nbits = made.bits if made else weight.ways[-1].bits
                if how == "kept" and new is not original:
                    how = "pruned"
                if made and made.quantized:
                    quantized[name] = made.quantized
                touched += original.size
                bits += nbits - CALL_BITS
            elif (half := _halved(original, role.kind, halve)) is not None:
                new, how, nbits = half, "float16", 4.0 * original.nbytes
            if new is not original:
                _replace(tensor, new)
            zero = 0 if role.zero_point is None else role.zero_point
            nnz = int(np.count_nonzero(new != zero))
            norm = (
                _norm(original)
                if role.zero_point is None
                else _norm(original.astype(np.int64) - role.zero_point)
            )
            error = _distance(new, original) / norm if norm else 0.0
            rows.append(Approximated(name, new.shape, how, "", nnz, error, math.ceil(nbits / 8)))
        return Approximation(model, quantized, tuple(rows), max(0.0, bits) / max(touched, 1.0))


def _bits(ways: Iterable[Way]) -> float:
    return sum(way.bits for way in ways)


def _array(tensor: TensorProto) -> NDArray[Any]:
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise Prune2OnnxError(
            f"{tensor.name}: its data cannot be read: {one_line(error)}; load external data "
            "first, or export the model again"
        ) from error


def _replace(tensor: TensorProto, array: NDArray[Any]) -> None:
    """Other values in the same tensor: name, type, notes stay."""
    data = numpy_helper.from_array(np.ascontiguousarray(array)).raw_data
    for typed in ("float_data", "int32_data", "double_data"):
        tensor.ClearField(typed)
    tensor.raw_data = data


def _halved(array: NDArray[Any], kind: str, limit: float) -> NDArray[Any] | None:
    """A bias or factor rounded to float16, or None where that is not worth it or not safe."""
    if limit <= 0 or array.dtype != np.float32 or array.size < _FEWEST_HALVED:
        return None
    half = to_half(array)
    if half is None:
        return None
    off = np.abs(half - array)
    # What is added counts as a whole; a factor, such as a variance, must not change much anywhere.
    whole = np.sqrt(np.square(array, dtype=np.float64).mean()) if kind == "bias" else 0.0
    close = bool((off <= _HALF_PRECISION * np.maximum(np.abs(array), whole)).all())
    return half if close and _norm(off) <= limit * _norm(array) else None


def _norm(values: NDArray[Any]) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).sum()))


def _distance(new: NDArray[Any], old: NDArray[Any]) -> float:
    return _norm(new.astype(np.float64) - old.astype(np.float64))


def _pruned(weights: Mapping[str, Weight], share: float) -> dict[str, Weight]:
    """Zeroes the elements with the smallest LAMP scores of all weights together."""
    scores = {name: _lamp(weight.centred) for name, weight in weights.items()}
    every = np.concatenate([score.reshape(-1) for score in scores.values()] or [np.zeros(0)])
    count = int(share * every.size)
    if not count:
        return dict(weights)
    # Of equal scores the earlier ones go, so that the share is met exactly.
    gone = np.zeros(every.size, bool)
    gone[np.argsort(every, kind="stable")[:count]] = True
    ends = np.cumsum([weight.array.size for weight in weights.values()])
    return {
        name: weight.pruned(part.reshape(weight.array.shape))
        for (name, weight), part in zip(weights.items(), np.split(gone, ends[:-1]), strict=True)
    }


def _lamp(values: NDArray[Any]) -> NDArray[np.float64]:
    """w^2 over the sum of squares of all elements that are not smaller (arXiv 2010.07611)."""
    squares = np.square(values.reshape(-1), dtype=np.float64)
    order = np.argsort(squares, kind="stable")
    sums = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty(values.size)
    scores[order] = squares[order] / np.where(sums > 0, sums, 1)
    return scores.reshape(values.shape)
