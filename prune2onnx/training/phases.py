"""What each phase does to a model before and after it is trained, and how a size is met.

dense: nothing. narrow: learned thresholds on whole channels, by what they cost. prune: learned
thresholds on weights. At the end of both all thresholds are moved by one factor, so that the budget
is met.
tune: masks held. share: BatchNorm folded, dead parts settled, weights put on few levels; where the
file is too large, the survivors that are worth least go.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from prune2onnx.data import collate
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning import (
    Widths,
    bake,
    density,
    density_of_bits,
    hold_zeros,
    narrow,
    prunable_weights,
    prune,
    scale_thresholds,
    selected_weights,
    thresholds_of,
    widths_of,
)
from prune2onnx.recipe import MACS
from prune2onnx.structure import Structure
from prune2onnx.training.denormals import denormals
from prune2onnx.training.fold import fold_batch_norm
from prune2onnx.training.levels import (
    bake_levels,
    coarsen,
    drop,
    put_back,
    put_on_levels,
    scales_of,
    worth,
)
from prune2onnx.training.loop import Loop
from prune2onnx.training.pressure import Pressure

_BITS = 10.0
"""What a survivor takes, about, where there are few: a first guess of a density from a size."""

_SPARE = {"prune": 1.25, "tune": 1.1, "share": 1.03}
"""Of what is wanted: what pruning leaves, and what the phases after it begin with. What a threshold
lets through is culled by what it is worth, which finds weights that no output misses; in steps,
between which the others make up for it."""

_SPEED_COUNTS = {"size": 0.0, "balanced": 0.5, "latency": 1.0}
"""How much time counts in what a channel costs; the rest is for weights."""

_KEPT = {"balanced": 0.25, "latency": 0.5}
"""Density of what channels leave, where speed counts: zeros bring none, so few are made."""

_MEASURE_FROM = 0.4  # part of the ramp after which files are measured
_KEEP_FROM = 0.5  # part of the last phase after which the budget is kept: what goes is made up for
_REACH = {"narrow": 32.0, "prune": 2.0}
"""Thresholds may be moved by this factor at the end, and by its inverse."""
_HALVINGS = 12
_MOST_DROPPED = 0.9  # part of the survivors that may be dropped for the sake of a size
_SENSITIVITY_BATCHES = 64


class Deployment(Protocol):
    """What training has to know of the file that will come out."""

    def nbytes(self, model: nn.Module) -> int:
        """Bytes of the file of a model with plain parameters; it may be changed."""

    def structure(self, model: nn.Module) -> Structure:
        """Which channels of a model with plain parameters are one, and what its layers cost."""

    def settle(self, model: nn.Module) -> None:
        """Zeroes what no output depends on, and carries constants into the next layer's bias."""


