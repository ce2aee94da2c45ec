"""Approximates a trained model's weights without training: fewer levels, zeros, half precision.

How much each weight may lose is one problem for all weights together (rate-distortion
optimization; Shoham and Gersho, IEEE Trans. ASSP 36, 1988): each weight has a list of candidate
encodings (`candidates`), and in the best choice every weight trades error for bits at one slope. So
a single number, be it bits or an error, is distributed over the layers automatically.

The error that is compared between weights is ||dW||^2 / ||W||^2: for random inputs, the
noise-to-signal ratio of a linear layer's output is the relative error of its weight, and squared
noise adds up from layer to layer.

The result is a dense model, which `pack` codes without further loss. Nothing here runs a model:
`search` is given a function that does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

from onnx import ModelProto

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.packing.approximation.subject import Approximation, Subject, check_limits
from prune2onnx.packing.calibration.means import Means

_CORRECTIONS = 3  # codes whose errors cancel take a little more bits than estimated
_LEAST_BITS, _FIRST_BITS, _MOST_BITS = 0.5, 5.0, 33.0  # of a search; more keeps every weight
_CLOSE_BITS, _CLOSE_ERROR = 0.02, 0.98  # where a search ends


def approximate(
    model: ModelProto,
    *,
    bits: float | None = None,
    prune: float | None = None,
    max_rel_error: float | None = None,
    on_grids: Collection[str] = (),
) -> Approximation:
    """Approximates weights: to a size, to an error each, or by zeros alone.

    Zeros stay zeros, int8 and uint8 weights stay on their grid (on a coarser part of it), every
    tensor keeps its type. With `bits` or an error, biases and the factors of normalization layers
    are rounded to float16 where that is within the error and changes no element by more than 0.1 %,
    so that a variance stays a positive number. Everything else stays as it is.

    Args:
        model: not modified; unpacked, external data loaded. Weights have to be initializers of
            the main graph (see `graph.normalize`).
        bits: 1 to 8, fractions too: all weights together take as many bits as codes of that
            width would; those with more influence on the error get more of them.
        prune: D, 0 <= D < 1: this fraction of all weights' elements becomes zero, existing zeros
            included. The elements with the smallest LAMP scores go first (Lee et al., arXiv
            2010.07611): w^2 over the sum of squares of all elements in the same tensor that are
            not smaller, so that no layer loses all of its weights.
        max_rel_error: E, above 0: each weight takes the fewest bits with ||dW|| <= E ||W||, where
            W is the weight after pruning.
        on_grids: weights that are whole multiples of a scale for each output, if they change.

    Returns:
        Deterministic.

    Raises:
        RecipeError: an argument is out of range, none is given, or bits and an error are.
        Prune2OnnxError: the model is packed, or external data are missing.
    """
    if bits is not None and max_rel_error is not None:
        raise RecipeError("bits and a relative error: give one of them, it determines the other")
    if bits is None and max_rel_error is None and prune is None:
        raise RecipeError("nothing to do: give bits, a fraction to prune or a relative error")
    check_limits(bits=bits, error=max_rel_error)
    subject = _subject(model, prune, on_grids)
    if bits is not None:
        target = bits
        made = subject.rounded(subject.within(target))
        for _ in range(_CORRECTIONS):
            if made.bits <= bits:
                break
            target -= 1.1 * (made.bits - bits)
            made = subject.rounded(subject.within(target))
        return made
    if max_rel_error is not None:
        return subject.rounded_each(max_rel_error)
    return subject.result({}, halve=0.0)


def _subject(model: ModelProto, prune: float | None, on_grids: Collection[str]) -> Subject:
    """A model whose biases make up for what is known to shift."""
    subject = Subject(model, prune, on_grids)
    subject.shifts = Means(subject).shifts
    return subject


def search(
    model: ModelProto,
    evaluate: Callable[[ModelProto], float],
    limit: float,
    *,
    form: Callable[[Approximation], ModelProto] = lambda made: made.model,
    prune: float | None = None,
    on_grids: Collection[str] = (),
    evaluations: int = 10,
    single: int = 32,
) -> Approximation:
    """Finds the fewest bits with which a model's outputs stay within an error.

    All weights have one slope. One more bit per weight about halves the outputs' error, so each
    trial takes the bits for which the last ones predict the limit.

    Args:
        model: as for `approximate`.
        evaluate: a model -> ||Y' - Y||_2 / ||Y||_2, its outputs against those of the model given.
        limit: above 0: the largest error to accept.
        form: what is tried -> the model that is evaluated.
        prune: as for `approximate`.
        on_grids: as for `approximate`.
        evaluations: the most calls of `evaluate`, at least 2.
        single: a model with at most this many weights is also evaluated once per weight, to measure
            how much that weight alone changes the outputs; this then replaces the relative error
            when weights are compared (4 to 20 % fewer bytes on the models tried).

    Returns:
        The trial with the fewest bytes among those within the limit; deterministic if `evaluate`
        is.

    Raises:
        RecipeError: an argument is out of range.
        Prune2OnnxError: no trial was within the limit; or as for `approximate`.
    """
    check_limits(error=limit)
    if evaluations < 2:
        raise RecipeError(f"{evaluations} evaluations, expected 2 or more")
    subject = _subject(model, prune, on_grids)

    tried: list[Approximation] = []

    def trial(bits: float) -> float:
        made = subject.rounded(subject.within(bits))
        error = float(evaluate(form(made)))
        tried.append(replace(made, output_error=error if math.isfinite(error) else math.inf))
        # the bits that meet the limit if each one halves the error; at most 3 from these
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
        margin = min((high - low) / 8, 0.25)
        bits = min(max(guess, low + margin), high - margin)
    within = [made for made in tried if (made.output_error or 0.0) <= limit]
    if not within:
        best = min(tried, key=lambda made: made.output_error or 0.0)
        raise Prune2OnnxError(
            f"the outputs' relative error is {best.output_error:.3g} with {best.bits:.1f} bits per "
            f"weight, expected at most {limit:.3g}; allow a larger error, or prune less"
        )
    return min(within, key=lambda made: made.nbytes)
