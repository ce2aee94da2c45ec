"""Budgets: whether a run met them, and the search for the smallest file within one.

Knows numbers only; `commands.compress` prunes and measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prune2onnx.runs.recipe import Recipe
from prune2onnx.runs.report import Goal

_FIRST_STEP = 2.0
"""Factor between the fractions to try, as long as only one side of the limit is known."""

_CLOSE = 1.08
"""Fractions closer than this factor need no trial between them."""


def goals(
    recipe: Recipe, *, nbytes: int, density: float, macs: float, drop: float
) -> tuple[Goal, ...]:
    """One line for each budget of a recipe.

    Args:
        recipe: has the budgets.
        nbytes: size of the file.
        density: of the pruned weights, 0-1.
        macs: fraction of the dense network's multiply-adds, 0-1.
        drop: points of validation error that were added.
    """
    budgets = (
        ("size", recipe.target_size, nbytes),
        ("density", recipe.target_density, density),
        ("multiply-adds", recipe.target_macs, macs),
        ("drop", recipe.max_drop, drop),
    )
    return tuple(
        Goal(what, float(limit), float(got)) for what, limit, got in budgets if limit is not None
    )


@dataclass(frozen=True)
class Trial:
    """One pruning of a search.

    Attributes:
        fraction: density, or fraction of the multiply-adds, to which it pruned, 0-1.
        drop: points of validation error that it added.
        cost: bytes, or multiply-adds, of the result.
    """

    fraction: float
    drop: float
    cost: int


class Search:
    """Searches the smallest fraction with an allowed accuracy loss: by a factor, then bisection.

    The fraction is a density, or that of the multiply-adds.

    Args:
        limit: points of validation error that may be added.
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
