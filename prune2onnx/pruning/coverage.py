"""What pruning covers: survivors of the weights that are counted, and the parameters that are not.

Only matrices of known layers are pruned (`selection.PRUNABLE`). Weights of normalisation layers,
biases and bare parameters, such as positions, are left alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import type_before_parametrizations

from prune2onnx.errors import PruningWarning
from prune2onnx.pruning.selection import KINDS, prunable_weights

_MUCH = 0.25
"""Fraction of a network's parameters in what cannot be pruned, from which it is said."""

_NAMED = 5  # how many of them a warning names


@dataclass(frozen=True)
class LayerDensity:
    """Survivors of one weight.

    Attributes:
        name: the weight's name in the unpruned state_dict.
        nnz: elements that survive.
        size: elements.
        threshold: the learned threshold, or the mean of one per channel, in units of the group's
            measure; None for a weight without one.
    """

    name: str
    nnz: int
    size: int
    threshold: float | None

    @property
    def density(self) -> float:
        """Survivors over elements, 0-1."""
        return self.nnz / self.size if self.size else 0.0


@dataclass(frozen=True)
class OtherParameter:
    """A parameter that is not among the pruned weights.

    Attributes:
        name: as in `named_parameters`.
        layer: type of the module that holds it, such as "LayerNorm".
        size: elements.
    """

    name: str
    layer: str
    size: int


@dataclass(frozen=True)
class Density:
    """Survivors of the pruned weights, per layer and in total.

    Attributes:
        layers: the weights that are counted.
        others: the parameters that are not: biases, layers that cannot be pruned or are excluded.
    """

    layers: tuple[LayerDensity, ...]
    others: tuple[OtherParameter, ...] = ()

    @property
    def nnz(self) -> int:
        """Surviving elements of the weights in `layers`."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def size(self) -> int:
        """Elements of the weights in `layers`."""
        return sum(layer.size for layer in self.layers)

    @property
    def others_size(self) -> int:
        """Elements of the parameters in `others`."""
        return sum(other.size for other in self.others)

    @property
    def total(self) -> float:
        """Survivors over elements of the weights in `layers`, 0-1; `others` do not count."""
        return self.nnz / self.size if self.size else 0.0

    @property
    def whole(self) -> float:
        """The fraction of all parameters that is left, 0-1: survivors and `others`."""
        every = self.size + self.others_size
        return (self.nnz + self.others_size) / every if every else 0.0


def other_parameters(model: nn.Module, counted: Collection[str]) -> Iterator[OtherParameter]:
    """The parameters of a model, each once, but those behind the counted weights.

    Args:
        model: with or without thresholds, which are not counted either.
        counted: names of weights, as in the state_dict of the plain model.
    """
    seen: set[int] = set()
    for counted_name in counted:
        layer, _, own = counted_name.rpartition(".")
        # weight, weight_orig, weight_g, parametrizations.weight.original, thresholds and scales
        seen |= {
            id(parameter)
            for name, parameter in model.get_submodule(layer).named_parameters()
            if name in (own, f"{own}_orig", f"{own}_g", f"{own}_v")
            or name.startswith(f"parametrizations.{own}.")
        }
    for path, module in model.named_modules():
        if type(module).__module__.startswith("prune2onnx."):
            continue  # thresholds and scales
        holder = model.get_submodule(path.partition("parametrizations")[0].rstrip("."))
        kind = type_before_parametrizations(holder).__name__
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in seen and not isinstance(parameter, UninitializedParameter):
                seen.add(id(parameter))
                yield OtherParameter(name, kind, parameter.numel())


def warn_of_others(model: nn.Module) -> None:
    """Warns if a large part of a model is in matrices that cannot be pruned."""
    parameters = dict(model.named_parameters())
    others = other_parameters(model, prunable_weights(model))
    _warn(
        model,
        [other for other in others if parameters[other.name].dim() > 1],
        f"are left alone, as only weights of {KINDS} are pruned",
    )


def warn_of_whole_layers(
    model: nn.Module, chosen: Collection[str], reached: Collection[str]
) -> None:
    """Warns if a large part of a model is in weights none of whose channels can be pruned.

    Args:
        model: with plain parameters.
        chosen: names of the weights that may be pruned.
        reached: names of those that have rows or columns of channels that may go.
    """
    _warn(
        model,
        [
            OtherParameter(name, type(places[0].module).__name__, places[0].value.numel())
            for name, places in prunable_weights(model).items()
            if name in chosen and name not in reached
        ],
        "keep all their channels, heads and units: inputs, outputs or residual sums need them, or "
        "their operators are not followed",
    )


def _warn(model: nn.Module, left: list[OtherParameter], what: str) -> None:
    """Warns if those that are left have many of a model's parameters."""
    every = sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter))
    total = sum(one.size for one in left)
    if not every or total < _MUCH * every:
        return
    left.sort(key=lambda one: -one.size)
    named = [f"{one.name} ({one.layer}, {one.size:,})" for one in left[:_NAMED]]
    if len(left) > _NAMED:
        named.append(f"and {len(left) - _NAMED} more")
    warnings.warn(
        f"{type(model).__name__}: {total:,} of {every:,} parameters {what}: {', '.join(named)}",
        PruningWarning,
        stacklevel=4,
    )