class Run(Loop):
    """All phases of one `fit`.

    Args:
        deployment: tells what the file will take; None where nobody knows.
        loop: as of `Loop`.
    """

    def __init__(self, *loop: Any, deployment: Deployment | None) -> None:
        super().__init__(*loop)
        self.deployment = deployment

    def phase(self, phase: str, model: nn.Module) -> None:
        """Takes the model from the end of one phase to the end of the next, in place."""
        if phase == "share":
            fold_batch_norm(model, self._example())
        finished = self.checkpoints.load_finished(phase, model)
        if finished is not None:
            self._recall(finished)
            return
        finish = getattr(self, f"_begin_{phase}")(model)
        self._train(phase, model)
        finish()
        self.checkpoints.save_finished(phase, model, self._facts())

    def _begin_dense(self, model: nn.Module) -> Callable[[], object]:
        return lambda: None

    def _begin_narrow(self, model: nn.Module) -> Callable[[], object]:
        self._put_thresholds("prune", self._copied(model))  # what cannot be pruned is told now
        widths = self._narrow(model)
        goal = self._narrowed()
        self._press("narrow", 1, goal)

        def finish() -> None:
            self._meet_goal("narrow", model, lambda one: self._wider(one, goal))
            silent = {id(parameter) for parameter in widths.bake()}
            self.silent = tuple(n for n, p in model.named_parameters() if id(p) in silent)
            settled = self._deployed(model, levels=False)
            with torch.no_grad():  # inputs that no channel feeds any more
                for name in self.pruned:
                    model.get_parameter(name).mul_(settled.get_parameter(name) != 0)

        return finish

    def _narrow(self, model: nn.Module) -> Widths:
        """Puts thresholds on channels, as far as they are one in the graph."""
        if self.deployment is None:
            raise Prune2OnnxError(
                "whole channels are to be pruned, but nobody tells which of them are one; "
                "give fit a deployment, or no narrow.epochs"
            )
        plain = self._copied(model)
        norms = fold_batch_norm(plain, self._example())
        settings: Any = self.recipe.phase("narrow")
        return narrow(
            model,
            self.deployment.structure(plain.cpu()),
            norms,
            # a budget of multiply-adds counts nothing else, where speed is no goal of its own
            speed=_SPEED_COUNTS[self.recipe.goal] or float(self.recipe.narrows),
            by_macs=self.recipe.target_macs is not None,
            multiple=self.recipe.multiple,
            chosen=self.pruned,
            function=settings.function,
            beta=settings.beta,
            start=settings.start,
        )

    def _wider(self, model: nn.Module, goal: float) -> bool:
        """Whether more is left of the channels than wanted."""
        widths = widths_of(model)
        assert widths is not None  # they are what is scaled
        target = self.recipe.target_macs
        if target is not None and float(widths.macs_left()) > target:
            return True
        return float(widths.left()) > goal

    def _narrowed(self) -> float:
        """Part of what channels cost that is to be left."""
        recipe = self.recipe
        if recipe.goal == "size" and recipe.target_macs is None:
            return min(1.0, recipe.narrow.spare * self._first_goal())
        return recipe.target_macs or MACS

    def _begin_prune(self, model: nn.Module) -> Callable[[], object]:
        lift: Callable[[], object] = lambda: None  # noqa: E731
        start = 1.0
        if self.recipe.narrow.epochs:
            lift = self._hold(model)
            start = self._count(model) / self.size
            if self.recipe.goal != "size" and not self.recipe.target_density:
                self.goal = _KEPT[self.recipe.goal] * start
        self._put_thresholds("prune", model)
        self._press("prune", self.size, min(start, _SPARE["prune"] * self._first_goal()), start)

        def finish() -> None:
            self._meet_goal("prune", model, lambda one: self._over(one, _SPARE["prune"]))
            bake(model)
            lift()

        return finish

    def _put_thresholds(self, phase: str, model: nn.Module) -> None:
        chosen: Any = self.recipe.phase(phase)
        prune(
            model,
            function=chosen.function,
            granularity=chosen.granularity,
            thresholds=chosen.thresholds,
            beta=chosen.beta,
            start=chosen.start,
            include=chosen.include,
            exclude=chosen.exclude,
            balance=chosen.balance,
            importance=chosen.importance,
        )
        layers = density(model).layers
        self.pruned = tuple(layer.name for layer in layers)
        self.size = sum(layer.size for layer in layers)

    def _first_goal(self) -> float:
        """Density to be reached, before any file is measured."""
        if self._target is None:
            return self.goal
        most = self.recipe.target_density or 1.0
        each = 8 * self._target / self.size  # bits for an element
        # where few are left they lie close together, and take less than if they lay anywhere
        return min(most, max(each / _BITS, density_of_bits(each)))

    def _press(self, phase: str, size: int, goal: float, start: float = 1.0) -> None:
        if not start:
            raise Prune2OnnxError(
                "no weight is left of the channels that remained; raise --narrow-spare or "
                "--narrow-epochs, or ask for less"
            )
        chosen: Any = self.recipe.phase(phase)
        steps = chosen.epochs * len(self._order())
        device = self.accelerator.device
        self.pressure = Pressure(chosen, size, steps, goal, device, start=start)

    def _meet_goal(self, phase: str, model: nn.Module, over: Callable[[nn.Module], bool]) -> None:
        """Ends the pressure; moves all thresholds by one factor, so that not too much is left."""
        self.pressure = None
        if not self.recipe.prune.pressure:
            return
        low, high = 1 / _REACH[phase], _REACH[phase]
        trial = self._copied(model)
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            trial.load_state_dict(model.state_dict())
            _scale(trial, middle)
            low, high = (middle, high) if over(trial) else (low, middle)
        _scale(model, high)

    def _begin_tune(self, model: nn.Module) -> Callable[[], object]:
        if not self.pruned:
            self._pruned_before(model)
        self._meet_budget(model, _SPARE["tune"])
        return self._hold(model)

    def _hold(self, model: nn.Module) -> Callable[[], None]:
        """Keeps zeros of pruned weights and branches, until what it returns is called."""
        names = (*self.pruned, *self.silent)
        weights = {name: model.get_parameter(name).detach() for name in names}
        return hold_zeros(model, {name: w != 0 for name, w in weights.items()})

    def _pruned_before(self, model: nn.Module) -> None:
        """Takes the zeros that a model came with for its masks."""
        chosen = selected_weights(model, self.recipe.prune.include, self.recipe.prune.exclude)
        layers = [layer for layer in density(model).layers if layer.name in chosen]
        if all(layer.nnz == layer.size for layer in layers):
            raise Prune2OnnxError(
                "start is 'tune', but no Linear or convolution weight has a zero; "
                "start with 'prune', or give pruned weights"
            )
        self.pruned = tuple(layer.name for layer in layers)
        self.size = sum(layer.size for layer in layers)
        self.goal = self.recipe.target_density or 1.0  # as sparse as it came

    def _begin_share(self, model: nn.Module) -> Callable[[], object]:
        settings = self.recipe.share

        def error() -> float:
            return self.error(model)

        self._settle(model, {})
        small, halves = coarsen(
            model,
            self._others(model),
            settings.small_levels,
            error,
            allowed=error() + settings.slack,
        )
        self._put_on_levels(model, (*self.pruned, *small))
        still = [name for name in self._others(model) if not model.get_parameter(name).any()]
        for name in (*halves, *still):  # rounded, and to stay so
            model.get_parameter(name).requires_grad_(False)
        self._meet_budget(model, _SPARE["share"])

        def finish() -> None:
            self._meet_budget(model, 1.0)
            self._settle(model, bake_levels(model))

        return finish

    def _settle(self, model: nn.Module, scales: Mapping[str, Tensor]) -> None:
        """Dead parts become zero; what constants they sent on stays on levels, in the biases."""
        if self.deployment is None:
            return
        before = {name: model.get_parameter(name).detach().clone() for name in scales}
        with denormals(flushed=False):
            self.deployment.settle(model)
        for name, old in before.items():
            if not torch.equal(old, model.get_parameter(name)):
                put_back(model, name, scales[name])

    def _others(self, model: nn.Module) -> list[str]:
        """Small parameters; a weight that was excluded from pruning is left alone here, too."""
        kept = {*self.pruned, *prunable_weights(model)}
        return [name for name, _ in model.named_parameters() if name not in kept]

    def _put_on_levels(self, model: nn.Module, names: Iterable[str]) -> None:
        largest = {name: self._largest(name) for name in names}
        put_on_levels(model, largest, common=self.recipe.share.step == "network")

    def _largest(self, name: str) -> int:
        settings = self.recipe.share
        return settings.levels if name in self.pruned else settings.small_levels

    # -- bytes ----------------------------------------------------------------------------------

    @property
    def _target(self) -> int | None:
        return self.recipe.target_size if self.deployment is not None else None

    def _deployed(self, model: nn.Module, *, levels: bool = True) -> nn.Module:
        """What a model would become if training ended now: plain parameters, few levels."""
        model = self._copied(model).eval()
        if thresholds_of(model):
            bake(model)
        if not scales_of(model):
            fold_batch_norm(model, self._example())
            names = (*self.pruned, *self._others(model)) if levels else ()
            self._put_on_levels(model, [n for n in names if model.get_parameter(n).any()])
        self._settle(model, bake_levels(model))
        return model

    def _copied(self, model: nn.Module) -> nn.Module:
        """A copy without mixed precision, whose parametrizations may be removed.

        torch keeps their properties on classes that a plain copy shares with the original.
        """
        model = self.accelerator.unwrap_model(copy.deepcopy(model), keep_fp32_wrapper=False)
        for module in model.modules():
            if parametrize.is_parametrized(module):
                kind = type(module)
                own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
                module.__class__ = type(kind.__name__, kind.__bases__, own)
        return model

    def _count(self, model: nn.Module) -> int:
        return sum(int(torch.count_nonzero(model.get_parameter(name))) for name in self.pruned)

    def _over(self, model: nn.Module, spare: float) -> bool:
        """Whether the file would be larger, or hold more weights, than `spare` times the goal."""
        model = self._deployed(model)
        left = self._count(model)
        if self._target is None or self.deployment is None:
            return left > spare * self.goal * self.size
        if left > spare * (self.recipe.target_density or 1) * self.size:
            return True
        return self._nbytes(model) > spare * self._target

    def _nbytes(self, model: nn.Module) -> int:
        """Bytes of the file of a deployed model."""
        assert self.deployment is not None
        with denormals(flushed=False):
            return self.deployment.nbytes(model.cpu())

    def _meet_budget(self, model: nn.Module, spare: float) -> None:
        """Drops the survivors that are worth least per bit until few enough are left."""
        if not self.recipe.prune.pressure or not self._over(model, spare):
            return
        plain = self._copied(model).eval()
        bake_levels(plain)  # a grid lets no gradient through to its largest
        weights = {name: plain.get_parameter(name).detach() for name in self.pruned}
        worths = worth(weights, self._sensitivity(plain))
        ranked = torch.cat([w[torch.isfinite(w)] for w in worths.values()]).sort().values
        if not len(ranked):
            return
        low, high = 0, int(_MOST_DROPPED * len(ranked))
        while high - low > max(1, len(ranked) // 1000):
            middle = (low + high) // 2
            trial = self._copied(model)
            drop(trial, worths, float(ranked[middle]))
            low, high = (middle, high) if self._over(trial, spare) else (low, middle)
        drop(model, worths, float(ranked[high]))

    def _sensitivity(self, model: nn.Module) -> dict[str, Tensor]:
        """Mean squared gradients over some batches: the empirical Fisher information's diagonal."""
        order = self._order()
        order.seed = self._seed("share", 0)
        loader = DataLoader(self.data.train, batch_sampler=order, collate_fn=collate)
        found = {name: torch.zeros_like(model.get_parameter(name)) for name in self.pruned}
        for batches, (x, y) in enumerate(loader):
            if batches == _SENSITIVITY_BATCHES:
                break
            model.zero_grad()
            self._loss(model, x, y).backward()  # type: ignore[no-untyped-call]
            for name, summed in found.items():
                gradient = model.get_parameter(name).grad
                if gradient is not None:
                    summed += gradient.square()
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, "sum")
        return found

    def _after_epoch(self, phase: str, model: nn.Module, progress: float) -> None:
        """Measures what would come out, and moves the density to end at."""
        if phase == "share" and _KEEP_FROM <= progress < 1:
            self._meet_budget(model, 1.0)
        if self.pressure is None or progress <= _MEASURE_FROM * self.recipe.prune.ramp:
            return
        if phase == "prune" and self._target is not None and self.deployment is not None:
            now = density(model).total
            nbytes = self._nbytes(self._deployed(model))
            self.pressure.aim(now, nbytes, round(_SPARE["prune"] * self._target))
            if self.recipe.target_density:
                limit = _SPARE["prune"] * self.recipe.target_density
                self.pressure.goal = min(self.pressure.goal, limit)


def _scale(model: nn.Module, factor: float) -> None:
    """Multiplies all thresholds of a model, on channels or on weights."""
    if (widths := widths_of(model)) is not None:
        widths.scale_thresholds(factor)
    else:
        scale_thresholds(model, factor)
