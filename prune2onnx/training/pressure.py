"""The pressure of pruning: lambda, the penalty's factor, adjusted to reach a density or a size.

With a fixed lambda nothing stops a threshold that exceeds its layer's weights, and the density at
the end is unknown. Here the density follows a schedule down to its goal, and lambda is the
multiplier of that constraint: it grows while more is left than wanted and falls while less is (dual
ascent). The goal is given, or follows from a size in bytes that is measured during training. The
penalty itself is in `pruning`.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from prune2onnx.runs.sections import Prune

_RATE = 40.0
"""Growth of log lambda over a whole phase at an excess of 100 %."""

_RANGE = (-5.0, 8.0)
"""Range of log lambda, relative to its start."""

_RISE = 0.1
"""Range of the excess over which the clamped pressure rises from zero to full."""

MEASURES = 20
"""Times in a phase that the file is measured, or the network evaluated, to correct the course."""

Slopes = tuple[float, float, float]
"""d log amount / d log density: the least to accept, the first guess, the largest to accept."""

SIZE_SLOPES: Slopes = (0.3, 0.9, 1.2)
"""Slopes for bytes; near 1 where the file is nearly all weights."""


def too_short(settings: Prune, steps: int, goal: float) -> str | None:
    """What is wrong with a phase whose thresholds cannot reach a density in time; None if nothing.

    Adam moves what is behind a threshold by the learning rate a step. The threshold wanted is that
    of normally distributed weights.

    >>> from prune2onnx.runs.sections import Prune
    >>> too_short(Prune(), 1000, 0.1) is None
    True
    """
    if not 0 < goal < 1:
        return None
    wanted = NormalDist().inv_cdf(1 - goal / 2)
    if wanted <= settings.start:
        return None
    way = math.log(math.expm1(wanted)) - math.log(math.expm1(settings.start))
    needed = math.ceil(way / settings.threshold_lr)
    rising = round(steps * settings.ramp)
    if rising >= needed:
        return None
    return (
        f"in the prune phase thresholds rise for {rising:,} of {steps:,} steps, but need about "
        f"{needed:,} to a density of {100 * goal:.2g} %; the rest would be removed at once at its "
        "end: give it more steps, or a larger prune.threshold_lr"
    )


class Pressure:
    """The multiplier of one pruning phase.

    Args:
        settings: of the phase.
        size: elements of the pruned weights.
        steps: of the phase.
        goal: density to end at, 0-1.
        device: on which survivors are counted.
        start: density at the beginning, 0-1.
    """

    def __init__(
        self,
        settings: Prune,
        size: int,
        steps: int,
        goal: float,
        device: torch.device,
        *,
        start: float = 1.0,
    ) -> None:
        self.settings, self.size, self.steps, self.goal = settings, size, steps, goal
        self._start = start
        self._log = torch.zeros((), device=device)
        self._seen: tuple[float, float] | None = None

    def above(self, alive: Tensor, progress: float) -> Tensor:
        """Excess of survivors over those wanted at a fraction of the phase: 0.1 is 10 %.

        On a logarithmic scale the wanted density falls quickly at first, slowly towards the end.
        """
        done = min(1.0, progress / self.settings.ramp) if self.settings.ramp else 1.0
        wanted = self._start * (self.goal / self._start) ** (1 - (1 - done) ** 2)
        excess: Tensor = alive / (self.size * wanted) - 1
        return excess

    def factor(self, above: Tensor) -> Tensor:
        """The factor of the penalty in the next step; updates lambda."""
        with torch.no_grad():
            step = (_RATE / self.steps) * torch.log1p(above).clamp(-0.5, 0.5)
            self._log.add_(step).clamp_(*_RANGE)
            # pruned channels do not come back, so there is no pressure below the goal
            at_goal = 0.5 if self.settings.granularity == "weight" else 0.0
            clamp = (above / _RISE + at_goal).clamp(0, 1)
            factor: Tensor = self.settings.pressure / self.size * self._log.exp() * clamp
            return factor

    def aim(
        self,
        density: float,
        amount: float,
        target: float,
        slopes: Slopes = SIZE_SLOPES,
    ) -> None:
        """Sets the goal to the density at which an amount that falls with it would be as wanted.

        Args:
            density: the current one, 0-1.
            amount: the current one, such as bytes of the file.
            target: the amount wanted.
            slopes: how the amount depends on the density.
        """
        least, slope, largest = slopes
        if not amount or not density:  # nothing is left, or nothing left reaches an output
            self.goal = min(1.0, 2 * max(self.goal, density))
            return
        if self._seen is not None and not math.isclose(self._seen[0], density, rel_tol=0.01):
            rise = math.log(amount / self._seen[1]) / math.log(density / self._seen[0])
            slope = min(max(rise, least), largest)
        self._seen = density, amount
        goal = density * (target / amount) ** (1 / slope)
        self.goal = min(max(goal, 1 / self.size), 1.0)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"goal": self.goal, "log": float(self._log), "seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a saved state."""
        self.goal = state["goal"]
        self._log.fill_(state["log"])
        self._seen = tuple(state["seen"]) if state["seen"] else None
