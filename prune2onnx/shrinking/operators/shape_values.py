"""Rules for shapes that a graph computes: Shape, and operators that select and join its elements.

Exporters compute the shape for a Reshape or Resize from that of its input. An element that is the
number of channels changes with it when some are removed, unless a node calculates with it. The
Reshape itself: see `regroup`.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from prune2onnx.graph.walk import attribute
from prune2onnx.shrinking.flow import Extent, Flow, Ids, Opaque

MOVES = ("Cast", "Concat", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze")
"""Operators through which elements of a shape are followed."""


def shape(flow: Flow, node: NodeProto) -> None:
    """The extents of a value, with the channels in place of their number."""
    name = node.input[0]
    symbols = flow.shape(name) if name in flow.stored else flow.symbols(name)
    found: list[Extent] = [
        one if isinstance(one, int) else one or f"{name}[{axis}]"
        for axis, one in enumerate(symbols)
    ]
    channels = flow.channels.get(node.input[0])
    if channels is not None:
        found[channels.axis] = channels.ids
    part = slice(attribute(node, "start", 0), attribute(node, "end"))
    flow.extents[node.output[0]] = found[part]


def move(flow: Flow, node: NodeProto) -> None:
    """Moves elements of a shape as one of MOVES does."""
    op, name = node.op_type, node.output[0]
    if op == "Concat":
        flow.extents[name] = [one for part in node.input for one in part_of(flow, part)]
        return
    elements = flow.extents.get(node.input[0])
    if elements is None:
        raise Opaque("by elements of a shape")
    if op == "Gather":
        chosen = flow.array(node.input[1])
        if chosen is None:
            raise Opaque("of elements that are computed")
        flow.extents[name] = [elements[place] for place in chosen.ravel()]
        return
    if op == "Slice":
        starts, ends = (flow.whole_numbers(node, w, i) for w, i in (("starts", 1), ("ends", 2)))
        steps = flow.whole_numbers(node, "steps", 4) or [1]
        if not starts or not ends:
            raise Opaque("in the form of an old opset")
        elements = elements[slice(starts[0], ends[0], steps[0])]
    flow.extents[name] = elements


def part_of(flow: Flow, name: str) -> list[Extent]:
    """The elements of a part of a shape; None for each that is calculated."""
    if (known := flow.elements(name)) is not None:
        return known
    shape = flow.shape(name)
    if len(shape) != 1 or shape[0] is None:
        raise Opaque("with elements that are computed")
    return [None] * shape[0]


def moved(flow: Flow, node: NodeProto) -> bool:
    """Whether a node moves elements of a shape that is followed."""
    return node.op_type in MOVES and any(name in flow.extents for name in node.input)


def follows(flow: Flow, node: NodeProto) -> bool:
    """Whether a node's rule has made its outputs follow the number of channels left."""
    if node.op_type not in ("Expand", "Reshape", "Resize"):
        return any(name in flow.extents for name in node.output)
    return any(name in flow.channels or name in flow.folded for name in node.output)


def counts(one: Extent, ids: Ids) -> bool:
    """Whether an element is the number of these channels."""
    return isinstance(one, np.ndarray) and np.array_equal(one, ids)
