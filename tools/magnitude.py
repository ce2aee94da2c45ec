"""Pruning by magnitude, four ways, from a dense network to an exact density: the baselines' half.

`iterative` (imp), `gradual` (gmp), `soft` (str) and `one_shot`, each a function of a `Course`: what
they have in common with each other and with the learned thresholds they are compared with. Loss,
batches, augmentation, learning rate over a phase, dropout at rest and the look at the validation
split after each epoch are those of `compress`; weight decay is that of its tuning. Nothing here
writes a file; `baselines` runs the methods and prints the tables.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from prune2onnx.data import Data, collate
from prune2onnx.pipeline import make_model
from prune2onnx.recipe import Recipe
from prune2onnx.training import evaluate
from prune2onnx.training.augment import augment
from prune2onnx.training.distill import Teacher
from prune2onnx.training.loop import one_cycle, rest_dropout
from prune2onnx.training.pressure import Pressure
from prune2onnx.training.scoring import Order

HOLD = 0.25  # part of gradual pruning's epochs at the final masks
EVERY, FEWEST = 100, 20  # gradual pruning's steps between prunings, and its fewest prunings
BEYOND = 1  # rounds of iterative pruning past the density wanted, for its curve alone
START = 0.05  # soft thresholds begin here, in rms of their layer
DECAY, BAND = 20.0, 0.25  # their decay over a training, at most, and the log excess that takes it

Masks = dict[str, Tensor]
Rule = Callable[[nn.Module, Sequence[str], float], Masks]


@dataclass(frozen=True)
class Course:
    """What every method is given.

    Attributes:
        data: its training split is learned from.
        recipe: the learned run's, with epochs filled in, and `weights` the dense network.
        names: the weights to prune.
        density: to end at, 0-1.
        device: to train on.
    """

    data: Data
    recipe: Recipe
    names: tuple[str, ...]
    density: float
    device: torch.device

    def model(self) -> nn.Module:
        """The dense network, anew."""
        model = make_model(self.recipe, self.data)
        images = len(self.data.input_shape) == 3  # channels last is faster, as in `compress`
        layout = torch.channels_last if images else torch.contiguous_format
        return model.to(device=self.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    @property
    def epochs(self) -> int:
        """Of the pruning."""
        return (self.recipe.narrow.epochs or 0) + (self.recipe.prune.epochs or 0)

    @property
    def steps(self) -> int:
        """Of one epoch."""
        return len(self.order())

    def order(self) -> Order:
        """Batches of the training split."""
        return Order(len(self.data.train), self.recipe.batch_size, 0, 1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Point:
    """What a network with so many weights came to: percent, and training seconds up to there."""

    density: float
    validation_error: float
    test_error: float
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """A pruned network, the seconds of its training, its curve if it has one, and a remark."""

    model: nn.Module
    seconds: float
    curve: tuple[Point, ...] = ()
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """All but the network."""
        return {"seconds": self.seconds, "curve": list(map(asdict, self.curve)), "note": self.note}


# -- which weights to keep --------------------------------------------------------------------


def largest(values: Tensor, keep: int) -> float:
    """The least of the `keep` largest values."""
    flat = values.flatten()
    return float(flat.kthvalue(flat.numel() - keep + 1).values)


def by_deviation(model: nn.Module, names: Sequence[str], density: float) -> Masks:
    """Keeps |w| >= q * std(w) of each layer, one q for the density of all (Han et al.)."""
    relative = {}
    for name in names:
        w = model.get_parameter(name).detach()
        alive = w[w != 0]
        relative[name] = w.abs() / (alive.std() if len(alive) > 1 else 1.0)
    every = torch.cat([r.flatten() for r in relative.values()])
    q = largest(every, max(1, round(density * every.numel())))
    return {name: (r >= q) & (r > 0) for name, r in relative.items()}


def uniform(model: nn.Module, names: Sequence[str], density: float) -> Masks:
    """Keeps the same part of every layer, the largest weights (Zhu and Gupta)."""
    masks = {}
    for name in names:
        w = model.get_parameter(name).detach().abs()
        masks[name] = (w >= largest(w, max(1, round(density * w.numel())))) & (w > 0)
    return masks


RULES: dict[str, Rule] = {"deviation": by_deviation, "uniform": uniform}


def hold(model: nn.Module, masks: Masks) -> None:
    """Zeroes what the masks leave out."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def density_of(model: nn.Module, names: Sequence[str]) -> float:
    """Nonzeros over elements, 0-1."""
    weights = [model.get_parameter(name) for name in names]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


