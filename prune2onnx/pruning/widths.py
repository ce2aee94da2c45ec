"""Learned thresholds on whole channels, tied wherever the network ties them.

A channel lies in many tensors at once: a row of each layer that makes it, a column of each that
reads it; in a residual network several layers make the same one, for it is added to itself. So
thresholds are put not on weights but on classes of channels (`structure` tells which), and a
class is whole or exactly zero in all its tensors. Branches of residual sums have a threshold of
their own: one that is pruned adds nothing, and all that is computed for it alone goes along.

Kernels compute several channels at a time, and a part of such a block costs as much as all of it.
So where a multiple is asked for, classes of convolutions share a threshold by as many, the weakest
with the weakest, and go together. A layer of no more channels than that loses none: it can only go
with its branch.

    narrow(model, structure, norms, speed=1.0)     # before the optimiser is made
    loss = task_loss(model(x), y) + 2.0 * widths_of(model).penalty()
    widths_of(model).bake()

Network slimming (Liu et al., arXiv 1708.06519) takes the scale of a channel's BatchNorm for its
measure, since that is the deviation of what the channel sends on; so does this room, and the root
mean square of a channel's weights where no BatchNorm follows. The threshold and the pruning
function are those of `learned`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning.functions import FUNCTIONS, differentiable, survivor_gate
from prune2onnx.pruning.granularity import Channel
from prune2onnx.pruning.learned import channel_axis, prunable_weights, scaled
from prune2onnx.structure import Structure


@dataclass(frozen=True, eq=False)
class _Maker:
    """What makes channels: a layer and the BatchNorm behind it.

    Attributes:
        layers: one, or all that share its weight.
        norm: None where none follows.
        axis: of the weight, along which its output channels lie.
        classes: int64 [channels].
    """

    layers: tuple[Any, ...]
    norm: nn.Module | None
    axis: int
    classes: Tensor

    def measure(self) -> Tensor:
        """[channels]: |scale| of the BatchNorm, or root mean square of the channel's weights."""
        if self.norm is not None:
            return _original(self.norm, "weight").abs()
        return Channel(self.axis).measure(_original(self.layers[0], "weight")).flatten()

    def unit(self) -> Tensor:
        """Root mean square of what its channels measure now, > 0; a scalar."""
        return self.measure().square().mean().sqrt().clamp_min(1e-12)

    def convolves(self) -> bool:
        """Whether the layer is a convolution."""
        return _original(self.layers[0], "weight").dim() > 2

    def version(self) -> int:
        """Another number after each change of what is measured."""
        module: Any = self.layers[0] if self.norm is None else self.norm
        return _original(module, "weight")._version

    def gated(self) -> Iterator[tuple[nn.Module, str, int]]:
        """The tensors that send a channel on: module, name, and axis of the channels."""
        if self.norm is not None:
            yield from ((self.norm, "weight", 0), (self.norm, "bias", 0))
            return
        for layer in self.layers:
            yield layer, "weight", self.axis
            if layer.bias is not None:
                yield layer, "bias", 0


def _original(module: nn.Module, name: str) -> Tensor:
    """A parameter as it is trained, under its parametrization if it has one."""
    if parametrize.is_parametrized(module, name):
        chain: Any = module.parametrizations
        original: Tensor = chain[name].original
        return original
    parameter: Tensor = getattr(module, name)
    return parameter


