"""The steps of each phase, and where a compression is in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prune2onnx.errors import RecipeError
from prune2onnx.runs.recipe import PHASES

_FRACTIONS = {"prune": 0.6, "tune": 0.2, "quantize": 0.2}
_FRACTIONS_WITH_CHANNELS = {"channels": 0.3, "prune": 0.3, "tune": 0.2, "quantize": 0.2}


@dataclass(frozen=True)
class Progress:
    """Where a compression is.

    Attributes:
        phase: "dense", "channels", "prune", "tune", "quantize".
        step: optimizer steps so far.
        steps: of all phases.
        density: survivors over elements of the pruned weights, 0-1; while channels are pruned, the
            fraction of their cost that is left.
        nbytes: of the file that the network would be now.
        penalty: the latest value of `Compression.penalty`.
    """

    phase: str
    step: int
    steps: int
    density: float
    nbytes: int
    penalty: float


def planned(
    steps: int | None, phases: Mapping[str, float] | None, *, channels: bool
) -> dict[str, int]:
    """Steps of each phase, in the order of the recipe."""
    chosen = phases or (_FRACTIONS_WITH_CHANNELS if channels else _FRACTIONS)
    if unknown := [name for name in chosen if name not in PHASES]:
        raise RecipeError(f"phase {unknown[0]!r} is not one of {', '.join(PHASES)}")
    fractions = all(0 <= value <= 1 for value in chosen.values())
    if fractions:
        if steps is None or steps < 1:
            raise RecipeError(
                f"steps is {steps}, expected the number of optimizer steps, from 1 on"
            )
        total = sum(chosen.values())
        if not total:
            raise RecipeError("phases have no steps")
        counts = {name: round(steps * value / total) for name, value in chosen.items()}
    else:
        if any(value != int(value) or value < 0 for value in chosen.values()):
            raise RecipeError("phases are steps or fractions of them, not both")
        counts = {name: int(value) for name, value in chosen.items()}
        if steps is not None and steps != sum(counts.values()):
            raise RecipeError(
                f"steps is {steps}, but the phases have {sum(counts.values())} together; give one"
            )
    return {name: counts[name] for name in PHASES if counts.get(name)}
