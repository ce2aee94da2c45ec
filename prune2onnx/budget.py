"""Budgets: what a user asked for, whether it was met, and the search for the smallest file.

Knows numbers only; who prunes and measures is `pipeline`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prune2onnx.recipe import Recipe
from prune2onnx.report import Goal

_FIRST_STEP = 2.0
"""Factor between parts as long as only one side of the limit is known."""

_CLOSE = 1.08
"""Parts this near to each other need no trial between them."""


def goals(
    recipe: Recipe, *, nbytes: int, density: float, macs: float, drop: float
) -> tuple[Goal, ...]:
    """One line for each budget of a recipe.

    Args:
        recipe: what was asked for.
        nbytes: of the file.
        density: of the pruned weights, 0-1.
        macs: part of the dense network's multiply-adds, 0-1.
        drop: points of validation error that were added.
    """
    asked = (
        ("size", recipe.target_size, nbytes),
        ("density", recipe.target_density, density),
        ("multiply-adds", recipe.target_macs, macs),
        ("drop", recipe.max_drop, drop),
    )
    return tuple(
        Goal(what, float(limit), float(got)) for what, limit, got in asked if limit is not None
    )


@dataclass(frozen=True)
class Trial:
    """One pruning of a search.

    Attributes:
        asked: density, or part of the multiply-adds, that was asked for, 0-1.
        drop: points of validation error that it added.
        cost: bytes, or multiply-adds, of what came out.
    """

    asked: float
    drop: float
    cost: int


class Search:
    """Looks for the smallest part whose drop is allowed: steps by a factor, then bisection.

    Args:
        limit: points of validation error that may be added.
        first: part to begin with, 0-1.
        trials: how many there may be.
    """

    def __init__(self, limit: float, first: float, trials: int) -> None:
        self.limit, self.first, self.most = limit, first, trials
        self.trials: list[Trial] = []

    def next(self) -> float | None:
        """The part to try next; None when the search is over."""
        if not self.trials:
            return self.first
        if len(self.trials) >= self.most:
            return None
        good = [t.asked for t in self.trials if t.drop <= self.limit]
        bad = [t.asked for t in self.trials if t.drop > self.limit]
        if not bad:
            return min(good) / _FIRST_STEP
        # noise: a part below one that failed is not believed
        good = [asked for asked in good if asked > max(bad)]
        if not good:
            return None if max(bad) >= 1 else min(1.0, max(bad) * _FIRST_STEP)
        between = math.sqrt(min(good) * max(bad))
        return None if min(good) / max(bad) < _CLOSE**2 else between

    @property
    def best(self) -> int:
        """Index of the cheapest that keeps to the limit; else of the smallest drop."""
        kept = [i for i, t in enumerate(self.trials) if t.drop <= self.limit]
        if kept:
            return min(kept, key=lambda i: self.trials[i].cost)
        return min(range(len(self.trials)), key=lambda i: self.trials[i].drop)
