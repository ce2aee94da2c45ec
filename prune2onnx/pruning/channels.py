"""Learned thresholds on channel groups: pruning of channels, neurons and attention heads.

A channel lies in many tensors at once: it is a row of each layer that produces it and a column of
each that reads it, and layers whose outputs are added produce the same ones. So thresholds are put
not on weights but on channel groups (see `shrinking.structure`), and a group is whole or exactly
zero in all its tensors. Branches of residual sums have thresholds of their own: a pruned branch
adds nothing, and all that is computed for it alone is removed with it.

A head of attention is a group, too: its rows of query, key and value, and its columns of the
projection that follows; heads that share keys are one.

Kernels compute blocks of several channels, and part of a block costs as much as all of it. With a
`multiple`, that many groups of convolutions share a threshold, the weakest with the weakest, and
are pruned together. A layer with no more channels than that can only be removed with its branch.

    prune_channels(model, structure, norms, speed=1.0)     # before the optimizer is made
    loss = task_loss(model(x), y) + 2.0 * channel_thresholds_of(model).penalty()
    channel_thresholds_of(model).bake()

Network slimming (Liu et al., arXiv 1708.06519) measures a channel by the scale of its BatchNorm,
the standard deviation of the channel's output; so does this module, and by the root mean square of
its weights where no BatchNorm follows. Thresholds on single weights are in `weights`, the pruning
functions in `functions`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning.channel_groups import Producer, blocks_of, counts_of, original, squares_of
from prune2onnx.pruning.computed import parametrize_own, remedy, unparametrize_own
from prune2onnx.pruning.coverage import warn_of_whole_layers
from prune2onnx.pruning.functions import FUNCTIONS, differentiable, survivor_gate
from prune2onnx.pruning.learned import Learned
from prune2onnx.pruning.selection import Place, prunable_weights
from prune2onnx.pruning.weights import scaled
from prune2onnx.shrinking.structure import Structure


class ChannelThresholds(Learned):
    """The thresholds of all channel groups and of all branches, and what these cost.

    The measure of a group is the root mean square over the layers that produce it, each in units of
    the layer's root mean square when pruning began; that of a branch is its last layer's. Pruned
    groups do not come back, and every layer keeps one. The penalty moves thresholds only, not
    weights. With a `multiple`, blocks of groups (`blocks_of`) take the place of groups.
    """

    fixed: Tensor
    gone: Tensor
    revived: Tensor
    rows: Tensor
    columns: Tensor
    whole: Tensor
    within: Tensor
    costs: Tensor
    aims: Tensor
    macs: Tensor
    units: Tensor

    def __init__(
        self,
        structure: Structure,
        fixed: Tensor,
        producers: Mapping[str, Producer],
        *,
        speed: float,
        by_macs: bool,
        multiple: int,
        function: str,
        beta: float,
        start: float,
    ) -> None:
        super().__init__()
        layers, self.count = structure.layers, len(fixed)
        self.producers, self.multiple = tuple(producers.values()), multiple
        self.convolutions = [
            i
            for i, one in enumerate(layers)
            if one.weight in producers and producers[one.weight].convolves()
        ]
        self.beta, self.function = beta, FUNCTIONS[function]
        self.names = [layer.weight for layer in layers]
        branches = [branch for branch in structure.branches if branch.last in producers]
        self.ends = [tuple(producers).index(branch.last) for branch in branches]
        self.gates: list[tuple[nn.Module, str]] = []
        self._cached: tuple[tuple[int, ...], Tensor] | None = None
        device = self.producers[0].measure().device
        rho = torch.expm1(torch.tensor(start)).log()  # softplus(rho) = start
        self.rho = nn.Parameter(torch.full((self.count + len(branches),), float(rho)))
        free = torch.zeros(len(branches), dtype=torch.bool)
        rows, columns = counts_of(structure, self.count)
        within = torch.zeros(len(layers), len(branches), dtype=torch.bool)
        for index in range(len(layers)):
            within[index] = torch.tensor([index in branch.layers for branch in branches])
        macs = torch.tensor([layer.macs / structure.macs for layer in layers])
        prices = torch.tensor([layer.price for layer in layers])
        sizes = torch.tensor([layer.size / structure.size for layer in layers])
        costs = speed * prices / prices.sum() + (1 - speed) * sizes
        with torch.no_grad():
            units = [producer.unit() for producer in self.producers]
        self.register_buffer("gone", torch.zeros_like(self.rho, dtype=torch.bool))
        self.register_buffer("revived", torch.zeros_like(self.rho, dtype=torch.bool))
        for name, value in {
            "fixed": torch.cat([fixed, free]),
            "rows": rows,
            "columns": columns,
            "whole": (columns.sum(1) == 0).float(),
            "within": within,
            "costs": costs,
            "aims": macs if by_macs else costs,
            "macs": macs,
            "units": torch.stack(units),
        }.items():
            self.register_buffer(name, value, persistent=False)  # follows from the network
        self.to(device)

    def gate(self, module: nn.Module, name: str, axis: int, producer: Producer | Tensor) -> None:
        """Multiplies a tensor's channels with the factors of their groups and of their branch.

        Args:
            module: that holds the tensor.
            name: of the tensor in the module.
            axis: of its channels.
            producer: of its channels; or, of a lone BatchNorm, [channels] their groups.
        """
        if (module, name) in self.gates:  # a tensor that layers share
            return
        groups = producer if isinstance(producer, Tensor) else producer.groups
        branches = [] if isinstance(producer, Tensor) else self.branches_of(producer)
        self.gates.append((module, name))
        gate = _Gate(self, groups.to(self.rho.device), branches, axis)
        parametrize_own(module, name, gate)

    def branches_of(self, producer: Producer) -> list[int]:
        """The branches that end in a layer, as indices of `measure`."""
        return [
            self.count + n for n, end in enumerate(self.ends) if self.producers[end] is producer
        ]

    def threshold(self) -> Tensor:
        """[groups + branches], each > 0, in the units of `measure`."""
        return nn.functional.softplus(self.rho)

    def measure(self) -> Tensor:
        """[groups + branches], about 1; exactly 1 for a group without a producer."""
        squares, mean = squares_of(self.producers, self.units, self.count)
        mean = torch.cat([mean, *(squares[end].mean()[None] for end in self.ends)])
        return mean.clamp_min(1e-24).sqrt()

    def alive(self) -> Tensor:
        """Bool [groups + branches]: those above their thresholds, at least one of each layer."""
        with torch.no_grad():
            return self._alive(self.measure())

    def _alive(self, measure: Tensor) -> Tensor:
        margin = (measure - self.threshold()).masked_fill(self.gone, -torch.inf)
        alive = (margin > 0) | self.fixed | self.revived
        own = self.rows > 0
        empty = ~(own & alive[: self.count]).any(1)
        best = margin[: self.count].expand_as(own).masked_fill(~own, -torch.inf).argmax(1)
        return alive.index_fill(0, best[empty], True)

    def factor(self) -> Tensor:
        """[groups + branches], what each is multiplied with: 0 for what is pruned.

        Computed once for all gates of a forward pass, with its gradient.
        """
        if not torch.is_grad_enabled():
            return self._factor()
        now = (self.training, self.rho._version, *(one.version() for one in self.producers))
        if self._cached is None or self._cached[0] != now:
            factor = self._factor()
            # the first backward pass frees the autograd graph behind it
            factor.register_hook(self._clear_cache)  # type: ignore[no-untyped-call]
            self._cached = now, factor
        return self._cached[1]

    def _clear_cache(self, _: Tensor) -> None:
        self._cached = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: all but what belongs to a forward pass."""
        return {**self.__dict__, "_cached": None}

    def _factor(self) -> Tensor:
        measure = self.measure()
        pruned = differentiable(self.function, measure, self.threshold(), self.beta)
        soft = torch.where(self.fixed | self.revived, torch.ones_like(measure), pruned / measure)
        with torch.no_grad():
            alive = self._alive(measure)
            if self.training:
                self.gone.logical_or_(~alive)
        hard = torch.where(alive, soft, torch.zeros_like(soft))
        return soft + (hard - soft).detach() if self.training else hard

    def _rows_left(self, gate: Tensor) -> Tensor:
        """[layers], the fraction of each layer's output channels that is left, 0-1."""
        within = gate[self.count :].expand_as(self.within)
        branch = torch.where(self.within, within, torch.ones_like(within)).prod(1)
        return branch * (self.rows @ gate[: self.count]) / self.rows.sum(1)

    def _left(self, gate: Tensor, costs: Tensor) -> Tensor:
        columns = self.columns @ gate[: self.count] / self.columns.sum(1).clamp_min(1) + self.whole
        return (costs * self._rows_left(gate) * columns).sum()

    def left(self) -> Tensor:
        """Fraction of the cost, or of multiply-adds (`by_macs`), that is left, 0-1; no gradient."""
        return self._left(self.alive().float(), self.aims)

    def macs_left(self) -> Tensor:
        """Fraction of the multiply-adds that is left, 0-1; a scalar, without gradient."""
        return self._left(self.alive().float(), self.macs)

    def penalty(self) -> Tensor:
        """Differentiable fraction of the cost that is left, 0-1, the regulariser; a scalar."""
        measure = self.measure().detach()
        gate = differentiable(survivor_gate, measure, self.threshold(), self.beta)
        gate = torch.where(self.fixed | self._last(), torch.ones_like(gate), gate * ~self.gone)
        return self._left(gate, self.costs)

    def _last(self) -> Tensor:
        """Bool [groups + branches]: groups that are all a layer has left; they cannot be pruned."""
        left = (self.rows > 0) & ~self.gone[: self.count]
        last = torch.zeros_like(self.gone)
        last[: self.count] = left[left.sum(1) == 1].any(0)
        return last

    def densities(self) -> dict[str, float]:
        """Fraction of each layer's output channels that is left, by the weight's name."""
        fractions = self._rows_left(self.alive().float())
        return dict(zip(self.names, fractions.tolist(), strict=True))

    def thresholds(self) -> dict[str, float]:
        """Mean threshold of each layer's output channels, by the weight's name."""
        with torch.no_grad():
            means = self.rows @ self.threshold()[: self.count] / self.rows.sum(1)
        return dict(zip(self.names, means.tolist(), strict=True))

    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by one factor, in place; then fills up each convolution.

        Where blocks are of different sizes, the number of channels left may not be a multiple. Then
        the strongest of those that were pruned are revived, as they cost nothing.
        """
        with torch.no_grad():
            self.rho.copy_(scaled(self.rho, factor))
            self.revived.zero_()
            if self.multiple > 1:
                self._fill()

    def _fill(self) -> None:
        margin = (self.measure() - self.threshold())[: self.count]
        before = -1
        while before != (before := int(self.revived.sum())):
            for index in self.convolutions:
                rows, alive = self.rows[index], self.alive()
                if float(self._rows_left(alive.float())[index]) == 0:
                    continue  # in a pruned branch
                lack = -int((rows * alive[: self.count]).sum()) % self.multiple
                dead = (rows > 0) & ~alive[: self.count]
                if lack and dead.any():  # again, until it fits or all are alive
                    fitting = dead & (rows <= lack)
                    free = fitting if fitting.any() else dead
                    self.revived[margin.masked_fill(~free, -torch.inf).argmax()] = True

    def bake(self) -> list[nn.Parameter]:
        """Leaves plain parameters, with zeros for what is pruned, and removes itself.

        Returns:
            Scales and biases of pruned branches, to be frozen at zero: a bias that is trained again
            would be added to the residual sum, so the branch could not be removed.
        """
        self.eval()
        frozen: list[nn.Parameter] = []
        with torch.no_grad():
            factor = self.factor()
            values = [getattr(module, name).clone() for module, name in self.gates]
            for (module, name), value in zip(self.gates, values, strict=True):
                unparametrize_own(module, name)
                getattr(module, name).copy_(value)
            for producer in self.producers:  # weights whose output BatchNorm multiplies with zero
                alive = factor[producer.groups.to(factor.device)] != 0
                if any(factor[branch] == 0 for branch in self.branches_of(producer)):
                    alive.zero_()
                    ends = [getattr(module, name) for module, name, _ in producer.gated()]
                    frozen += [end for end in ends if end.ndim == 1]
                if producer.norm is not None:  # after convolutions and linear layers alone
                    for weight in {id(x.weight): x.weight for x in producer.layers}.values():
                        shape = [1] * weight.ndim
                        shape[producer.axis] = -1
                        weight.mul_(alive.view(shape))
        return frozen


class _Gate(nn.Module):
    """The parametrization of one tensor: each channel times the factor of its group."""

    groups: Tensor

    def __init__(
        self, thresholds: ChannelThresholds, groups: Tensor, branches: list[int], axis: int
    ) -> None:
        super().__init__()
        self.thresholds, self.branches, self.axis = thresholds, branches, axis
        self.register_buffer("groups", groups, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        every = self.thresholds.factor()
        factor = every[self.groups]
        for branch in self.branches:
            factor = factor * every[branch]
        return x * factor.view(shape).to(x.dtype)


_BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias"}
"""Weight -> bias, where all of a layer's output channels are those of both."""


