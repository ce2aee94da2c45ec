"""A model that is approximated: its weights with their candidate encodings, and how it is written.

Which of the candidates, is up to the callers: `approximate` without data, `calibration` with them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.protobuf import tensor_nbytes
from prune2onnx.graph.tensors import array_of
from prune2onnx.graph.tensors import replace as replace_values
from prune2onnx.packing.approximation.candidates import CALL_BITS, Candidate, Weight, Written
from prune2onnx.packing.approximation.roles import Role, roles
from prune2onnx.packing.approximation.rounding import to_half
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.quantized import Quantized

_FEWEST = 32  # elements of a weight that is approximated; smaller ones save nothing
_FEWEST_HALVED = 16  # elements of a vector; pack leaves smaller ones dense
_HALF_PRECISION = 2.0**-10  # the most that rounding to float16 may change, relative to an element
_WORTH_A_NOTE = 0.005  # share of the bytes
_FINEST, _COARSEST = 2.0**-100, 2.0**20  # slopes: relative squared error per bit


@dataclass(frozen=True)
class Approximated:
    """The result for one initializer.

    Attributes:
        name: the initializer's.
        shape: its extents.
        how: its encoding (`candidates.Candidate.how`), "pruned" or "kept".
        reason: why it may not be changed; "" for all others.
        nnz: elements that are not zero (for integers: not the zero point).
        relative_error: ||W' - W||_2 / ||W||_2 against the initializer that was given.
        nbytes: estimated bytes in the file: entropy of the codes, codebook, scale, call.
        layer_error: relative error of the layer's outputs on examples, for what it is given there;
            None without calibration.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    reason: str
    nnz: int
    relative_error: float
    nbytes: int
    layer_error: float | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Approximation:
    """A model with approximated weights.

    Attributes:
        model: the model given, with other values in some initializers.
        quantized: for the weights that have codes: `quantized[name].dense()` is the initializer,
            bit for bit.
        rows: one per initializer, in the model's order.
        bits: estimated bits per element of all weights that may be changed, without the bits of the
            decode call.
        output_error: relative error of the outputs, where it was measured; else None.
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

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done, in words."""
        notes = []
        if self.bits:
            size = sum(row.size for row in self.rows)
            every = 8 * self.nbytes / max(size, 1)
            stays = every > 1.02 * self.bits + 0.05
            also = f" that may change; {every:.2f} with what stays" if stays else ""
            notes.append(f"about {self.bits:.2f} bits per weight{also}")
        left: dict[str, list[Approximated]] = defaultdict(list)
        for row in self.rows:
            if row.reason and row.size >= _FEWEST:
                left[row.reason].append(row)
        total = max(self.nbytes, 1)
        for reason, rows in left.items():
            share = sum(row.nbytes for row in rows) / total
            if share >= _WORTH_A_NOTE:
                more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
                notes.append(f"{share:.0%} of the bytes stay: {rows[0].name}{more}: {reason}")
        if self.output_error is not None:
            notes.append(f"relative error of the outputs {self.output_error:.3%}")
        return tuple(notes)


def check_limits(
    *, bits: float | None = None, prune: float | None = None, error: float | None = None
) -> None:
    """Makes sure that what is asked for is in range.

    Raises:
        RecipeError: it is not.
    """
    if bits is not None and not 1 <= bits <= 8:
        raise RecipeError(f"{bits} bits for each weight, expected 1 to 8")
    if prune is not None and not 0 <= prune < 1:
        raise RecipeError(f"a fraction of {prune} to prune, expected 0 <= D < 1, such as 0.5")
    if error is not None and not 0 < error < math.inf:
        raise RecipeError(f"a relative error of {error}, expected a number above 0, such as 0.01")


Shifts = Callable[[Mapping[str, Written]], Mapping[str, NDArray[Any]]]
"""Weights that change -> biases that make up for it, by name."""


