"""Which weights become zero: those with the least effect, wherever or among neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.calibration.rounding import Chosen, Factor


@dataclass(frozen=True)
class Pattern:
    """Which weights become zero.

    Attributes:
        fraction: of all elements of the layers' weights, tables aside; 0 for none.
        keep: n of each m neighbouring inputs stay; None: those with the most effect, wherever.
        channels: fraction of all elements that goes with whole channels, which no layer reads then.
    """

    fraction: float = 0.0
    keep: tuple[int, int] | None = None
    channels: float = 0.0

    @property
    def makes_zeros(self) -> bool:
        """Whether it does anything."""
        return bool(self.fraction or self.channels)


def chosen_in(
    target: NDArray[np.float64], factor: Factor, fraction: float, keep: tuple[int, int] | None
) -> Chosen:
    """Which weights of a block stay: n of m neighbours, or as many as have enough effect."""
    if keep is not None:
        return lambda inside, effect: _most_of_neighbours(effect, *keep)
    effects = np.empty(target.shape, np.float32)
    effects[factor.order] = np.square(target[factor.order]) * factor.spread[:, None]
    limit = np.quantile(effects, fraction)

    def chosen(inside: NDArray[np.int64], effect: NDArray[np.float32]) -> NDArray[np.bool_]:
        gone = int((effects[inside] < limit).sum())
        if not gone:
            return np.ones(effect.shape, bool)
        stay: NDArray[np.bool_] = effect > np.partition(effect.reshape(-1), gone - 1)[gone - 1]
        return stay

    return chosen


def _most_of_neighbours(effect: NDArray[np.float32], n: int, m: int) -> NDArray[np.bool_]:
    """The n of each m neighbouring inputs with the most effect; a rest that is shorter stays."""
    stay = np.ones(effect.shape, bool)
    whole = len(effect) // m * m
    parts = effect[:whole].reshape(-1, m, effect.shape[1])
    rank = np.argsort(np.argsort(-parts, axis=1, kind="stable"), axis=1, kind="stable")
    stay[:whole] = (rank < n).reshape(whole, -1)
    return stay