# -- training ---------------------------------------------------------------------------------


def train(
    course: Course,
    model: nn.Module,
    epochs: int,
    stream: Sequence[int],
    *,
    masks: Masks | None = None,
    lr: float | None = None,
    groups: list[dict[str, Any]] | None = None,
    before_step: Callable[[int, Any], None] = lambda step, optimiser: None,
) -> float:
    """Trains as `compress` does after its dense phase.

    Args:
        course: the settings.
        model: trained in place.
        epochs: may be 0.
        stream: numbers the training, for its seeds.
        masks: held after every step; may change on the way.
        lr: peak learning rate; default: that of the prune phase.
        groups: the optimiser's parameters, where they are not all alike.
        before_step: told the step, from 0, and the optimiser.

    Returns:
        Seconds, a look at the validation split after each epoch included.
    """
    recipe, order, step, seconds = course.recipe, course.order(), 0, 0.0
    teacher = Teacher(make_model(recipe, course.data).to(course.device), recipe)
    peak = lr or recipe.prune.lr
    decay = recipe.tune.weight_decay
    optimiser = torch.optim.AdamW(
        groups or model.parameters(), lr=peak, weight_decay=decay, fused=True
    )
    for epoch in range(epochs):
        began = time.perf_counter()
        order.seed = int(np.random.SeedSequence([recipe.seed, *stream, epoch]).generate_state(1)[0])
        torch.manual_seed(order.seed)
        drawing = torch.Generator().manual_seed(order.seed)
        model.train()
        rest_dropout(model)
        loader = DataLoader(course.data.train, batch_sampler=order, collate_fn=collate)
        for x, y in loader:
            for group in optimiser.param_groups:
                group["lr"] = peak * one_cycle(step / (epochs * len(order)))
            before_step(step, optimiser)
            x = augment(x, recipe.augment, drawing).to(course.device)
            y = y.to(course.device)
            loss = teacher.loss(x, y, model(x))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            hold(model, masks or {})
            step += 1
        _, loss_there = evaluate(model, course.data.validation, batch_size=2 * recipe.batch_size)
        if not math.isfinite(loss_there):
            raise ArithmeticError(f"stream {[*stream]}, epoch {epoch}: the validation loss is NaN")
        seconds += time.perf_counter() - began
    return seconds


def measure(course: Course, model: nn.Module, seconds: float) -> Point:
    """A point of a curve, test error included: nothing is chosen by it."""
    validation, _ = evaluate(model, course.data.validation)
    test, _ = evaluate(model, course.data.test)
    return Point(density_of(model, course.names), validation, test, seconds)


# -- the methods ------------------------------------------------------------------------------


def one_shot(course: Course) -> Pruned:
    """Magnitude pruning to the density at once, then all epochs of the prune phase to recover."""
    model = course.model()
    masks = by_deviation(model, course.names, course.density)
    hold(model, masks)
    return Pruned(model, train(course, model, course.epochs, (10,), masks=masks))


def iterative(course: Course, rounds: int = 6, epochs: int | None = None) -> Pruned:
    """Rounds of pruning and retraining, densities in geometric progression.

    Han et al., "Learning both weights and connections for efficient neural networks" (arXiv
    1506.02626): per-layer thresholds q * std(w); the epochs, by default those of the recipe's
    pruning, are shared out among the rounds. The curve holds every round twice: as it is, and after
    the recipe's tuning of a copy, which does not count in the seconds of later points (the last
    round is tuned by `compress`). `BEYOND` further rounds are for the curve only.
    """
    model = course.model()
    total = epochs or course.epochs
    shares = np.diff(np.linspace(0, total, rounds + 1).round().astype(int)).tolist()
    shares += [max(shares)] * BEYOND
    seconds, curve = 0.0, []
    for number, share in enumerate(shares, 1):
        masks = by_deviation(model, course.names, course.density ** (number / rounds))
        hold(model, masks)
        seconds += train(course, model, share, (20, number), masks=masks)
        curve.append(measure(course, model, seconds))
        if number == rounds:
            done, spent = copy.deepcopy(model), seconds
            continue
        tune = course.recipe.tune
        branch = copy.deepcopy(model)
        stream = (21, number)
        more = train(course, branch, tune.epochs or 0, stream, masks=masks, lr=tune.lr)
        curve.append(measure(course, branch, seconds + more))
    return Pruned(done, spent, tuple(curve))


