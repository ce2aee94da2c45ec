"""Four methods of magnitude pruning, from a dense network to an exact density, for `baselines`.

`iterative` (imp), `gradual` (gmp), `soft` (str) and `one_shot` are functions of a `Setup`, which
they share with each other and with the learned thresholds that they are compared with. Loss,
batches, augmentation, the learning rate schedule, dropout (disabled) and the evaluation on the
validation split after each epoch are those of `compress`; weight decay is that of its tuning.
Nothing here writes a file; `baselines` runs the methods and prints the tables.
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
from prune2onnx.runs.recipe import Recipe
from prune2onnx.training.augment import augment
from prune2onnx.training.compression.course import one_cycle
from prune2onnx.training.distill import Teacher
from prune2onnx.training.loop import disable_dropout
from prune2onnx.training.model import make_model
from prune2onnx.training.pressure import Pressure
from prune2onnx.training.scoring import Order, evaluate

HOLD = 0.25  # fraction of gradual pruning's epochs with the final masks
EVERY, FEWEST = 100, 20  # gradual pruning's steps between prunings, and its fewest prunings
BEYOND = 1  # rounds of iterative pruning beyond the target density, for its curve alone
START = 0.05  # initial soft thresholds, in rms of their layer
DECAY, BAND = 20.0, 0.25  # their largest decay over a training, and the log excess that needs it

Masks = dict[str, Tensor]
Rule = Callable[[nn.Module, Sequence[str], float], Masks]


@dataclass(frozen=True)
class Setup:
    """The arguments of every method.

    Attributes:
        data: the data set.
        recipe: the learned run's, with epochs filled in, and `weights` the dense network.
        names: the weights to prune.
        density: the target, 0-1.
        device: to train on.
    """

    data: Data
    recipe: Recipe
    names: tuple[str, ...]
    density: float
    device: torch.device

    def model(self) -> nn.Module:
        """A new copy of the dense network."""
        model = make_model(self.recipe, self.data)
        images = len(self.data.input_shape) == 3  # channels last is faster, as in `compress`
        layout = torch.channels_last if images else torch.contiguous_format
        return model.to(device=self.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    @property
    def epochs(self) -> int:
        """Epochs of the pruning."""
        return (self.recipe.channels.epochs or 0) + (self.recipe.prune.epochs or 0)

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return len(self.order())

    def order(self) -> Order:
        """Batches of the training split."""
        return Order(len(self.data.train), self.recipe.batch_size, 0, 1)


@dataclass(frozen=True)
class Point:
    """A network at a density: its errors in percent, and the seconds of training until then."""

    density: float
    validation_error: float
    test_error: float
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """A pruned network, the seconds of its training, its curve if it has one, and a note."""

    model: nn.Module
    seconds: float
    curve: tuple[Point, ...] = ()
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """Everything but the network."""
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
    """Keeps the same fraction of every layer, the largest weights (Zhu and Gupta)."""
    masks = {}
    for name in names:
        w = model.get_parameter(name).detach().abs()
        masks[name] = (w >= largest(w, max(1, round(density * w.numel())))) & (w > 0)
    return masks


RULES: dict[str, Rule] = {"deviation": by_deviation, "uniform": uniform}


def hold(model: nn.Module, masks: Masks) -> None:
    """Zeroes the weights outside of the masks."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def density_of(model: nn.Module, names: Sequence[str]) -> float:
    """Nonzeros over elements, 0-1."""
    weights = [model.get_parameter(name) for name in names]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


# -- training ---------------------------------------------------------------------------------


