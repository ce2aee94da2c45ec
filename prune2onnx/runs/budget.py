"""Budgets: whether a run met them, and the search for the smallest file within one.

Knows numbers only; `commands.compress` prunes and measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prune2onnx.runs.recipe import Recipe
from prune2onnx.runs.report import Goal
from prune2onnx.tasks.quantity import ERROR, Quantity

_FIRST_STEP = 2.0
"""Factor between the fractions to try, as long as only one side of the limit is known."""

_CLOSE = 1.08
"""Fractions closer than this factor need no trial between them."""


def goals(
    recipe: Recipe,
    *,
    nbytes: int,
    density: float,
    macs: float,
    dense: float,
    value: float,
    metric: Quantity = ERROR,
) -> tuple[Goal, ...]:
    """One line for each budget of a recipe.

    Args:
        recipe: has the budgets.
        nbytes: size of the file.
        density: of the pruned weights, 0-1.
        macs: fraction of the dense network's multiply-adds, 0-1.
        dense: the metric of the dense network, on the validation split.
        value: that of the result.
        metric: the task's.
    """
    budgets = (
        ("size", recipe.target_size, nbytes),
        ("density", recipe.target_density, density),
        ("multiply-adds", recipe.target_macs, macs),
        ("drop", recipe.allowed_drop(dense), metric.drop(dense, value)),
    )
    return tuple(
        Goal(what, float(limit), float(got), metric)
        for what, limit, got in budgets
        if limit is not None
    )


@dataclass(frozen=True)
class Trial:
    """One pruning of a search.

    Attributes:
        fraction: density, or fraction of the multiply-adds, to which it pruned, 0-1.
        drop: how much worse it made the metric, such as points of validation error.
        cost: bytes, or multiply-adds, of the result.
    """

    fraction: float
    drop: float
    cost: int


class Search:
    """Searches the smallest fraction with an allowed accuracy loss: by a factor, then bisection.

    The fraction is a density, or that of the multiply-adds.

    Args:
        limit: how much worse the metric may be, such as points of validation error.
        first: the first fraction to try, 0-1.
        trials: the most trials.
    """

    def __init__(self, limit: float, first: float, trials: int) -> None:
        self.limit, self.first, self.most = limit, first, trials
        self.trials: list[Trial] = []

    def next(self) -> float | None:
        """The fraction to try next; None when the search is over."""
        if not self.trials:
            return self.first
        if len(self.trials) >= self.most:
            return None
        good = [t.fraction for t in self.trials if t.drop <= self.limit]
        bad = [t.fraction for t in self.trials if t.drop > self.limit]
        if not bad:
            return min(good) / _FIRST_STEP
        # a success below a fraction that failed counts as noise
        good = [fraction for fraction in good if fraction > max(bad)]
        if not good:
            return None if max(bad) >= 1 else min(1.0, max(bad) * _FIRST_STEP)
        between = math.sqrt(min(good) * max(bad))
        return None if min(good) / max(bad) < _CLOSE**2 else between

    @property
    def best(self) -> int:
        """Index of the cheapest trial within the limit; without one, that of the smallest loss."""
        kept = [i for i, t in enumerate(self.trials) if t.drop <= self.limit]
        if kept:
            return min(kept, key=lambda i: self.trials[i].cost)
        return min(range(len(self.trials)), key=lambda i: self.trials[i].drop)
