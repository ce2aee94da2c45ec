"""Heads and neurons of a network: which elements of which weights belong to each.

A unit is a channel group (`structure`) with its name: what makes it (rows of projections, entries
of biases) and what reads it (columns of the weights that follow). Where all that reads it is zero,
`shrink` removes it without any change of the outputs. Which units go is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import ModelProto

from prune2onnx.shrinking.costs import followed
from prune2onnx.shrinking.flow import Ids

Kind = Literal["head", "neuron", "channel"]


@dataclass(frozen=True, eq=False)
class Part:
    """The elements of a weight that belong to a unit.

    Attributes:
        weight: name of the initializer, also of a bias.
        axis: along which they lie.
        places: their indices on that axis, ascending.
    """

    weight: str
    axis: int
    places: Ids

    def of(self, shape: Iterable[int]) -> tuple[slice | Ids, ...]:
        """The index of these elements in an array of a shape."""
        own = self.axis
        return tuple(self.places if axis == own else slice(None) for axis, _ in enumerate(shape))


@dataclass(frozen=True, eq=False)
class Unit:
    """What stays or goes as a whole: a head of attention, a neuron, a channel.

    Attributes:
        kind: a head (with all heads that share its keys); a neuron, between matrices; a channel,
            if a convolution makes or reads it.
        group: its number in `structure(model)`.
        made: what makes it: rows of query, key and value, or of a layer, and their biases.
        read: what reads it: columns of the output's projection, or of the next layers.
    """

    kind: Kind
    group: int
    made: tuple[Part, ...]
    read: tuple[Part, ...]


def units(model: ModelProto) -> tuple[Unit, ...]:
    """The units of a network that may go, in the order of their layers.

    Left out are those that the graph's inputs or outputs show, that a residual sum or a norm over
    them keeps, or that an operator without a rule reads. Layers that share a bias share its units.

    Args:
        model: not modified; a dense ONNX graph, external data loaded.

    Raises:
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    flow, group_of, fixed = followed(model)
    heads = {int(group) for ids in flow.heads for group in group_of[ids]}
    layers = {layer.weight: layer for layer in flow.layers}
    made: dict[int, list[Part]] = {}
    read: dict[int, list[Part]] = {}
    convolved: set[int] = set()
    for claim in {claim.name: claim for claim in flow.claims}.values():
        layer = layers.get(claim.name)
        for axis, ids in claim.axes.items():
            groups = group_of[ids]
            makes = layer is None or np.array_equal(groups, group_of[layer.channels.ids])
            for group in map(int, np.unique(groups[~fixed[groups]])):
                part = Part(claim.name, axis, np.flatnonzero(groups == group))
                (made if makes else read).setdefault(group, []).append(part)
                if layer is not None and layer.node.op_type.startswith("Conv"):
                    convolved.add(group)
    ordered = dict.fromkeys(int(g) for each in flow.layers for g in group_of[each.channels.ids])
    found = []
    for group in ordered:
        if group in made and group in read:
            kind: Kind = "channel" if group in convolved else "neuron"
            found.append(
                Unit(
                    "head" if group in heads else kind,
                    group,
                    tuple(made[group]),
                    tuple(read[group]),
                )
            )
    return tuple(found)
