"""Leaves out inputs of a graph that its first layers do not use, by a Gather; weights shrink.

The graph still takes its whole input. Callers compare whether the smaller weight pays for the node
and its indices.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper

from prune2onnx.graph.rewritten import Changes
from prune2onnx.graph.tensors import replace
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute
from prune2onnx.shrinking.flow import FLOATS, Flow, numbers


def gather_inputs(model: ModelProto, changes: Changes) -> None:
    """Inserts a Gather before each layer that uses only some of the graph's inputs, in place.

    Layers are Gemm and MatMul, and Conv without groups; the input may be flattened or reshaped
    before.
    """
    flow = Flow(model, may_add=True)
    whole = {value.name for value in model.graph.input}
    places: list[tuple[int, NodeProto]] = []
    for place, node in enumerate(model.graph.node):
        if node.domain not in DEFAULT_DOMAINS or not node.input or node.input[0] not in whole:
            continue
        if node.op_type in ("Flatten", "Identity", "Reshape"):
            whole.update(node.output)
        elif (axes := _axes(flow, node)) is not None:
            gather = _gathered(flow, node, *axes)
            places += [] if gather is None else [(place, gather)]
    for place, gather in reversed(places):
        model.graph.node.insert(place, gather)


def _axes(flow: Flow, node: NodeProto) -> tuple[int, int] | None:
    """Axes of the input and of the weight over which a layer sums; None for any other node."""
    if node.op_type == "Conv" and attribute(node, "group", 1) == 1:
        return 1, 1
    if node.op_type == "Gemm":
        return int(not attribute(node, "transA", 0)), int(bool(attribute(node, "transB", 0)))
    return (-1, 0) if node.op_type == "MatMul" else None


def _gathered(flow: Flow, node: NodeProto, axis: int, side: int) -> NodeProto | None:
    """Cuts the weight; returns the Gather of its inputs, None where all of them are used."""
    name = node.input[1]
    weight = flow.array(name)
    if (
        weight is None
        or flow.uses[name] != 1
        or flow.element_types[name] not in FLOATS
        or weight.ndim < 2
    ):
        return None
    if node.op_type == "MatMul" and weight.ndim != 2:
        return None
    used = (weight != 0).any(axis=tuple(a for a in range(weight.ndim) if a != side))
    if used.all():
        return None
    used[0] |= not used.any()
    replace(flow.stored[name], weight.compress(used, side))
    picked = flow.names.fresh(f"{node.input[0]}_used")
    gather = helper.make_node("Gather", [node.input[0], ""], [picked], axis=axis)
    flow.write(gather, 1, numbers(np.flatnonzero(used)))
    node.input[0] = picked
    return gather