class Subject:
    """A model that is being approximated: its weights, pruned, with their candidate encodings.

    Attributes:
        importance: of each weight's error, relative to that of others.
        shifts: what biases become when weights are rounded; they stay unless it is set.

    Args:
        model: unpacked and normalized.
        prune: fraction of all weights' elements that become zero.
        on_grids: weights that have no other encodings than whole multiples of scales.

    Raises:
        RecipeError: the fraction is out of range.
        Prune2OnnxError: the model is packed.
    """

    def __init__(
        self, model: ModelProto, prune: float | None, on_grids: Collection[str] = ()
    ) -> None:
        check_limits(prune=prune)
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
            array = array_of(tensor)
            reason = ""
            if role.kind in ("weight", "integer") and array.size < _FEWEST:
                reason = f"{array.size} elements are too few to save bytes"
            elif not np.isfinite(array).all():
                reason = "it holds NaN or infinity"
            if reason:
                self.roles[tensor.name] = Role("", reason)
                continue
            self.arrays[tensor.name] = array
            if role.kind in ("weight", "integer"):
                self.weights[tensor.name] = Weight(array, role, tensor.name in on_grids)
        if prune:
            self.weights = _pruned(self.weights, prune)
        self.importance = dict.fromkeys(self.weights, 1.0)
        self.shifts: Shifts = lambda written: {}

    # Choosing

    def within(self, bits: float) -> dict[str, Candidate]:
        """The candidates with the least error that take at most so many bits per element.

        The bits of the decode call are not counted: codes of uniform width would need it, too.
        """
        budget = self._budget(bits)
        chosen = self._at(self.slope_for(bits))
        # The bits that are left at this slope go where they lower the error most.
        while steps := list(self._finer(chosen, budget - _bits(chosen.values()))):
            name, finer = max(steps, key=lambda step: self._gain(step[0], chosen[step[0]], step[1]))
            chosen[name] = finer
        return chosen

    def slope_for(self, bits: float) -> float:
        """The smallest slope at which weights take at most so many bits per element."""
        budget = self._budget(bits)
        fine, coarse = math.log2(_FINEST), math.log2(_COARSEST)
        for _ in range(60):
            middle = (fine + coarse) / 2
            if _bits(self._at(2.0**middle).values()) <= budget:
                coarse = middle
            else:
                fine = middle
        return math.exp2(coarse)

    def _budget(self, bits: float) -> float:
        size = sum(weight.array.size for weight in self.weights.values())
        return bits * size + CALL_BITS * len(self.weights)

    def _at(self, slope: float) -> dict[str, Candidate]:
        return {name: self.best_at(name, slope) for name in self.weights}

    def best_at(self, name: str, slope: float) -> Candidate:
        """A weight's best candidate at a slope: the error that a bit has to save."""
        return min(
            self.weights[name].candidates,
            key=lambda one: self.importance[name] * one.error + slope * one.bits,
        )

    def _finer(
        self, chosen: Mapping[str, Candidate], left: float
    ) -> Iterable[tuple[str, Candidate]]:
        """The next finer candidate of each weight, where the bits that are left suffice for it."""
        for name, candidate in chosen.items():
            candidates = self.weights[name].candidates
            following = candidates.index(candidate) + 1
            if following < len(candidates) and candidates[following].bits - candidate.bits <= left:
                yield name, candidates[following]

    def _gain(self, name: str, candidate: Candidate, finer: Candidate) -> float:
        """The error that a finer candidate saves per bit."""
        saved = self.importance[name] * (candidate.error - finer.error)
        return saved / (finer.bits - candidate.bits)

    def measure(
        self, evaluate: Callable[[ModelProto], float], chosen: Mapping[str, Candidate]
    ) -> None:
        """Sets each weight's importance by how much its error alone changes the outputs."""
        each = ({name: candidate} for name, candidate in chosen.items())
        for run, squared, own in self.alone(evaluate, each):
            self.importance |= dict.fromkeys(run, max(squared, 1e-12) / own)

    def alone(
        self, evaluate: Callable[[ModelProto], float], runs: Iterable[Mapping[str, Candidate]]
    ) -> Iterator[tuple[Mapping[str, Candidate], float, float]]:
        """What some weights change while all others stay.

        Args:
            evaluate: a model -> the relative error of its outputs.
            runs: the weights that change together, and how.

        Yields:
            A run that has errors, the squared error of the outputs, and that of its weights.
        """
        kept = {name: weight.candidates[-1] for name, weight in self.weights.items()}
        for run in runs:
            if own := sum(candidate.error for candidate in run.values()):
                error = float(evaluate(self.rounded({**kept, **run}, halve=0.0).model))
                if math.isfinite(error):
                    yield run, error**2, own

    # Writing

    def rounded(self, chosen: Mapping[str, Candidate], halve: float = math.inf) -> Approximation:
        """The model with all weights in the chosen encodings."""
        written = {name: weight.write(chosen[name]) for name, weight in self.weights.items()}
        hows = {name: candidate.how for name, candidate in chosen.items()}
        return self.result(written, hows, halve=halve, changed=self.shifts(written))

    def rounded_each(self, limit: float) -> Approximation:
        """The model with each weight in the fewest bits that keep its own error within the limit.

        Rounding errors are not made to cancel, since that makes each of them larger.
        """
        written, hows = {}, {}
        for name, weight in self.weights.items():
            allowed = limit * _norm(weight.centred)
            for candidate in weight.candidates:  # by rising bits; the last one has no error
                if math.sqrt(candidate.error) > 1.1 * limit and candidate.how != "kept":
                    continue
                made = weight.write(candidate, diffuse=False)
                if _distance(made.array, weight.array) <= allowed:
                    written[name], hows[name] = made, candidate.how
                    break
        return self.result(written, hows, halve=limit, changed=self.shifts(written))

    def result(
        self,
        written: Mapping[str, Written],
        hows: Mapping[str, str] | None = None,
        *,
        halve: float,
        changed: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> Approximation:
        """The model with the written weights, and vectors in float16 where the error allows it.

        Args:
            written: the weights that change.
            hows: their encodings.
            halve: the largest relative error of a vector in float16; 0 keeps all vectors.
            changed: other values of vectors.
        """
        model = ModelProto()
        model.CopyFrom(self.model)
        rows, quantized = [], {}
        touched = bits = 0.0
        for tensor in model.graph.initializer:
            name, role = tensor.name, self.roles[tensor.name]
            if not role.kind and name not in changed:
                nbytes = tensor_nbytes(tensor)
                shape = tuple(tensor.dims)
                rows.append(Approximated(name, shape, "kept", role.reason, -1, 0.0, nbytes))
                continue
            original = self.arrays[name] if name in self.arrays else array_of(tensor)
            new = changed.get(name, original)
            how, nbits = "kept", 8.0 * original.nbytes
            if name in self.weights:
                weight = self.weights[name]
                made = written.get(name)
                new = made.array if made else weight.array
                how = (hows or {}).get(name, "kept")
                nbits = made.bits if made else weight.candidates[-1].bits
                if how == "kept" and new is not original:
                    how = "pruned"
                if made and made.quantized:
                    quantized[name] = made.quantized
                touched += original.size
                bits += nbits - CALL_BITS
            elif (half := _halved(new, role.kind, halve)) is not None:
                new, how, nbits = half, "float16", 4.0 * original.nbytes
            elif name in changed:
                how = "shifted"
            if new is not original:
                replace_values(tensor, new)
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


def _bits(chosen: Iterable[Candidate]) -> float:
    return sum(candidate.bits for candidate in chosen)


def _halved(array: NDArray[Any], kind: str, limit: float) -> NDArray[Any] | None:
    """A bias or factor rounded to float16; None where that saves nothing or changes it too much."""
    if limit <= 0 or array.dtype != np.float32 or array.size < _FEWEST_HALVED:
        return None
    half = to_half(array)
    if half is None:
        return None
    off = np.abs(half - array)
    # A bias may change relative to its rms; a factor, such as a variance, relative to each element.
    whole = np.sqrt(np.square(array, dtype=np.float64).mean()) if kind == "bias" else 0.0
    close = bool((off <= _HALF_PRECISION * np.maximum(np.abs(array), whole)).all())
    return half if close and _norm(off) <= limit * _norm(array) else None


def _norm(values: NDArray[Any]) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).sum()))


def _distance(new: NDArray[Any], old: NDArray[Any]) -> float:
    return _norm(new.astype(np.float64) - old.astype(np.float64))


def _pruned(weights: Mapping[str, Weight], fraction: float) -> dict[str, Weight]:
    """Zeroes the elements with the smallest LAMP scores of all weights together."""
    scores = {name: _lamp(weight.centred) for name, weight in weights.items()}
    every = np.concatenate([score.reshape(-1) for score in scores.values()] or [np.zeros(0)])
    count = int(fraction * every.size)
    if not count:
        return dict(weights)
    # Of equal scores the earlier ones go, so that the fraction is met exactly.
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
