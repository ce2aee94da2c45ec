"""Which weights become zero: those with the least effect, wherever, in blocks or of neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.calibration.rounding import Chosen, Factor

_INPUTS = 128
"""About how many inputs are looked at together."""


@dataclass(frozen=True)
class Pattern:
    """Which weights become zero.

    Attributes:
        fraction: of all elements of the layers' weights, tables aside; 0 for none.
        keep: n of each m neighbouring inputs stay; None: those with the most effect, wherever.
        channels: fraction of all elements that goes with whole channels, which no layer reads then.
        blocks: neighbouring outputs and inputs whose weights go together.
    """

    fraction: float = 0.0
    keep: tuple[int, int] | None = None
    channels: float = 0.0
    blocks: tuple[int, int] | None = None

    @property
    def makes_zeros(self) -> bool:
        """Whether it does anything."""
        return bool(self.fraction or self.channels)

    @property
    def has_neighbours(self) -> bool:
        """Whether inputs have to be looked at in their own order."""
        return self.keep is not None or self.blocks is not None

    @property
    def together(self) -> int:
        """How many inputs are looked at together: whole blocks."""
        size = self.blocks[1] if self.blocks else 1
        return max(1, _INPUTS // size) * size

    def chosen_in(self, target: NDArray[np.float64], factor: Factor, fraction: float) -> Chosen:
        """Which weights of some inputs stay: n of m neighbours, or as many as have enough effect.

        Args:
            target: [inputs, outputs], of a group.
            factor: of the same inputs.
            fraction: of these weights that goes.
        """
        if (keep := self.keep) is not None:
            return lambda inside, effect: _most_of_neighbours(effect, *keep)
        effects = np.empty(target.shape, np.float32)
        effects[factor.order] = np.square(target[factor.order]) * factor.spread[:, None]
        effects = self.shared(effects)
        limit = np.quantile(effects, fraction)

        def chosen(inside: NDArray[np.int64], effect: NDArray[np.float32]) -> NDArray[np.bool_]:
            gone = int((effects[inside] < limit).sum())
            if not gone:
                return np.ones(effect.shape, bool)
            effect = self.shared(effect)
            stay: NDArray[np.bool_] = effect > np.partition(effect.reshape(-1), gone - 1)[gone - 1]
            return stay

        return chosen

    def shared(self, effects: NDArray[np.float32]) -> NDArray[np.float32]:
        """Effects [..., inputs, outputs] of weights that go alone; of blocks, their mean."""
        if self.blocks is None:
            return effects
        for axis, size in zip((-1, -2), self.blocks, strict=True):
            starts = np.arange(0, effects.shape[axis], size)
            counts = np.diff(starts, append=effects.shape[axis])
            each = counts if axis == -1 else counts[:, None]
            means = np.add.reduceat(effects, starts, axis) / each.astype(np.float32)
            effects = np.repeat(means, counts, axis)
        return effects


def _most_of_neighbours(effect: NDArray[np.float32], n: int, m: int) -> NDArray[np.bool_]:
    """The n of each m neighbouring inputs with the most effect; a rest that is shorter stays."""
    stay = np.ones(effect.shape, bool)
    whole = len(effect) // m * m
    parts = effect[:whole].reshape(-1, m, effect.shape[1])
    rank = np.argsort(np.argsort(-parts, axis=1, kind="stable"), axis=1, kind="stable")
    stay[:whole] = (rank < n).reshape(whole, -1)
    return stay
