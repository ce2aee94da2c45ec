"""What training came to, epoch by epoch: a line of history.json.

Its own room, so that who reads a run needs no torch. Who trains is `training`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        phase: one of `training.PHASES`.
        epoch: 1 to `epochs`.
        epochs: of this phase.
        loss: mean training loss, penalty included.
        density: survivors over elements of the pruned weights, 0-1; while channels are pruned,
            what is left of their cost.
        validation_error: percent of the validation split.
        validation_loss: mean cross entropy there.
        seconds: wall-clock time, evaluation included.
        densities: of each pruned weight, 0-1, by name; while channels are pruned, of each layer's
            channels.
        thresholds: learned ones, by the weight's name, mean over channels; in the weight's units,
            and while channels are pruned in those of `Widths.measure`.
    """

    phase: str
    epoch: int
    epochs: int
    loss: float
    density: float
    validation_error: float
    validation_loss: float
    seconds: float
    densities: dict[str, float]
    thresholds: dict[str, float]
