"""The course of one compression: its settings, its state, and what its phases ask for.

Whoever drives the training has one: `loop` for `fit`, `compression` for a loop of the user's own.
They differ in where examples come from and in who makes the optimizer; what a phase does, how the
pressure is applied and how a budget is met are the same. The phases are in `phases`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prune2onnx.pruning import (
    channel_thresholds_of,
    deep_copy,
    density,
    penalty,
    survivors,
    weigh_by_bits,
)
from prune2onnx.runs.history import Epoch
from prune2onnx.runs.recipe import Recipe
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.fold import fold_batch_norm, has_batch_norm
from prune2onnx.training.pressure import MEASURES, Pressure

WEIGH_EVERY = 100  # steps between updates of the bytes that survivors take
WARM_UP = 0.1  # fraction of a phase over which the learning rate rises


@dataclass
class State:
    """What phases pass on, and what a checkpoint keeps besides tensors.

    Attributes:
        goal: density of the pruned weights to reach, 0-1, where no size is asked for.
        pruned: names of the pruned weights.
        size: number of their elements.
        frozen: scales and biases of pruned branches, frozen at zero.
        steps: weight on levels -> the step of which its values are multiples.
        history: every epoch so far.
    """

    goal: float
    pruned: tuple[str, ...] = ()
    size: int = 0
    frozen: tuple[str, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)
    history: list[Epoch] = field(default_factory=list)


def _unknown(_: nn.Module) -> float:
    return math.nan


@dataclass(eq=False)
class Course:
    """Settings and state of a compression, and functions that answer its phases.

    Attributes:
        recipe: the settings.
        deployment: measures the file; None if there is none.
        device: of the network.
        steps_of: the steps of a phase, by its name.
        example: gives a batch of inputs on the device.
        error: of a model, on data that were not trained on; less is better.
        slack: gives how much larger the error may get where biases are stored coarsely.
        drop: how much worse a model is than the dense one, in the unit of the task's metric.
        noise: gives how much of that chance alone explains.
        sensitivity: mean squared gradients of the pruned weights, by name, for a model.
        copied: a copy of the model that shares nothing, without mixed precision.
        in_place: whether the model's layers have to stay, as an optimizer that phases do not make
            holds their parameters.
        meets: whether weights are removed to meet a budget; not while a saved state is restored.
        state: what phases pass on.
        pressure: of the current phase; None where it prunes nothing.
    """

    recipe: Recipe
    deployment: Deployment | None
    device: torch.device
    steps_of: Callable[[str], int]
    example: Callable[[], Any]
    error: Callable[[nn.Module], float]
    slack: Callable[[], float]
    sensitivity: Callable[[nn.Module], dict[str, Tensor]]
    drop: Callable[[nn.Module], float] = _unknown
    noise: Callable[[], float] = lambda: 0.0
    copied: Callable[[nn.Module], nn.Module] = deep_copy
    in_place: bool = False
    meets: bool = True
    state: State = field(init=False)
    pressure: Pressure | None = None
    _pairs: dict[str, str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.state = State(self.recipe.wanted_density)

    def fold(self, model: nn.Module) -> dict[str, str]:
        """Folds BatchNorm of a copy of the network, traced once; see `fold_batch_norm`."""
        if self._pairs is None and has_batch_norm(model):
            self._pairs = fold_batch_norm(model, self.example())
            return self._pairs
        return fold_batch_norm(model, None, self._pairs)

    def is_due(self, phase: str, progress: float) -> bool:
        """Whether to measure after an epoch, which ended at this fraction of the phase.

        Where epochs are short, not after each.
        """
        settings: Any = self.recipe.phase(phase)
        before = progress - 1 / settings.epochs if settings.epochs else 0.0
        # a small part of an epoch, for fractions such as 0.1 + 0.2
        tick = 1e-9
        return math.floor(MEASURES * progress + tick) > math.floor(MEASURES * before + tick)

    def excess(self, model: nn.Module, progress: float) -> Tensor:
        """Excess of what is left over what is wanted at a fraction of the phase: 0.1 is 10 %."""
        assert self.pressure is not None  # callers ask only in phases that prune
        channels = channel_thresholds_of(model)
        alive = channels.left() if channels else survivors(model)
        return self.pressure.above(alive, progress)

    def regulariser(self, model: nn.Module) -> Tensor:
        """What the pressure's factor multiplies: the differentiable cost of what is left."""
        channels = channel_thresholds_of(model)
        return channels.penalty() if channels else penalty(model)

    def weigh(self, model: nn.Module, step: int) -> None:
        """Brings the bytes of survivors up to date, every so many steps, counted from 0."""
        if self.pressure and self.pressure.settings.weigh == "bytes" and step % WEIGH_EVERY == 0:
            weigh_by_bits(model)

    def density(self, model: nn.Module) -> float:
        """Survivors over elements of the pruned weights; 1 before there are any.

        While channels are pruned: the fraction of their cost that is left.
        """
        if (channels := channel_thresholds_of(model)) is not None:
            return float(channels.left())
        if self.pressure is not None:
            return density(model).total
        if not self.state.pruned:
            return 1.0
        layers = density(model).layers
        nnz = sum(layer.nnz for layer in layers if layer.name in self.state.pruned)
        return nnz / self.state.size

    def layers(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        """Density of each pruned weight, and its threshold where it has a learned one."""
        if (channels := channel_thresholds_of(model)) is not None:
            return channels.densities(), channels.thresholds()
        layers = [layer for layer in density(model).layers if layer.name in self.state.pruned]
        densities = {layer.name: layer.density for layer in layers}
        return densities, {x.name: x.threshold for x in layers if x.threshold is not None}


def step_with_clamp(optimizer: Any, thresholds: list[Tensor], above: Tensor) -> None:
    """An optimizer step that raises no threshold once the wanted density is reached.

    Without the clamp the optimizer's momentum would go on raising thresholds for some steps.

    Args:
        optimizer: holds the thresholds, and may hold more.
        thresholds: the parameters behind them.
        above: excess of survivors; positive where more is left than wanted.
    """
    if above.device.type == "cpu" and float(above) > 0:  # where looking at it is free
        optimizer.step()
        return
    before = [threshold.detach().clone() for threshold in thresholds]
    optimizer.step()
    with torch.no_grad():
        for threshold, old in zip(thresholds, before, strict=True):
            threshold.copy_(torch.where(above > 0, threshold, torch.minimum(threshold, old)))


def one_cycle(progress: float) -> float:
    """Learning rate over its peak at a fraction of a phase: linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return (progress + 0.01) / (WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def steady(progress: float) -> float:
    """The same for thresholds: at the peak to the end, as a goal may need large changes late."""
    return one_cycle(progress) if progress < WARM_UP else 1.0
