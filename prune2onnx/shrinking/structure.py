"""What a network computes per channel: its channel groups, and what each layer costs.

A *channel group* is all channels that can only be removed together: those that a residual sum adds,
and those that activations, pooling and padding pass on. A layer multiplies and adds once for each
pair of a row (output channel) and a column (input channel), at every position and tap; so it costs
what the whole layer does, times the fraction of rows left, times the fraction of columns left.

Data only: `costs` reads it off a graph, `pruning.channels` puts thresholds on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

BLOCK = 4
"""onnxruntime's blocked convolutions need a multiple of this many channels.

A convolution with another number is computed in a slower way, and so are its neighbours: a file
with fewer channels can take twice the time (docs/RESULTS.md).
"""


@dataclass(frozen=True, eq=False)
class LayerCost:
    """What one layer costs with all its channels.

    Attributes:
        weight: its name.
        rows: [out] the group of each output channel.
        columns: [in] the group of each input channel; None where they cannot be removed, or where
            each row reads another one.
        size: elements of the weight.
        macs: multiply-adds for one example.
        price: what it adds to the cost of an inference: milliseconds, or its multiply-adds.
    """

    weight: str
    rows: Ids
    columns: Ids | None
    size: int
    macs: int
    price: float


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNormalization that is not folded: it turns a channel of zeros into a constant.

    Attributes:
        scale: name of its scale.
        bias: name of its bias.
        channels: [channels] their groups.
    """

    scale: str
    bias: str
    channels: Ids


@dataclass(frozen=True)
class Branch:
    """One operand of a residual sum, which may become zero as a whole.

    Attributes:
        last: the weight of its last layer.
        layers: indices in `Structure.layers` of the layers that are computed for it alone.
    """

    last: str
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """The layers of a network, and its channel groups.

    Attributes:
        layers: those that hold weights, in the order of the graph.
        branches: those that could be removed whole.
        norms: those that are not folded into a layer.
        fixed: bool [groups], those that must stay: inputs, outputs, and what is not followed.
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
        """With other prices, by weight name; layers that share a weight share its price."""
        count = Counter(layer.weight for layer in self.layers)
        layers = (
            replace(layer, price=prices[layer.weight] / count[layer.weight])
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def merged(self, merged_to: Ids) -> Structure:
        """With groups merged: [groups] the new group of each, which stays if any of them must."""
        layers = (
            replace(
                layer,
                rows=merged_to[layer.rows],
                columns=None if layer.columns is None else merged_to[layer.columns],
            )
            for layer in self.layers
        )
        norms = (replace(norm, channels=merged_to[norm.channels]) for norm in self.norms)
        fixed = np.zeros(1 + merged_to.max(initial=-1), np.bool_)
        fixed[merged_to[self.fixed]] = True
        return replace(self, layers=tuple(layers), norms=tuple(norms), fixed=fixed)
