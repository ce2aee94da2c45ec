"""What a network computes per channel: which channels are one, and what each layer costs.

A *class* is all channels that live and die together: those a residual sum adds, one after another
through activations, pooling and padding. A layer multiplies and adds once for each pair of a row
(output channel) and a column (input channel) that are there, at every place and tap; so what it
costs is what it costs whole, times the part of its rows, times the part of its columns.

Data only. `shrink` reads it off a graph, `pruning` puts thresholds on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

BLOCK = 4
"""Channels of which onnxruntime's blocked convolutions need a multiple.

One that has any other number is computed the slow way, and so are its neighbours: a file with
fewer channels can take twice the time (docs/RESULTS.md).
"""


@dataclass(frozen=True, eq=False)
class LayerCost:
    """What one layer takes, whole.

    Attributes:
        weight: its name.
        rows: [out] the class of each output channel.
        columns: [in] the class of each input channel; None where they are no one's to remove, or
            each row has one of its own.
        size: elements of the weight.
        macs: multiply-adds for one example.
        price: what it takes of an inference, in any unit: milliseconds, or its multiply-adds.
    """

    weight: str
    rows: Ids
    columns: Ids | None
    size: int
    macs: int
    price: float


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNormalization of its own, which makes a constant of a channel of zeros.

    Attributes:
        scale: name of its scale.
        bias: name of its bias.
        channels: [channels] their classes.
    """

    scale: str
    bias: str
    channels: Ids


@dataclass(frozen=True)
class Branch:
    """One side of a residual sum, which may add nothing at all.

    Attributes:
        last: the weight of its last layer.
        layers: places in `Structure.layers` of all that is computed for it alone.
    """

    last: str
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """The layers of a network, and its classes of channels.

    Attributes:
        layers: those with a weight of their own, in the order of the graph.
        branches: those that could go whole.
        norms: those that are not folded into a layer.
        fixed: bool [classes], those that must stay: inputs, outputs, and what is not followed.
    """

    layers: tuple[LayerCost, ...]
    branches: tuple[Branch, ...]
    norms: tuple[Norm, ...]
    fixed: NDArray[np.bool_]

    @property
    def macs(self) -> int:
        """Multiply-adds of all layers for one example."""
        return sum(layer.macs for layer in self.layers)

    @property
    def size(self) -> int:
        """Elements of all weights."""
        return sum(layer.size for layer in self.layers)

    def priced(self, prices: Mapping[str, float]) -> Structure:
        """With other prices, by the weights' names; layers that share a weight share its price."""
        count = Counter(layer.weight for layer in self.layers)
        layers = (
            replace(layer, price=prices[layer.weight] / count[layer.weight])
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def merged(self, group_of: Ids) -> Structure:
        """With classes joined: [classes] the group of each, which stays if any of them must."""
        layers = (
            replace(
                layer,
                rows=group_of[layer.rows],
                columns=None if layer.columns is None else group_of[layer.columns],
            )
            for layer in self.layers
        )
        norms = (replace(norm, channels=group_of[norm.channels]) for norm in self.norms)
        fixed = np.zeros(1 + group_of.max(initial=-1), np.bool_)
        fixed[group_of[self.fixed]] = True
        return replace(self, layers=tuple(layers), norms=tuple(norms), fixed=fixed)