def gradual(course: Course, rule: str = "better") -> Pruned:
    """Sparsity that rises along a cubic curve while training goes on.

    Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878): s(t) = s (1 - (1 - t)^3), masks
    taken anew every 100 steps (more often in short trainings), then `HOLD` of the epochs at the
    final ones. In the paper all layers are equally sparse ("uniform"), which small networks bear
    badly; "deviation" compares magnitudes over all layers, each relative to its layer's deviation;
    "better" tries both and keeps the one with the lower validation error, and its seconds alone.
    """
    tried = []
    for name in RULES if rule == "better" else [rule]:
        model, masks = course.model(), Masks()
        steps = course.epochs * course.steps
        ramp = max(1, int((1 - HOLD) * steps))
        every = max(1, min(EVERY, ramp // FEWEST))
        prune = _cubic(course, model, masks, RULES[name], ramp, every)
        seconds = train(course, model, course.epochs, (30,), masks=masks, before_step=prune)
        error = evaluate(model, course.data.validation)[0]
        tried.append((error, name, Pruned(model, seconds, note=name)))
    return min(tried, key=lambda entry: entry[:2])[2]


def _cubic(
    course: Course, model: nn.Module, masks: Masks, rule: Rule, ramp: int, every: int
) -> Callable[[int, Any], None]:
    def prune(step: int, _: Any) -> None:
        if step > ramp or (step < ramp and step % every):
            return
        sparsity = (1 - course.density) * (1 - (1 - step / ramp) ** 3)
        masks.update(rule(model, course.names, 1 - sparsity))
        hold(model, masks)

    return prune


class SoftThreshold(nn.Module):
    """v, s -> sign(v) relu(|v| - exp(s)); s is learned, one a layer."""

    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.log(START * v.detach().square().mean().sqrt()))

    def forward(self, v: Tensor) -> Tensor:
        """Any shape."""
        return v.sign() * torch.relu(v.abs() - torch.exp(self.s))


def soft(course: Course) -> Pruned:
    """Soft thresholds that weight decay drives up.

    Kusupati et al., "Soft threshold weight reparameterization for learnable sparsity" (arXiv
    2002.03231). There one weight decay of v and s decides the density, and is found by hand. Here
    that of v is the tuning's, as for the other methods; that of s, which draws exp(s) towards 1,
    is as strong as the density exceeds the wanted one at that time, which is that of the learned
    thresholds (`training.pressure`). One decay for both, as in the paper, was tried on digits at 5
    and 2 %: under Adam, what moves s in so few steps starves v. Nor is it sigmoid(s): what it
    cannot exceed, 0.5, was too little. In the end the weights with the largest |v| / exp(s) stay,
    to the exact number, as if all thresholds were moved by one factor.
    """
    model = course.model()
    sites = {name: model.get_submodule(name.rpartition(".")[0]) for name in course.names}
    rules = {name: SoftThreshold(model.get_parameter(name)) for name in sites}
    for name, module in sites.items():
        parametrize.register_parametrization(module, "weight", rules[name])
    originals = {name: model.get_parameter(_original(name)) for name in sites}
    size = sum(v.numel() for v in originals.values())
    steps = course.epochs * course.steps
    pressure = Pressure(course.recipe.prune, size, steps, course.density, course.device)

    def relative(name: str) -> Tensor:
        return originals[name].detach().abs() / torch.exp(rules[name].s.detach())

    def drive(step: int, optimiser: Any) -> None:
        alive = torch.stack([(relative(name) > 1).sum() for name in sites]).sum()
        excess = torch.log1p(pressure.above(alive, step / steps))
        group = optimiser.param_groups[0]
        group["weight_decay"] = DECAY / steps / group["lr"] * float((excess / BAND).clamp(0, 1))

    thresholds = [rule.s for rule in rules.values()]
    others = [p for p in model.parameters() if all(p is not s for s in thresholds)]
    groups: list[dict[str, Any]] = [{"params": thresholds}, {"params": others}]
    seconds = train(course, model, course.epochs, (40,), groups=groups, before_step=drive)
    every = torch.cat([relative(name).flatten() for name in sites])
    q = largest(every, max(1, round(course.density * size)))
    with torch.no_grad():
        for name, module in sites.items():
            r, v = relative(name), originals[name]
            # a hair below q: the last survivor is no zero
            v.copy_(torch.where(r >= q, v * (1 - min(1.0, 0.999 * q) / r), 0.0))
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    plain = course.model()  # with its parameters in order
    plain.load_state_dict(model.state_dict())
    return Pruned(plain, seconds, note=f"final cut: thresholds x {q:.2f}")


def _original(name: str) -> str:
    """What torch calls a weight under a parametrization."""
    return f"{name.removesuffix('weight')}parametrizations.weight.original"
