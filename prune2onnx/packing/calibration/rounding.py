"""Rounding a layer's weights one input after the other; later ones compensate for the errors.

The error of a layer's outputs is sum_o e_o' H e_o for errors e_o of the weights of output o, with H
the second moments of its inputs. With the Cholesky factor U of H's inverse, H^-1 = U' U, it is the
sum of (error of input j, given those before it)^2 / U_jj^2, if the inputs after j take up what they
can: Optimal Brain Surgeon (Hassibi and Stork, NIPS 1992), in one order for all outputs as in OPTQ
(Frantar et al., arXiv 2210.17323). Bits have a price while levels are chosen, as in CERWU
(arXiv 2505.18758), and zeros are chosen as in SparseGPT (arXiv 2301.00774).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from prune2onnx.packing.approximation.rounding import cheapest, code_bits
from prune2onnx.packing.quantized import MOST_STEPS

_BLOCK = 64  # inputs whose errors are handed on together
_ROWS = 1 << 10  # of a table, that are rounded together

Bounds = tuple[NDArray[np.integer[Any]] | int, NDArray[np.integer[Any]] | int]
"""Smallest and largest code: one for all, or one for each weight."""

EVERY: Bounds = (-MOST_STEPS, MOST_STEPS)
COARSER = 1.6
"""How much coarser steps are than on a fine grid without a price of bits: prices add zeros, and
that and this together cost least. Tried on ResNet-20 from 0.8 to 2.2: 1.6 to 2.2 are alike."""


@dataclass(frozen=True, eq=False)
class Factor:
    """H of a layer's group, ready for rounding.

    Attributes:
        order: of the inputs; by falling power, since those that matter most are rounded first.
        upper: U, [inputs, inputs], in that order.
    """

    order: NDArray[np.int64]
    upper: NDArray[np.float64]

    @staticmethod
    def of(hessian: NDArray[np.float64], *, in_order: bool = False) -> Factor:
        """The factor of a symmetric positive matrix; on request, in the order of its rows."""
        order = np.argsort(-np.diag(hessian), kind="stable")
        if in_order:
            order = np.arange(len(hessian))
        sorted_ = hessian[np.ix_(order, order)]
        # with J the reversal and J H J = L L': U = J L^-1 J
        lower = linalg.cholesky(sorted_[::-1, ::-1], lower=True)
        inverse = linalg.solve_triangular(lower, np.eye(len(order)), lower=True)
        return Factor(order, np.ascontiguousarray(inverse[::-1, ::-1]))

    @property
    def spread(self) -> NDArray[np.float64]:
        """1 / U_jj^2: the error of the outputs for a unit error of input j, once others adapt."""
        return 1 / np.square(np.diag(self.upper))


def step_for(spread: NDArray[np.float64], price: float, coarser: float = COARSER) -> float:
    """The step at which a bit costs what it saves.

    A step s makes an error of s^2 / 12 times the mean of `spread`, for each weight, and halving it
    costs a bit.

    Args:
        spread: `Factor.spread`, of all groups; of a table, how often rows are looked up.
        price: the error that a bit has to save.
        coarser: factor on that step.
    """
    return coarser * math.sqrt(6 * price / math.log(2) / float(spread.mean()))


def rounded(
    target: NDArray[np.floating],
    factor: Factor,
    steps: NDArray[np.float32],
    price: float,
    codes: NDArray[np.integer],
    stay: NDArray[np.bool_] | None = None,
    bounds: Bounds = EVERY,
) -> NDArray[np.int16]:
    """Codes of a group's weights: they become code * step.

    Args:
        target: [inputs, outputs], the weights without any error.
        factor: of the same inputs.
        steps: of each output, above 0; or of each weight, [inputs, outputs], of either sign.
        price: the error that a bit has to save.
        codes: of the whole weight, as far as it is known: bits are those of its histogram.
        stay: weights that may be other than zero; default: all.
        bounds: smallest and largest codes.

    Returns:
        Of the shape of `target`; deterministic.
    """
    low, high = (np.broadcast_to(bound, target.shape) for bound in bounds)
    bits = code_bits(codes, _widest(bounds))
    steps = np.broadcast_to(steps, target.shape)
    prices = (price / np.square(steps, dtype=np.float64)).astype(np.float32)
    found = np.zeros(target.shape, np.int16)

    def choose(at: int, here: NDArray[np.float32]) -> NDArray[np.float32]:
        row = factor.order[at]
        each = prices[row] * np.float32(factor.upper[at, at] ** 2)
        code = cheapest(here / steps[row], bits, low[row], high[row], each)
        if stay is not None:
            code[~stay[row]] = 0
        found[row] = code
        taken: NDArray[np.float32] = code * steps[row]
        return taken

    _in_order(target, factor, choose)
    return found


def looked_up(
    table: NDArray[np.floating],
    frequency: NDArray[np.float64],
    steps: NDArray[np.float32],
    price: float,
    codes: NDArray[np.integer],
    bounds: Bounds = EVERY,
) -> NDArray[np.int16]:
    """Codes of a table [rows, places], whose rows are looked up so often; as for `rounded`."""
    bits = code_bits(codes, _widest(bounds))
    prices = (price / (frequency * np.square(steps, dtype=np.float64))).astype(np.float32)
    low, high = (np.broadcast_to(bound, table.shape) for bound in bounds)
    found = np.empty(table.shape, np.int16)
    for begin in range(0, len(table), _ROWS):
        some = slice(begin, begin + _ROWS)
        units = (table[some] / steps[some, None]).astype(np.float32)
        found[some] = cheapest(units, bits, low[some], high[some], prices[some, None])
    return found


def _widest(bounds: Bounds) -> int:
    return max(int(np.max(bounds[1])), -int(np.min(bounds[0])), MOST_STEPS)


def pruned(
    target: NDArray[np.floating], factor: Factor, chosen: Chosen, block: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The weights with zeros, and others that compensate for them.

    Args:
        target: [inputs, outputs].
        factor: of the same inputs.
        chosen: which weights of a block of inputs stay.
        block: inputs that are looked at together.

    Returns:
        Weights; which of them stay.
    """
    found = np.zeros(target.shape, np.float32)
    stay = np.ones(target.shape, bool)
    spread = factor.spread.astype(np.float32)

    def choose(at: int, here: NDArray[np.float32]) -> NDArray[np.float32]:
        left: NDArray[np.float32] = here * stay[factor.order[at]]
        found[factor.order[at]] = left
        return left

    def begin(at: int, left: NDArray[np.float32]) -> None:
        inside = factor.order[at : at + block]
        effect = np.square(left[: len(inside)]) * spread[at : at + block, None]
        stay[inside] = chosen(inside, effect)

    _in_order(target, factor, choose, begin, block)
    return found, stay