def _bias_of(place: Place) -> str | None:
    """The attribute with the bias of a weight's channels; None where it is not theirs alone."""
    bias = _BIASES.get(place.attribute)
    return bias if bias is not None and hasattr(place.module, bias) else None


def channel_thresholds_of(model: nn.Module) -> ChannelThresholds | None:
    """The thresholds that `prune_channels` put on a model's channels."""
    return next(
        (module for module in model.modules() if isinstance(module, ChannelThresholds)), None
    )


def prune_channels(
    model: nn.Module,
    structure: Structure,
    norms: Mapping[str, str],
    *,
    speed: float,
    chosen: Collection[str],
    by_macs: bool = False,
    multiple: int = 1,
    function: str = "threshold-linear",
    beta: float = 10.0,
    start: float = 0.5,
) -> ChannelThresholds:
    """Puts a learned threshold on each of a model's channel groups, in place.

    Args:
        model: with plain parameters, under the names of the structure's weights.
        structure: of the model's graph with BatchNorm folded.
        norms: name of a BatchNorm layer -> name of the layer that it was folded into.
        speed: fraction of the cost that is the layers' prices, 0-1; the rest is elements of
            weights.
        chosen: names of the weights that may be pruned; channels of any other weight stay.
        by_macs: whether `left` is a fraction of the multiply-adds, not of that cost.
        multiple: convolutions keep a number of channels that is a multiple of this.
        function: a name in `FUNCTIONS`.
        beta: sharpness of the pruning function, per unit of a group's measure, which is about 1.
        start: first threshold, in that unit.

    Returns:
        The thresholds; `channel_thresholds_of` finds them again, in copies of the model, too.

    Raises:
        Prune2OnnxError: no channel can be pruned.

    Warns:
        PruningWarning: a large part of the model is in weights that keep all their channels.
    """
    holders = prunable_weights(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # a weight that layers share has several names, and the graph may use another one
    known_as = {id(parameters[name]): name for name in holders if name in parameters}
    behind = {layer: norm for norm, layer in norms.items()}
    fixed = torch.tensor(structure.fixed)
    producers: dict[str, Producer] = {}
    for layer in structure.layers:
        weight = known_as.get(id(parameters.get(layer.weight)), "")
        places = holders[weight] if weight in chosen else ()
        modules = tuple(place.module for place in places if _bias_of(place))
        axis, attribute = (places[0].axis, places[0].attribute) if modules else (0, "weight")
        bias = _BIASES[attribute]
        norm_name = behind.get(weight.removesuffix(".weight"))
        norm = None if norm_name is None else model.get_submodule(norm_name)
        gated = [(module, name) for module in modules for name in (attribute, bias)]
        if norm is not None:
            gated += [(norm, "weight"), (norm, "bias")]
        if any(remedy(module, name) for module, name in gated):
            modules = ()  # its tensors are computed: a factor on them would not last
        if not modules or original(modules[0], attribute).shape[axis] != len(layer.rows):
            for ids in (layer.rows, layer.columns):
                if ids is not None:
                    fixed[torch.tensor(ids)] = True
        elif weight not in producers:
            groups = torch.tensor(layer.rows)
            producers[weight] = Producer(modules, norm, axis, groups, attribute, bias)
    alone = []
    for lone in structure.norms:
        path, _, name = lone.scale.rpartition(".")
        if name == "weight" and {lone.scale, lone.bias} <= parameters.keys():
            alone.append((model.get_submodule(path), torch.tensor(lone.channels)))
        else:  # its constant cannot be removed
            fixed[torch.tensor(lone.channels)] = True
    if fixed.all():
        raise Prune2OnnxError(
            f"{type(model).__name__}: no channel can be pruned, expected at least one: layers "
            "are excluded, or the graph does something with their channels that is not supported; "
            "leave out --goal, --target-macs and --channels-epochs"
        )
    free = ~fixed.numpy()
    warn_of_whole_layers(
        model,
        chosen,
        {
            known_as.get(id(parameters.get(layer.weight)), "")
            for layer in structure.layers
            if any(ids is not None and free[ids].any() for ids in (layer.rows, layer.columns))
        },
    )
    if multiple > 1:
        block_of = blocks_of(structure, fixed, producers, multiple)
        structure = replace(structure, fixed=fixed.numpy()).merged(block_of.numpy())
        fixed = torch.tensor(structure.fixed)
        producers = {n: replace(one, groups=block_of[one.groups]) for n, one in producers.items()}
        alone = [(module, block_of[groups]) for module, groups in alone]
    thresholds = ChannelThresholds(
        structure,
        fixed,
        producers,
        speed=speed,
        by_macs=by_macs,
        multiple=multiple,
        function=function,
        beta=beta,
        start=start,
    )
    for producer in thresholds.producers:
        if fixed[producer.groups].all() and not thresholds.branches_of(producer):
            continue
        for module, name, axis in producer.gated():
            thresholds.gate(module, name, axis, producer)
    for module, groups in alone:
        thresholds.gate(module, "weight", 0, groups)
        thresholds.gate(module, "bias", 0, groups)
    thresholds.train(model.training)
    return thresholds
