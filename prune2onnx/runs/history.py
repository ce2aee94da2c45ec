"""What training reports: each step, each epoch (an entry of history.json), and the callbacks.

A module of its own, so that a run can be read, and progress shown, without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """The progress of training, for a progress bar; up to 16 steps old.

    `penalty` is what pruning adds to the loss; `loss` is without it.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    density: float
    penalty: float = 0.0


@dataclass(frozen=True)
class Epoch:
    """The result of one epoch.

    Attributes:
        phase: one of `recipe.PHASES`; in files of version 0.1 also "narrow" (now "channels") or
            "share" (now "quantize").
        epoch: 1 to `epochs`.
        epochs: of this phase.
        loss: mean training loss, without the penalty; in files of version 0.1 with it.
        density: survivors over elements of the pruned weights, 0-1; while channels are pruned, the
            remaining fraction of their cost.
        validation_error: of a classifier, percent of the validation split; None in other tasks.
        validation_loss: mean loss on it, such as cross entropy.
        seconds: wall-clock time, evaluation included.
        densities: of each pruned weight, 0-1, by name; while channels are pruned, of each layer's
            channels.
        thresholds: learned ones, by the weight's name, mean over channels; in the weight's units,
            and while channels are pruned in those of `ChannelThresholds.measure`.
        metrics: of the task, on the validation split, by name; {} in older files.
        penalty: mean of what pruning added to the training loss.
    """

    phase: str
    epoch: int
    epochs: int
    loss: float
    density: float
    validation_error: float | None
    validation_loss: float
    seconds: float
    densities: dict[str, float]
    thresholds: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    penalty: float = 0.0

    @property
    def value(self) -> float:
        """The task's first metric on the validation split, such as the error in percent."""
        known = [*self.metrics.values(), self.validation_error]
        return next(one for one in known if one is not None)


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class TrialStart:
    """A trial of a search for the smallest network within a budget, which now begins.

    Attributes:
        number: from 1 on.
        most: trials at most.
        what: "density", or "multiply-adds".
        fraction: to which the trial prunes, 0-1.
    """

    number: int
    most: int
    what: str
    fraction: float

    def __str__(self) -> str:
        """In words: 'trial 2 of at most 6, density 3.5 %'."""
        return (
            f"trial {self.number} of at most {self.most}, {self.what} {100 * self.fraction:.3g} %"
        )


@dataclass(frozen=True)
class Callbacks:
    """Functions that are called with the progress of training, in the main process.

    Attributes:
        on_step: called every few steps.
        on_epoch: called after each epoch.
        on_trial: called before each trial of a search (`max_drop`).
    """

    on_step: Callable[[Step], None] = _ignore
    on_epoch: Callable[[Epoch], None] = _ignore
    on_trial: Callable[[TrialStart], None] = _ignore