def train(
    setup: Setup,
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
        setup: the settings.
        model: trained in place.
        epochs: may be 0.
        stream: identifies the training, for its seeds.
        masks: applied after every step; may change during training.
        lr: peak learning rate; default: that of the prune phase.
        groups: the optimiser's parameter groups, if there are several.
        before_step: called with the step, from 0, and the optimiser.

    Returns:
        Seconds, including an evaluation on the validation split after each epoch.
    """
    recipe, order, step, seconds = setup.recipe, setup.order(), 0, 0.0
    teacher = Teacher(make_model(recipe, setup.data).to(setup.device), recipe)
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
        disable_dropout(model)
        loader = DataLoader(setup.data.train, batch_sampler=order, collate_fn=collate)
        for x, y in loader:
            for group in optimiser.param_groups:
                group["lr"] = peak * one_cycle(step / (epochs * len(order)))
            before_step(step, optimiser)
            x = augment(x, recipe.augment, drawing).to(setup.device)
            y = y.to(setup.device)
            loss = teacher.loss(x, y, model(x))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            hold(model, masks or {})
            step += 1
        _, validation_loss = evaluate(
            model, setup.data.validation, batch_size=2 * recipe.batch_size
        )
        if not math.isfinite(validation_loss):
            raise ArithmeticError(f"stream {[*stream]}, epoch {epoch}: the validation loss is NaN")
        seconds += time.perf_counter() - began
    return seconds


def measure(setup: Setup, model: nn.Module, seconds: float) -> Point:
    """A point of a curve, with the test error, by which nothing is chosen."""
    validation, _ = evaluate(model, setup.data.validation)
    test, _ = evaluate(model, setup.data.test)
    return Point(density_of(model, setup.names), validation, test, seconds)


# -- the methods ------------------------------------------------------------------------------


def one_shot(setup: Setup) -> Pruned:
    """Magnitude pruning to the density at once, then all epochs of the prune phase to recover."""
    model = setup.model()
    masks = by_deviation(model, setup.names, setup.density)
    hold(model, masks)
    return Pruned(model, train(setup, model, setup.epochs, (10,), masks=masks))


def iterative(setup: Setup, rounds: int = 6, epochs: int | None = None) -> Pruned:
    """Rounds of pruning and retraining, densities in geometric progression.

    Han et al., "Learning both weights and connections for efficient neural networks" (arXiv
    1506.02626): per-layer thresholds q * std(w); the epochs, by default those of the recipe's
    pruning, are divided among the rounds. The curve has every round twice: as it is, and after the
    recipe's tuning of a copy, which does not count in the seconds of later points (`compress` tunes
    the last round). `BEYOND` further rounds are for the curve only.
    """
    model = setup.model()
    total = epochs or setup.epochs
    per_round = np.diff(np.linspace(0, total, rounds + 1).round().astype(int)).tolist()
    per_round += [max(per_round)] * BEYOND
    seconds, curve = 0.0, []
    for number, own in enumerate(per_round, 1):
        masks = by_deviation(model, setup.names, setup.density ** (number / rounds))
        hold(model, masks)
        seconds += train(setup, model, own, (20, number), masks=masks)
        curve.append(measure(setup, model, seconds))
        if number == rounds:
            done, spent = copy.deepcopy(model), seconds
            continue
        tune = setup.recipe.tune
        branch = copy.deepcopy(model)
        stream = (21, number)
        more = train(setup, branch, tune.epochs or 0, stream, masks=masks, lr=tune.lr)
        curve.append(measure(setup, branch, seconds + more))
    return Pruned(done, spent, tuple(curve))


def gradual(setup: Setup, rule: str = "better") -> Pruned:
    """Sparsity that rises along a cubic curve during training.

    Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878): s(t) = s (1 - (1 - t)^3), with
    new masks every 100 steps (more often in short trainings), then a fraction `HOLD` of the epochs
    with the final ones. In the paper all layers are equally sparse ("uniform"), which harms small
    networks; "deviation" compares magnitudes over all layers, each relative to its layer's standard
    deviation; "better" tries both and keeps the one with the lower validation error, and only its
    seconds.
    """
    tried = []
    for name in RULES if rule == "better" else [rule]:
        model, masks = setup.model(), Masks()
        steps = setup.epochs * setup.steps
        ramp = max(1, int((1 - HOLD) * steps))
        every = max(1, min(EVERY, ramp // FEWEST))
        prune = _cubic(setup, model, masks, RULES[name], ramp, every)
        seconds = train(setup, model, setup.epochs, (30,), masks=masks, before_step=prune)
        error = evaluate(model, setup.data.validation)[0]
        tried.append((error, name, Pruned(model, seconds, note=name)))
    return min(tried, key=lambda entry: entry[:2])[2]


def _cubic(
    setup: Setup, model: nn.Module, masks: Masks, rule: Rule, ramp: int, every: int
) -> Callable[[int, Any], None]:
    def prune(step: int, _: Any) -> None:
        if step > ramp or (step < ramp and step % every):
            return
        sparsity = (1 - setup.density) * (1 - (1 - step / ramp) ** 3)
        masks.update(rule(model, setup.names, 1 - sparsity))
        hold(model, masks)

    return prune


class SoftThreshold(nn.Module):
    """v, s -> sign(v) relu(|v| - exp(s)), with a learned s for each layer."""

    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.log(START * v.detach().square().mean().sqrt()))

    def forward(self, v: Tensor) -> Tensor:
        """Any shape."""
        return v.sign() * torch.relu(v.abs() - torch.exp(self.s))


def soft(setup: Setup) -> Pruned:
    """Soft thresholds that weight decay increases.

    Kusupati et al., "Soft threshold weight reparameterization for learnable sparsity" (arXiv
    2002.03231). There one weight decay of v and s determines the density, and is tuned by hand.
    Here that of v is the tuning's, as for the other methods. That of s, which draws exp(s) towards
    1, grows with the excess of the density over the scheduled one, with the schedule of the learned
    thresholds (`training.pressure`). One decay for both, as in the paper, was tried on digits at 5
    and 2 %: with Adam, a decay that moves s in so few steps destroys v. sigmoid(s), as in the
    paper, in place of exp(s) is too small: under decay it does not exceed 0.5. At the end exactly
    the wanted number of weights stays, those with the largest |v| / exp(s), as if all thresholds
    were scaled by one factor.
    """
    model = setup.model()
    sites = {name: model.get_submodule(name.rpartition(".")[0]) for name in setup.names}
    rules = {name: SoftThreshold(model.get_parameter(name)) for name in sites}
    for name, module in sites.items():
        parametrize.register_parametrization(module, "weight", rules[name])
    originals = {name: model.get_parameter(_original(name)) for name in sites}
    size = sum(v.numel() for v in originals.values())
    steps = setup.epochs * setup.steps
    pressure = Pressure(setup.recipe.prune, size, steps, setup.density, setup.device)

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
    seconds = train(setup, model, setup.epochs, (40,), groups=groups, before_step=drive)
    every = torch.cat([relative(name).flatten() for name in sites])
    q = largest(every, max(1, round(setup.density * size)))
    with torch.no_grad():
        for name, module in sites.items():
            r, v = relative(name), originals[name]
            # slightly below q, so that the last survivor is not zero
            v.copy_(torch.where(r >= q, v * (1 - min(1.0, 0.999 * q) / r), 0.0))
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    result = setup.model()  # with its parameters in order
    result.load_state_dict(model.state_dict())
    return Pruned(result, seconds, note=f"final cut: thresholds x {q:.2f}")


def _original(name: str) -> str:
    """The name that torch gives to a weight under a parametrization."""
    return f"{name.removesuffix('weight')}parametrizations.weight.original"