class Widths(nn.Module):
    """The thresholds of all classes of channels and of all branches, and what these cost.

    A class's measure is the root mean square over the layers that make it, each in units of what
    that layer's channels measured when pruning began; a branch's is that of its last layer. What is
    gone stays away; the last channel of a layer stays. The penalty moves thresholds alone, not
    weights. By classes blocks are meant, where classes go by the block (`_blocks`).
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
        makers: Mapping[str, _Maker],
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
        self.makers, self.multiple = tuple(makers.values()), multiple
        self.blocked = [
            i
            for i, one in enumerate(layers)
            if one.weight in makers and makers[one.weight].convolves()
        ]
        self.beta, self.function = beta, FUNCTIONS[function]
        self.names = [layer.weight for layer in layers]
        branches = [branch for branch in structure.branches if branch.last in makers]
        self.ends = [tuple(makers).index(branch.last) for branch in branches]
        self.gates: list[tuple[nn.Module, str]] = []
        self._shared: tuple[tuple[int, ...], Tensor] | None = None
        device = self.makers[0].measure().device
        rho = torch.expm1(torch.tensor(start)).log()  # softplus(rho) = start
        self.rho = nn.Parameter(torch.full((self.count + len(branches),), float(rho)))
        free = torch.zeros(len(branches), dtype=torch.bool)
        rows, columns = _counts(structure, self.count)
        within = torch.zeros(len(layers), len(branches), dtype=torch.bool)
        for index in range(len(layers)):
            within[index] = torch.tensor([index in branch.layers for branch in branches])
        macs = torch.tensor([layer.macs / structure.macs for layer in layers])
        prices = torch.tensor([layer.price for layer in layers])
        sizes = torch.tensor([layer.size / structure.size for layer in layers])
        costs = speed * prices / prices.sum() + (1 - speed) * sizes
        with torch.no_grad():
            units = [maker.unit() for maker in self.makers]
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
            self.register_buffer(name, value, persistent=False)  # made again from the same network
        self.to(device)

    def gate(self, module: nn.Module, name: str, axis: int, maker: _Maker | Tensor) -> None:
        """Lets the channels of a tensor go with their classes, and with the branch they end."""
        if (module, name) in self.gates:  # one that layers share
            return
        classes = maker if isinstance(maker, Tensor) else maker.classes
        branches = [] if isinstance(maker, Tensor) else self.branches_of(maker)
        self.gates.append((module, name))
        gate = _Gate(self, classes.to(self.rho.device), branches, axis)
        parametrize.register_parametrization(module, name, gate)

    def branches_of(self, maker: _Maker) -> list[int]:
        """The branches that end in a layer, by their places in `measure`."""
        return [self.count + n for n, end in enumerate(self.ends) if self.makers[end] is maker]

    def threshold(self) -> Tensor:
        """[classes + branches], each > 0, in the units of `measure`."""
        return nn.functional.softplus(self.rho)

    def measure(self) -> Tensor:
        """[classes + branches], about 1; of a class that nobody makes it is 1."""
        squares, mean = _squares(self.makers, self.units, self.count)
        mean = torch.cat([mean, *(squares[end].mean()[None] for end in self.ends)])
        return mean.clamp_min(1e-24).sqrt()

    def alive(self) -> Tensor:
        """Bool [classes + branches]: those over their thresholds; of each layer one at least."""
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
        """[classes + branches], what each is multiplied with: 0 for what is pruned.

        All gates of one forward pass share it, and its gradient.
        """
        if not torch.is_grad_enabled():
            return self._factor()
        now = (self.training, self.rho._version, *(maker.version() for maker in self.makers))
        if self._shared is None or self._shared[0] != now:
            factor = self._factor()
            # the graph behind it goes with the first backward pass
            factor.register_hook(self._forget)  # type: ignore[no-untyped-call]
            self._shared = now, factor
        return self._shared[1]

    def _forget(self, _: Tensor) -> None:
        self._shared = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to a forward pass, for copies."""
        return {**self.__dict__, "_shared": None}

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

    def _parts(self, gate: Tensor) -> Tensor:
        """[layers], the part of each layer's output channels that is left, 0-1."""
        within = gate[self.count :].expand_as(self.within)
        branch = torch.where(self.within, within, torch.ones_like(within)).prod(1)
        return branch * (self.rows @ gate[: self.count]) / self.rows.sum(1)

    def _left(self, gate: Tensor, costs: Tensor) -> Tensor:
        columns = self.columns @ gate[: self.count] / self.columns.sum(1).clamp_min(1) + self.whole
        return (costs * self._parts(gate) * columns).sum()

    def left(self) -> Tensor:
        """What is left, 0-1, of what is aimed at: the cost, or multiply-adds; without gradient."""
        return self._left(self.alive().float(), self.aims)

    def macs_left(self) -> Tensor:
        """Part of the multiply-adds that is left, 0-1; a scalar, without gradient."""
        return self._left(self.alive().float(), self.macs)

    def penalty(self) -> Tensor:
        """Differentiable part of the cost that is left, 0-1, the regulariser; a scalar."""
        measure = self.measure().detach()
        gate = differentiable(survivor_gate, measure, self.threshold(), self.beta)
        gate = torch.where(self.fixed | self._last(), torch.ones_like(gate), gate * ~self.gone)
        return self._left(gate, self.costs)

    def _last(self) -> Tensor:
        """Bool [classes + branches]: all that a layer has left; to press it is in vain."""
        left = (self.rows > 0) & ~self.gone[: self.count]
        last = torch.zeros_like(self.gone)
        last[: self.count] = left[left.sum(1) == 1].any(0)
        return last

    def densities(self) -> dict[str, float]:
        """Part of each layer's output channels that is left, by the weight's name."""
        parts = self._parts(self.alive().float())
        return dict(zip(self.names, parts.tolist(), strict=True))

    def thresholds(self) -> dict[str, float]:
        """Mean threshold of each layer's output channels, by the weight's name."""
        with torch.no_grad():
            means = self.rows @ self.threshold()[: self.count] / self.rows.sum(1)
        return dict(zip(self.names, means.tolist(), strict=True))

    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by one factor, in place; then each convolution is filled up.

        Blocks of several kinds, or one that is not full, may leave a number of channels that is no
        multiple: then the best of those that are pruned stay, for they cost nothing.
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
            for index in self.blocked:
                rows, alive = self.rows[index], self.alive()
                if float(self._parts(alive.float())[index]) == 0:
                    continue  # of a branch that is gone
                lack = -int((rows * alive[: self.count]).sum()) % self.multiple
                dead = (rows > 0) & ~alive[: self.count]
                if lack and dead.any():  # once more, until it fits or all are there
                    fitting = dead & (rows <= lack)
                    free = fitting if fitting.any() else dead
                    self.revived[margin.masked_fill(~free, -torch.inf).argmax()] = True

    def bake(self) -> list[nn.Parameter]:
        """Leaves plain parameters, with zeros for what is gone; removes itself.

        Returns:
            Scales and biases of branches that are gone. They must stay zero: a bias that is
            trained again would be added to the residual sum, and nothing could leave the graph.
        """
        self.eval()
        silent: list[nn.Parameter] = []
        with torch.no_grad():
            factor = self.factor()
            values = [getattr(module, name).clone() for module, name in self.gates]
            for (module, name), value in zip(self.gates, values, strict=True):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                getattr(module, name).copy_(value)
            for maker in self.makers:  # what BatchNorm has multiplied with zero
                alive = factor[maker.classes.to(factor.device)] != 0
                if any(factor[branch] == 0 for branch in self.branches_of(maker)):
                    alive.zero_()
                    ends = [getattr(module, name) for module, name, _ in maker.gated()]
                    silent += [end for end in ends if end.ndim == 1]
                if maker.norm is not None:
                    for weight in {id(x.weight): x.weight for x in maker.layers}.values():
                        shape = [1] * weight.ndim
                        shape[maker.axis] = -1
                        weight.mul_(alive.view(shape))
        return silent