Chosen = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.bool_]]
"""Some inputs, and the effect of each of their weights on the outputs' error -> which stay."""


def _in_order(
    target: NDArray[np.floating],
    factor: Factor,
    choose: Callable[[int, NDArray[np.float32]], NDArray[np.float32]],
    begin: Callable[[int, NDArray[np.float32]], None] = lambda at, left: None,
    block: int = _BLOCK,
) -> None:
    """Lets `choose` round one input after the other, and corrects those that follow.

    Args:
        target: [inputs, outputs].
        factor: of the same inputs.
        choose: place in the order, the weights as they should be there -> what they become.
        begin: is told where a block begins, and the weights of all inputs from there on.
        block: inputs of a block.
    """
    upper = factor.upper.astype(np.float32)
    left = np.array(target[factor.order], np.float32)
    for start in range(0, len(left), block):
        end = min(start + block, len(left))
        begin(start, left[start:])
        errors = np.empty((end - start, left.shape[1]), np.float32)
        for at in range(start, end):
            error = (left[at] - choose(at, left[at])) / upper[at, at]
            errors[at - start] = error
            left[at + 1 : end] -= upper[at, at + 1 : end, None] * error
        left[end:] -= upper[start:end, end:].T @ errors


def refit(
    target: NDArray[np.floating],
    hessian: NDArray[np.float64],
    first: NDArray[np.float32],
    stay: NDArray[np.bool_],
    rounds: int = 30,
) -> NDArray[np.float32]:
    """The weights that stay, for the least error of the outputs: by conjugate gradients.

    Args:
        target: [inputs, outputs], the weights without any error.
        hessian: second moments of the inputs.
        first: where to begin.
        stay: which weights are not zero.
        rounds: steps; more change little.
    """
    moments = hessian.astype(np.float32)
    found = first * stay
    residual = (moments @ (target.astype(np.float32) - found)) * stay
    direction = residual.copy()
    square = np.square(residual).sum(0)
    for _ in range(rounds):
        ahead = (moments @ direction) * stay
        curvature = np.einsum("io,io->o", direction, ahead)
        length = np.divide(square, curvature, out=np.zeros_like(square), where=curvature > 0)
        found += length * direction
        residual -= length * ahead
        before, square = square, np.square(residual).sum(0)
        kept = np.divide(square, before, out=np.zeros_like(square), where=before > 0)
        direction = residual + kept * direction
    return found
