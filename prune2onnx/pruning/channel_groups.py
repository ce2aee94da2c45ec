"""Channel groups, which are pruned together: the layers that produce them, and their measures.

Kernels compute several channels at a time, so groups of convolutions are merged into blocks. The
thresholds on groups, or blocks, are in `channels`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune2onnx.pruning.granularity import Channel
from prune2onnx.shrinking.structure import Structure


@dataclass(frozen=True, eq=False)
class Producer:
    """What produces channels: a layer and the BatchNorm behind it.

    Attributes:
        layers: one, or all that share its weight.
        norm: None where none follows.
        axis: of the weight, along which its output channels lie.
        groups: int64 [channels], the group of each.
        weight: attribute of the layers; of attention the one of its query, key and value.
        bias: attribute of the layers with the bias of these channels, which may be None.
    """

    layers: tuple[Any, ...]
    norm: nn.Module | None
    axis: int
    groups: Tensor
    weight: str = "weight"
    bias: str = "bias"

    def measure(self) -> Tensor:
        """[channels]: |scale| of the BatchNorm, or root mean square of the channel's weights."""
        if self.norm is not None:
            return original(self.norm, "weight").abs()
        return Channel(self.axis).measure(original(self.layers[0], self.weight)).flatten()

    def unit(self) -> Tensor:
        """Root mean square of its channels' current measures, > 0; a scalar."""
        return self.measure().square().mean().sqrt().clamp_min(1e-12)

    def convolves(self) -> bool:
        """Whether the layer is a convolution."""
        return original(self.layers[0], self.weight).dim() > 2

    def version(self) -> int:
        """A number that changes with every change of what is measured."""
        if self.norm is None:
            return original(self.layers[0], self.weight)._version
        return original(self.norm, "weight")._version

    def gated(self) -> Iterator[tuple[nn.Module, str, int]]:
        """The tensors that a channel's factor multiplies: module, name, axis of the channels."""
        if self.norm is not None:
            yield from ((self.norm, "weight", 0), (self.norm, "bias", 0))
            return
        for layer in self.layers:
            yield layer, self.weight, self.axis
            if getattr(layer, self.bias) is not None:
                yield layer, self.bias, 0


def original(module: nn.Module, name: str) -> Tensor:
    """A parameter as it is trained, under its parametrization if it has one."""
    if parametrize.is_parametrized(module, name):
        chain: Any = module.parametrizations
        original: Tensor = chain[name].original
        return original
    parameter: Tensor = getattr(module, name)
    return parameter


def counts_of(structure: Structure, count: int) -> tuple[Tensor, Tensor]:
    """How many of each layer's rows, and of its columns, are in each group: [layers, groups]."""
    rows = torch.zeros(len(structure.layers), count)
    columns = torch.zeros_like(rows)
    for index, layer in enumerate(structure.layers):
        for counts, ids in ((rows, layer.rows), (columns, layer.columns)):
            if ids is not None:
                counts[index].index_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    return rows, columns


def squares_of(
    producers: Collection[Producer], units: Iterable[Tensor], count: int
) -> tuple[list[Tensor], Tensor]:
    """Squared measures of channels, in their producers' units, and the means over each group.

    Returns:
        [channels] for each producer; and [groups], 1 for a group without a producer.
    """
    each = [
        (producer.measure().float() / unit).square()
        for producer, unit in zip(producers, units, strict=True)
    ]
    sums = torch.zeros(count, device=each[0].device)
    times = torch.zeros_like(sums)
    for producer, own in zip(producers, each, strict=True):
        groups = producer.groups.to(own.device)
        sums = sums.index_add(0, groups, own)
        times = times.index_add(0, groups, torch.ones_like(own))
    return each, torch.where(times > 0, sums / times.clamp_min(1), torch.ones_like(sums))


def blocks_of(
    structure: Structure, fixed: Tensor, producers: Mapping[str, Producer], multiple: int
) -> Tensor:
    """Merges groups into blocks, which share a threshold: as many as a kernel computes at a time.

    All groups of a block are produced and read by the same layers. They are sorted by measure, so
    the strongest are in one block and the weakest in another; the remainder is a block of its own.
    Groups that a matrix multiplication produces, too, and those that must stay, are not merged.

    Returns:
        int64 [groups], the block of each, from 0.
    """
    count = len(fixed)
    single = fixed.clone()
    for layer in structure.layers:
        if layer.weight not in producers or not producers[layer.weight].convolves():
            single[torch.tensor(layer.rows)] = True
    with torch.no_grad():
        units = [producer.unit() for producer in producers.values()]
        strength = squares_of(producers.values(), units, count)[1].cpu()
    by_layer = torch.cat(counts_of(structure, count))
    _, alike = by_layer.unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]
    block_of = torch.zeros(count, dtype=torch.int64)
    blocks = 0
    for number in range(int(alike.max()) + 1):
        members = (alike == number).nonzero().flatten()
        members = members[strength[members].argsort(descending=True, stable=True)]
        alone = single[members]
        for chosen, size in ((members[~alone], multiple), (members[alone], 1)):
            block_of[chosen] = blocks + torch.arange(len(chosen)) // size
            blocks += -(-len(chosen) // size)
    return block_of