class _Gate(nn.Module):
    """The parametrization of one tensor: each channel times the factor of its class."""

    classes: Tensor

    def __init__(self, widths: Widths, classes: Tensor, branches: list[int], axis: int) -> None:
        super().__init__()
        self.widths, self.branches, self.axis = widths, branches, axis
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        every = self.widths.factor()
        factor = every[self.classes]
        for branch in self.branches:
            factor = factor * every[branch]
        return x * factor.view(shape).to(x.dtype)


def _counts(structure: Structure, count: int) -> tuple[Tensor, Tensor]:
    """How many of each layer's rows, and of its columns, are of each class: [layers, classes]."""
    rows = torch.zeros(len(structure.layers), count)
    columns = torch.zeros_like(rows)
    for index, layer in enumerate(structure.layers):
        for counts, ids in ((rows, layer.rows), (columns, layer.columns)):
            if ids is not None:
                counts[index].index_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    return rows, columns


def _squares(
    makers: Collection[_Maker], units: Iterable[Tensor], count: int
) -> tuple[list[Tensor], Tensor]:
    """Squares of what channels measure, in their makers' units: of each maker, and class means.

    Returns:
        [channels] for each maker; and [classes], 1 for a class that nobody makes.
    """
    each = [
        (maker.measure().float() / unit).square() for maker, unit in zip(makers, units, strict=True)
    ]
    sums = torch.zeros(count, device=each[0].device)
    times = torch.zeros_like(sums)
    for maker, own in zip(makers, each, strict=True):
        classes = maker.classes.to(own.device)
        sums = sums.index_add(0, classes, own)
        times = times.index_add(0, classes, torch.ones_like(own))
    return each, torch.where(times > 0, sums / times.clamp_min(1), torch.ones_like(sums))


