"""How hard training presses on weights: lambda, moved until a density or a size is reached.

A fixed lambda has no brake and no aim: a threshold that outruns its layer's weights runs on, and
which density it ends at, nobody knows beforehand. Here the density follows a schedule down to its
goal, and lambda is the multiplier of that constraint: it grows while there is more than wanted and
falls while there is less (dual ascent). The goal itself is known, or follows from a size in bytes
that is measured on the way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prune2onnx.recipe import Prune

_RATE = 40.0
"""Growth of log lambda over a whole phase at an excess of 100 %."""

_RANGE = (-5.0, 8.0)
"""Of log lambda, from where it starts."""

_BRAKE = 0.1
"""Excess over which the pressure goes from half to full; it ends as far below the goal."""

Slopes = tuple[float, float, float]
"""d log amount / d log density: the least that is believed, the first guess, the largest."""

SIZE_SLOPES: Slopes = (0.3, 0.9, 1.2)
"""Of bytes; near 1 where weights are all there is."""


class Pressure:
    """The multiplier of one pruning phase.

    Args:
        settings: of the phase.
        size: elements of the pruned weights.
        steps: of the phase.
        goal: density to end at, 0-1.
        device: where survivors are counted.
        start: density to begin with, 0-1.
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
        """Excess of the survivors over those wanted at a point of the phase (0-1): 0.1 is 10 %.

        On a logarithmic scale the wanted density falls quickly at first, slowly towards the end.
        """
        done = min(1.0, progress / self.settings.ramp) if self.settings.ramp else 1.0
        wanted = self._start * (self.goal / self._start) ** (1 - (1 - done) ** 2)
        excess: Tensor = alive / (self.size * wanted) - 1
        return excess

    def factor(self, above: Tensor) -> Tensor:
        """What to multiply the penalty with in the next step; moves the multiplier."""
        with torch.no_grad():
            step = (_RATE / self.steps) * torch.log1p(above).clamp(-0.5, 0.5)
            self._log.add_(step).clamp_(*_RANGE)
            # a channel that goes stays away, so nothing is to be pressed below the goal
            rest = 0.5 if self.settings.granularity == "weight" else 0.0
            brake = (above / _BRAKE + rest).clamp(0, 1)
            factor: Tensor = self.settings.pressure / self.size * self._log.exp() * brake
            return factor

    def aim(
        self,
        density: float,
        amount: float,
        target: float,
        slopes: Slopes = SIZE_SLOPES,
    ) -> None:
        """Moves the goal to where an amount that falls with the density would be as wanted.

        Args:
            density: now, 0-1.
            amount: now: bytes of the file, weights that are left.
            target: the amount wanted.
            slopes: how the amount falls with the density.
        """
        least, slope, largest = slopes
        if not amount or not density:  # nothing is left, or reaches an output
            self.goal = min(1.0, 2 * max(self.goal, density))
            return
        if self._seen is not None and not math.isclose(self._seen[0], density, rel_tol=0.01):
            rise = math.log(amount / self._seen[1]) / math.log(density / self._seen[0])
            slope = min(max(rise, least), largest)
        self._seen = density, amount
        goal = density * (target / amount) ** (1 / slope)
        self.goal = min(max(goal, 1 / self.size), 1.0)

    def state(self) -> dict[str, Any]:
        """What a continued run needs."""
        return {"goal": self.goal, "log": float(self._log), "seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a saved state."""
        self.goal = state["goal"]
        self._log.fill_(state["log"])
        self._seen = tuple(state["seen"]) if state["seen"] else None
