"""Learned thresholds on whole channels, tied wherever the network ties them.

A channel lies in many tensors at once: a row of each layer that makes it, a column of each that
reads it; in a residual network several layers make the same one, for it is added to itself. So
thresholds are put not on weights but on classes of channels (`structure` tells which), and a
class is whole or exactly zero in all its tensors.

    narrow(model, structure, norms, macs=1.0)      # before the optimiser is made
    loss = task_loss(model(x), y) + 2.0 * widths_of(model).penalty()
    widths_of(model).bake()

Network slimming (Liu et al., arXiv 1708.06519) takes the scale of a channel's BatchNorm for its
measure, since that is the deviation of what the channel sends on; so does this room, and the root
mean square of a channel's weights where no BatchNorm follows. The threshold and the pruning
function are those of `learned`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
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
    """The thresholds of all classes of channels, and what the classes cost.

    A class's measure is the root mean square over the layers that make it, each in units of what
    that layer's channels measured when pruning began. One that is gone stays away; the last one of
    a layer stays. The penalty moves thresholds alone, not weights.
    """

    fixed: Tensor
    gone: Tensor
    row_parts: Tensor
    column_parts: Tensor
    whole: Tensor
    costs: Tensor
    macs: Tensor
    units: Tensor

    def __init__(
        self,
        structure: Structure,
        fixed: Tensor,
        makers: tuple[_Maker, ...],
        *,
        macs: float,
        function: str,
        beta: float,
        start: float,
    ) -> None:
        super().__init__()
        self.makers, self.beta, self.function = makers, beta, FUNCTIONS[function]
        self.gates: list[tuple[nn.Module, str]] = []
        self._shared: tuple[tuple[int, ...], Tensor] | None = None
        count, layers = len(fixed), structure.layers
        self.names = [layer.weight for layer in layers]
        first = makers[0].measure()
        rho = torch.expm1(torch.tensor(start)).log()  # softplus(rho) = start
        self.rho = nn.Parameter(torch.full((count,), float(rho), device=first.device))
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("gone", torch.zeros_like(fixed))
        rows = torch.zeros(len(layers), count)
        columns = torch.zeros(len(layers), count)
        for index, layer in enumerate(layers):
            rows[index].index_add_(0, torch.tensor(layer.rows), torch.ones(len(layer.rows)))
            if layer.columns is not None:
                ones = torch.ones(len(layer.columns))
                columns[index].index_add_(0, torch.tensor(layer.columns), ones)
        multiplied = torch.tensor([layer.macs / structure.macs for layer in layers])
        stored = torch.tensor([layer.size / structure.size for layer in layers])
        with torch.no_grad():
            units = [maker.measure().square().mean().sqrt().clamp_min(1e-12) for maker in makers]
        for name, value in {
            "row_parts": rows / rows.sum(1, keepdim=True),
            "column_parts": columns / columns.sum(1, keepdim=True).clamp_min(1),
            "whole": (columns.sum(1) == 0).float(),
            "macs": multiplied,
            "costs": macs * multiplied + (1 - macs) * stored,
            "units": torch.stack(units),
        }.items():
            self.register_buffer(name, value, persistent=False)  # made again from the same network
        self.to(first.device)

    def gate(self, module: nn.Module, name: str, classes: Tensor, axis: int) -> None:
        """Lets the channels of a tensor go with their classes."""
        if (module, name) not in self.gates:  # it may be there already, as one that layers share
            self.gates.append((module, name))
            gate = _Gate(self, classes.to(self.rho.device), axis)
            parametrize.register_parametrization(module, name, gate)

    def threshold(self) -> Tensor:
        """[classes], each > 0, in the units of `measure`."""
        return nn.functional.softplus(self.rho)

    def measure(self) -> Tensor:
        """[classes], about 1; of a class that nobody makes it is 1."""
        squares = torch.zeros_like(self.rho)
        counts = torch.zeros_like(self.rho)
        for maker, unit in zip(self.makers, self.units, strict=True):
            own = maker.measure().float() / unit
            classes = maker.classes.to(own.device)
            squares = squares.index_add(0, classes, own.square())
            counts = counts.index_add(0, classes, torch.ones_like(own))
        mean = torch.where(counts > 0, squares / counts.clamp_min(1), torch.ones_like(squares))
        return mean.clamp_min(1e-24).sqrt()

    def alive(self) -> Tensor:
        """Bool [classes]: those over their thresholds; at least one of each layer."""
        with torch.no_grad():
            return self._alive(self.measure())

    def _alive(self, measure: Tensor) -> Tensor:
        margin = (measure - self.threshold()).masked_fill(self.gone, -torch.inf)
        alive = (margin > 0) | self.fixed
        own = self.row_parts > 0
        empty = ~(own & alive).any(1)
        best = margin.expand_as(own).masked_fill(~own, -torch.inf).argmax(1)
        return alive.index_fill(0, best[empty], True)

    def factor(self) -> Tensor:
        """[classes], what each class is multiplied with: 0 for one that is pruned.

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
        soft = torch.where(self.fixed, torch.ones_like(measure), pruned / measure)
        with torch.no_grad():
            alive = self._alive(measure)
            if self.training:
                self.gone.logical_or_(~alive)
        hard = torch.where(alive, soft, torch.zeros_like(soft))
        return soft + (hard - soft).detach() if self.training else hard

    def _left(self, gate: Tensor, costs: Tensor) -> Tensor:
        rows, columns = self.row_parts @ gate, self.column_parts @ gate + self.whole
        return (costs * rows * columns).sum()

    def left(self) -> Tensor:
        """Part of the cost that is left, 0-1; a scalar, without gradient."""
        return self._left(self.alive().float(), self.costs)

    def macs_left(self) -> Tensor:
        """Part of the multiply-adds that is left, 0-1; a scalar, without gradient."""
        return self._left(self.alive().float(), self.macs)

    def penalty(self) -> Tensor:
        """Differentiable part of the cost that is left, 0-1, the regulariser; a scalar."""
        measure = self.measure().detach()
        gate = differentiable(survivor_gate, measure, self.threshold(), self.beta)
        gate = torch.where(self.fixed, torch.ones_like(gate), gate * ~self.gone)
        return self._left(gate, self.costs)

    def densities(self) -> dict[str, float]:
        """Part of each layer's output channels that is left, by the weight's name."""
        parts = self.row_parts @ self.alive().float()
        return dict(zip(self.names, parts.tolist(), strict=True))

    def thresholds(self) -> dict[str, float]:
        """Mean threshold of each layer's output channels, by the weight's name."""
        with torch.no_grad():
            means = self.row_parts @ self.threshold()
        return dict(zip(self.names, means.tolist(), strict=True))

    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by one factor, in place."""
        with torch.no_grad():
            self.rho.copy_(scaled(self.rho, factor))

    def bake(self) -> None:
        """Leaves plain parameters, with zeros for the channels that are gone; removes itself."""
        self.eval()
        with torch.no_grad():
            factor = self.factor()
            values = [getattr(module, name).clone() for module, name in self.gates]
            for (module, name), value in zip(self.gates, values, strict=True):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                getattr(module, name).copy_(value)
            for maker in self.makers:  # what BatchNorm has multiplied with zero
                if maker.norm is not None:
                    for weight in {id(x.weight): x.weight for x in maker.layers}.values():
                        shape = [1] * weight.ndim
                        shape[maker.axis] = -1
                        weight.mul_((factor[maker.classes.to(factor.device)] != 0).view(shape))


class _Gate(nn.Module):
    """The parametrization of one tensor: each channel times the factor of its class."""

    classes: Tensor

    def __init__(self, widths: Widths, classes: Tensor, axis: int) -> None:
        super().__init__()
        self.widths, self.axis = widths, axis
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x * self.widths.factor()[self.classes].view(shape).to(x.dtype)


def widths_of(model: nn.Module) -> Widths | None:
    """The thresholds that `narrow` put on a model's channels."""
    return next((module for module in model.modules() if isinstance(module, Widths)), None)


def narrow(
    model: nn.Module,
    structure: Structure,
    norms: Mapping[str, str],
    *,
    macs: float,
    chosen: Collection[str],
    function: str = "threshold-linear",
    beta: float = 10.0,
    start: float = 0.5,
) -> Widths:
    """Puts a learned threshold on each class of a model's channels, in place.

    Args:
        model: plain parameters; their names are those of the structure's weights.
        structure: of the model's graph with BatchNorm folded.
        norms: name of a BatchNorm layer -> name of the layer that it was folded into.
        macs: how much multiply-adds count in the cost, 0-1; the rest is for elements of weights.
        chosen: names of the weights that may be pruned; channels of any other weight stay.
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
    widths = Widths(
        structure,
        fixed,
        tuple(makers.values()),
        macs=macs,
        function=function,
        beta=beta,
        start=start,
    )
    for maker in widths.makers:
        if fixed[maker.classes].all():
            continue
        for module, name, axis in maker.gated():
            widths.gate(module, name, maker.classes, axis)
    for module, classes in alone:
        widths.gate(module, "weight", classes, 0)
        widths.gate(module, "bias", classes, 0)
    widths.train(model.training)
    return widths
