"""Learned thresholds on the weights of a module: prune, penalty, density, bake.

These calls are all a training loop needs::

    prune(model)                                   # before the optimizer is made
    loss = task_loss(model(x), y) + 1e-5 * penalty(model)
    masks = bake(model)                            # plain parameters again, with exact zeros
    hold_zeros(model, masks)                       # which stay zero in fine-tuning

Built on `torch.nn.utils.parametrize`: the dense tensor stays at `parametrizations.weight.original`
and keeps its identity, so an optimizer that holds it goes on. `hold_zeros` is in `holding`,
thresholds on whole channels are in `channels`; the training loop is in `training`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.pruning.computed import parametrize_own, unparametrize_own
from prune2onnx.pruning.coverage import Density, LayerDensity, other_parameters, warn_of_others
from prune2onnx.pruning.functions import FUNCTIONS, differentiable, survivor_gate
from prune2onnx.pruning.granularity import GRANULARITIES
from prune2onnx.pruning.learned import Learned
from prune2onnx.pruning.rate import survivor_bits
from prune2onnx.pruning.selection import Place, checked_weights, prunable_weights, select
from prune2onnx.pruning.wrappers import refuse_distributed, unwrapped


class LearnedThreshold(Learned):
    """The parametrization of one weight: w, t -> w~.

    t = scale * softplus(rho), so it is positive whatever the optimizer does to rho. `scale` is the
    root mean square of the weight's measures when pruning began; the sharpness beta is relative to
    it, too. In training mode the pruning function is used as it is; in evaluation mode all that is
    within the threshold is exactly zero, as after `bake`.

    Channels are treated differently. Those of a layer have similar measures, so most would come
    near the threshold at once; the network would rely on what the function passes there, and lose
    all of them together. So a channel is whole or exactly zero in training, too (with the
    function's slope as a straight-through gradient), pruned ones do not come back, and the penalty
    moves thresholds only, not weights.
    """

    scale: Tensor
    gone: Tensor | None

    def __init__(
        self,
        name: str,
        weight: Tensor,
        channel_axis: int,
        *,
        function: str,
        granularity: str,
        per_channel: bool,
        beta: float,
        start: float,
    ) -> None:
        super().__init__()
        self.name = name
        self.beta = beta
        self.importance = 1.0
        self.bits: Tensor | None = None  # of each element, once `weigh_by_bits` has set them
        self.function = FUNCTIONS[function]
        self.granularity = GRANULARITIES[granularity](channel_axis)
        with torch.no_grad():
            scale = weight.detach().float().square().mean().sqrt()
            if not scale > 0:  # an all-zero weight has no scale: use that of an initialiser
                scale = torch.tensor((weight.numel() / weight.shape[channel_axis]) ** -0.5)
        shape = [1] * weight.ndim
        if per_channel:
            shape[channel_axis] = weight.shape[channel_axis]
        rho = torch.expm1(torch.tensor(start)).log()  # softplus(rho) = start
        self.rho = nn.Parameter(
            torch.full(shape, float(rho), device=weight.device, dtype=weight.dtype)
        )
        self.register_buffer("scale", scale.to(weight.device, weight.dtype))
        gone = None
        if granularity == "channel":
            with torch.no_grad():
                gone = torch.zeros_like(self.granularity.measure(weight), dtype=torch.bool)
        self.register_buffer("gone", gone)

    def threshold(self) -> Tensor:
        """The threshold t > 0, [1, ..., 1] or [1, ..., channels, ..., 1]."""
        return self.scale * nn.functional.softplus(self.rho)

    def alive(self, w: Tensor) -> Tensor:
        """Bool, of w's shape: whether each element survives."""
        over = self.granularity.measure(w).abs() > self.threshold()
        if self.gone is not None:
            over = over & ~self.gone
        return over.expand_as(w)

    def survivors(self, w: Tensor) -> Tensor:
        """Differentiable number of surviving elements, or of their bytes; a scalar."""
        measure = self.granularity.measure(w)
        sharpness = self.beta / self.scale
        if self.gone is not None:
            measure = measure.detach()
        gate = differentiable(survivor_gate, measure, self.threshold(), sharpness)
        if self.gone is not None:
            gate = gate * ~self.gone
        if self.bits is None:
            return gate.sum() * (w.numel() / measure.numel())
        nbytes = self.bits.expand_as(w).sum_to_size(measure.shape) / 8
        return (gate * nbytes).sum()

    def forward(self, w: Tensor) -> Tensor:
        """The pruned weight: the function's value in training, hard zeros in evaluation."""
        measure = self.granularity.measure(w)
        sharpness = self.beta / self.scale
        pruned = differentiable(self.function, measure, self.threshold(), sharpness)
        w_pruned = self.granularity.spread(w, pruned)
        if self.training:
            if self.gone is None:
                return w_pruned
            with torch.no_grad():
                self.gone.logical_or_(measure <= self.threshold())
        hard = torch.where(self.alive(w), w_pruned, torch.zeros_like(w_pruned))
        return w_pruned + (hard - w_pruned).detach() if self.training else hard


@dataclass(frozen=True)
class _Site:
    """Where a learned threshold sits: a weight, and each module and attribute that holds it."""

    threshold: LearnedThreshold
    original: nn.Parameter
    holders: tuple[tuple[nn.Module, str], ...]


def learned_sites(model: nn.Module) -> Iterator[_Site]:
    """The learned thresholds of a model, each once, in the order of its modules."""
    found: dict[int, tuple[LearnedThreshold, nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in cast(Any, module).parametrizations.items():
            if isinstance(chain[0], LearnedThreshold):
                entry = found.setdefault(id(chain.original), (chain[0], chain.original, []))
                entry[2].append((module, attribute))
    for threshold, original, holders in found.values():
        yield _Site(threshold, original, tuple(holders))


def _known(value: str, table: Mapping[str, Any], what: str) -> None:
    if value not in table:
        near = difflib.get_close_matches(value, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"{what} {value!r} is not one of {', '.join(table)}{hint}")


def prune(
    model: nn.Module,
    *,
    function: str = "threshold-linear",
    granularity: str | Mapping[str, str] = "weight",
    thresholds: str = "layer",
    beta: float = 10.0,
    start: float = 0.05,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    balance: float = 0.0,
    importance: Mapping[str, float] | None = None,
) -> nn.Module:
    """Puts a learned threshold on the weights of a model, in place.

    Make the optimizer after this call, so that it holds the thresholds (`thresholds_of` lists
    them, for a group of their own).

    Args:
        model: any module, or DataParallel, AveragedModel or torch.compile around one; the matrices
            of Linear, convolution, recurrent, attention, Embedding and Bilinear layers are
            considered, those of transformers' Conv1D, too.
        function: a name in `FUNCTIONS`.
        granularity: "weight", or "channel": an output channel, a row of an Embedding, is pruned
            as a whole. A mapping gives patterns theirs, the last that matches counts:
            {"*": "weight", "tokens": "channel"}.
        thresholds: one per "layer", or one per "channel".
        beta: sharpness of the pruning function, in 1 / the weight's root mean square.
        start: first threshold, in root mean squares of the weight.
        include: patterns (fnmatch) of the weights to prune, such as "fc1" or "features.*".
        exclude: patterns of weights among those not to prune.
        balance: weights the penalty by (size / largest size) ** balance, so that small layers,
            usually important ones, are pruned less; 0 counts every element alike.
        importance: pattern -> another factor on the penalty of the weights it matches.

    Returns:
        The same model.

    Raises:
        RecipeError: an unknown choice, a number out of range, a pattern that matches nothing.
        Prune2OnnxError: no layer to prune, a weight that is not finite, not initialised or
            computed by its layer, or a DistributedDataParallel; the model is left as it was.

    Warns:
        PruningWarning: a quarter of the parameters or more are in matrices that cannot be pruned,
            such as bare parameters.
    """
    _known(function, FUNCTIONS, "pruning function")
    granularities = {"*": granularity} if isinstance(granularity, str) else granularity
    for one in granularities.values():
        _known(one, GRANULARITIES, "granularity")
    _known(thresholds, {"layer": 0, "channel": 0}, "thresholds")
    for value, what in ((beta, "beta"), (start, "start")):
        if not 0 < value < float("inf"):
            raise RecipeError(f"{what} is {value}, expected a positive number")
    if not 0 <= balance < float("inf"):
        raise RecipeError(f"balance is {balance}, expected zero or a positive number")
    wrapper = model
    refuse_distributed(wrapper, "pruned")
    model = unwrapped(wrapper)
    names = list(prunable_weights(model))
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in (importance or {}).items():
        if not 0 <= factor < float("inf"):
            raise RecipeError(f"importance of {pattern!r} is {factor}, expected a number from 0 on")
        for name in select(names, (pattern,), "importance"):
            factors[name] *= factor
    units = dict.fromkeys(names, "weight")
    chosen = checked_weights(model, include, exclude)
    for pattern, unit in granularities.items():
        units |= dict.fromkeys(select(names, (pattern,), "granularity"), unit)

    planned: list[tuple[LearnedThreshold, tuple[Place, ...]]] = []
    for name, places in chosen.items():
        learned = LearnedThreshold(
            name,
            places[0].value,
            places[0].axis,
            function=function,
            granularity=units[name],
            per_channel=thresholds == "channel",
            beta=beta,
            start=start,
        )
        learned.importance = factors[name]
        planned.append((learned, places))
    largest = max(places[0].value.numel() for _, places in planned)
    warn_of_others(model)
    for learned, places in planned:
        learned.importance *= (places[0].value.numel() / largest) ** balance
        learned.train(places[0].module.training)
        for place in places:
            parametrize_own(place.module, place.attribute, learned)
    return wrapper


def weigh_by_bits(model: nn.Module) -> None:
    """Makes `penalty` count bytes: what each survivor takes in a file, by its current neighbours.

    Call it again from time to time, as neighbours change.
    """
    with torch.no_grad():
        for site in learned_sites(model):
            site.threshold.bits = survivor_bits(site.threshold.alive(site.original))


def penalty(model: nn.Module) -> Tensor:
    """Differentiable number of surviving weights, the regulariser; a scalar.

    sum over layers of importance * sum sigma(beta (|measure| - t)), times the group's size where a
    group has many elements. After `weigh_by_bits` each element counts with the bytes it takes. The
    project's own choice (the paper's regulariser is not used).

    Raises:
        Prune2OnnxError: the model has no learned threshold.
    """
    counts = [
        site.threshold.importance * site.threshold.survivors(site.original)
        for site in learned_sites(model)
    ]
    if not counts:
        raise Prune2OnnxError(
            f"{type(model).__name__}: no learned threshold; call prune(model) first"
        )
    return torch.stack(counts).sum()


def add_gradients(loss: Tensor, model: nn.Module, also: Sequence[Tensor] = ()) -> None:
    """Adds the gradients of a loss to those that a model's parameters have.

    As `loss.backward()`, but DistributedDataParallel does not notice. So a penalty may reach
    weights that forward did not use, which that wrapper refuses where it looks for unused
    parameters. Its gradient is the same in all processes, so nothing has to be averaged.

    Args:
        loss: a scalar that depends on parameters alone, not on data.
        model: has the parameters.
        also: tensors besides that get their gradients.
    """
    parameters: list[Tensor] = [one for one in model.parameters() if one.requires_grad]
    parameters += also
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


def thresholds_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters behind the learned thresholds, for an optimizer group of their own."""
    return [site.threshold.rho for site in learned_sites(model)]


def scale_thresholds(model: nn.Module, factor: float) -> None:
    """Multiplies every learned threshold by one factor, in place."""
    with torch.no_grad():
        for site in learned_sites(model):
            site.threshold.rho.copy_(scaled(site.threshold.rho, factor))


def scaled(rho: Tensor, factor: float) -> Tensor:
    """The rho for which softplus(rho) is larger by a factor."""
    t = nn.functional.softplus(rho.double()) * factor
    return t + torch.log(-torch.expm1(-t))  # softplus's inverse, exact for large and small t


def survivors(model: nn.Module) -> Tensor:
    """Number of elements above their thresholds, a scalar on the model's device (no sync)."""
    with torch.no_grad():
        return sum(
            (site.threshold.alive(site.original).sum() for site in learned_sites(model)),
            start=torch.zeros((), dtype=torch.int64),
        )


def density(model: nn.Module) -> Density:
    """Survivors per layer and in total, before or after `bake`.

    Counts the weights that have a learned threshold; in a model without any, the nonzeros of every
    weight that can be pruned. The result lists the other parameters, too.
    """
    model = unwrapped(model)
    with torch.no_grad():
        layers = tuple(
            LayerDensity(
                site.threshold.name,
                int(site.threshold.alive(site.original).sum()),
                site.original.numel(),
                float(site.threshold.threshold().mean()),
            )
            for site in learned_sites(model)
        )
        if not layers:
            weights = {name: places[0].value for name, places in prunable_weights(model).items()}
            layers = tuple(
                LayerDensity(name, int(torch.count_nonzero(weight)), weight.numel(), None)
                for name, weight in weights.items()
            )
    return Density(layers, tuple(other_parameters(model, [layer.name for layer in layers])))


def bake(model: nn.Module) -> dict[str, Tensor]:
    """Turns learned thresholds into exact zeros and leaves plain parameters, in place.

    Survivors take the value of the pruning function, so the model's output in evaluation mode is
    the same before and after. Names, dtype, device and the parameters' identity are kept.

    Returns:
        Weight name -> bool mask of the weight's shape, True where it survived.

    Raises:
        Prune2OnnxError: the model has no learned threshold, or is in a DistributedDataParallel.
    """
    refuse_distributed(model, "baked")
    sites = list(learned_sites(model))
    if not sites:
        raise Prune2OnnxError(
            f"{type(model).__name__}: no learned threshold to bake; call prune(model) first"
        )
    masks: dict[str, Tensor] = {}
    for site in sites:
        with torch.no_grad():
            site.threshold.eval()
            baked = site.threshold(site.original)
            masks[site.threshold.name] = site.threshold.alive(site.original).clone()
            site.original.copy_(baked)
        for module, attribute in site.holders:
            unparametrize_own(module, attribute)
    return masks
