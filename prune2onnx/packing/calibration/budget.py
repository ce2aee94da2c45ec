"""The slope with which a budget is met: of bits, bytes, the outputs' error, or an accuracy loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_FARTHEST = 5.0  # octaves from one trial to the next


@dataclass(frozen=True)
class Trial:
    """A slope that was tried.

    Attributes:
        slope: the error that each bit has to save; 0 where weights are only made zero.
        bits: of each weight that may change.
        nbytes: size of the file.
        error: relative error of the outputs on held-out examples.
        drop: points of held-out error that it adds; None where there are no labels.
    """

    slope: float
    bits: float
    nbytes: int
    error: float
    drop: float | None = None


@dataclass(frozen=True)
class Budget:
    """What a search goes by.

    Attributes:
        excess: a trial -> by how much it misses the budget, in octaves or points; 0 or less: met.
        rate: about how much the excess rises if the slope doubles.
        close: how little below 0 the excess is to be.
    """

    excess: Callable[[Trial], float]
    rate: float
    close: float


def of_error(limit: float) -> Budget:
    """The outputs' error."""
    return Budget(lambda trial: _octaves(trial.error, limit), 0.45, 0.04)


def of_drop(limit: float) -> Budget:
    """The points that are lost; they rise about as the squared error does."""
    return Budget(lambda trial: (trial.drop or 0.0) - limit, 0.3, 0.1)


def of_size(limit: int) -> Budget:
    """Bytes of the file."""
    return Budget(lambda trial: _octaves(trial.nbytes, limit), -0.3, 0.01)


def of_bits(limit: float) -> Budget:
    """Bits of each weight that may change."""
    return Budget(lambda trial: trial.bits - limit, -0.45, 0.02)


def search(
    trial: Callable[[float], Trial], start: float, budget: Budget, tries: int
) -> list[Trial]:
    """Tries slopes until one meets a budget closely.

    The excess is taken to be linear in the logarithm of the slope: between two trials on either
    side of the limit once there are two, else at the rate of the last two.

    Args:
        trial: a slope -> what it gives.
        start: the first slope.
        budget: what to go by.
        tries: the most trials.

    Returns:
        All trials, in order.
    """
    found: list[Trial] = []
    at: list[tuple[float, float]] = []  # log2 of the slope, excess
    here, rate = math.log2(start), budget.rate
    for _ in range(tries):
        found.append(trial(math.exp2(here)))
        excess = budget.excess(found[-1])
        excess = excess if math.isfinite(excess) else math.copysign(_FARTHEST, excess)
        at.append((here, excess))
        if -budget.close <= excess <= 0:
            break
        met = [one for one in at if one[1] <= 0]
        missed = [one for one in at if one[1] > 0]
        goal = -budget.close / 2
        if met and missed:
            # the trials next to each other on either side of the limit
            inside = max(met, key=lambda one: one[0] * budget.rate)
            outside = min(missed, key=lambda one: one[0] * budget.rate)
            share = (goal - inside[1]) / (outside[1] - inside[1])
            here = inside[0] + min(max(share, 0.1), 0.9) * (outside[0] - inside[0])
            if abs(outside[0] - inside[0]) < 0.02:
                break
            continue
        if len(at) > 1 and at[-1][0] != at[-2][0]:
            seen = (at[-1][1] - at[-2][1]) / (at[-1][0] - at[-2][0])
            if seen * budget.rate > 0:  # else it is noise
                rate = seen
        move = (goal - excess) / rate
        here += min(max(move, -_FARTHEST), _FARTHEST)
    return found


def _octaves(got: float, limit: float) -> float:
    return math.log2(max(got, 1e-12) / limit)