def _blocks(
    structure: Structure, fixed: Tensor, makers: Mapping[str, _Maker], multiple: int
) -> Tensor:
    """Which classes share a threshold: as many as a kernel computes at a time.

    Those of a block are made and read by the same layers. The strongest are in one block and the
    weakest in another; what is left over is a block of its own. Classes that a matrix makes, too,
    and those that stay in any case, are alone.

    Returns:
        int64 [classes], the block of each, from 0 on.
    """
    count = len(fixed)
    single = fixed.clone()
    for layer in structure.layers:
        if layer.weight not in makers or not makers[layer.weight].convolves():
            single[torch.tensor(layer.rows)] = True
    with torch.no_grad():
        units = [maker.unit() for maker in makers.values()]
        strength = _squares(makers.values(), units, count)[1].cpu()
    made_and_read = torch.cat(_counts(structure, count))
    _, kinds = made_and_read.unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]
    block_of = torch.zeros(count, dtype=torch.int64)
    blocks = 0
    for kind in range(int(kinds.max()) + 1):
        members = (kinds == kind).nonzero().flatten()
        members = members[strength[members].argsort(descending=True, stable=True)]
        alone = single[members]
        for chosen, size in ((members[~alone], multiple), (members[alone], 1)):
            block_of[chosen] = blocks + torch.arange(len(chosen)) // size
            blocks += -(-len(chosen) // size)
    return block_of


def widths_of(model: nn.Module) -> Widths | None:
    """The thresholds that `narrow` put on a model's channels."""
    return next((module for module in model.modules() if isinstance(module, Widths)), None)


def narrow(
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
) -> Widths:
    """Puts a learned threshold on each class of a model's channels, in place.

    Args:
        model: plain parameters; their names are those of the structure's weights.
        structure: of the model's graph with BatchNorm folded.
        norms: name of a BatchNorm layer -> name of the layer that it was folded into.
        speed: how much the layers' prices count in the cost, 0-1; the rest is for elements of
            weights.
        chosen: names of the weights that may be pruned; channels of any other weight stay.
        by_macs: whether what is left is told in multiply-adds, not in that cost.
        multiple: of which convolutions shall keep their channels in the end.
        function: a name in `FUNCTIONS`.
        beta: sharpness of the pruning function, per unit of a class's measure, which is about 1.
        start: first threshold, in that unit.

    Returns:
        The thresholds; `widths_of` finds them again, in copies of the model, too.

    Raises:
        Prune2OnnxError: there is no channel that could go.
    """
    holders = prunable_weights(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # a weight that layers share has several names, and the graph may know it by another
    known_as = {id(parameters[name]): name for name in holders}
    behind = {layer: norm for norm, layer in norms.items()}
    fixed = torch.tensor(structure.fixed)
    makers: dict[str, _Maker] = {}
    for layer in structure.layers:
        weight = known_as.get(id(parameters.get(layer.weight)), "")
        modules = holders[weight] if weight in chosen else ()
        axis = channel_axis(modules[0]) if modules else 0
        if not modules or _original(modules[0], "weight").shape[axis] != len(layer.rows):
            for ids in (layer.rows, layer.columns):
                if ids is not None:
                    fixed[torch.tensor(ids)] = True
        elif weight not in makers:
            norm = behind.get(weight.removesuffix(".weight"))
            made_by = None if norm is None else model.get_submodule(norm)
            makers[weight] = _Maker(modules, made_by, axis, torch.tensor(layer.rows))
    alone = []
    for lone in structure.norms:
        path, _, name = lone.scale.rpartition(".")
        if name == "weight" and {lone.scale, lone.bias} <= parameters.keys():
            alone.append((model.get_submodule(path), torch.tensor(lone.channels)))
        else:  # its constant cannot be taken away
            fixed[torch.tensor(lone.channels)] = True
    if fixed.all():
        raise Prune2OnnxError(
            f"{type(model).__name__}: no channel that could go: their layers are excluded, or "
            "what is done with them cannot be followed in the graph; leave out --goal, "
            "--target-macs and --narrow-epochs"
        )
    if multiple > 1:
        block_of = _blocks(structure, fixed, makers, multiple)
        structure = replace(structure, fixed=fixed.numpy()).merged(block_of.numpy())
        fixed = torch.tensor(structure.fixed)
        makers = {n: replace(one, classes=block_of[one.classes]) for n, one in makers.items()}
        alone = [(module, block_of[classes]) for module, classes in alone]
    widths = Widths(
        structure,
        fixed,
        makers,
        speed=speed,
        by_macs=by_macs,
        multiple=multiple,
        function=function,
        beta=beta,
        start=start,
    )
    for maker in widths.makers:
        if fixed[maker.classes].all() and not widths.branches_of(maker):
            continue
        for module, name, axis in maker.gated():
            widths.gate(module, name, axis, maker)
    for module, classes in alone:
        widths.gate(module, "weight", 0, classes)
        widths.gate(module, "bias", 0, classes)
    widths.train(model.training)
    return widths
