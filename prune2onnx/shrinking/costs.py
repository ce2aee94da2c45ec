"""What the layers of a graph cost, and which channels they have in common: a graph's `Structure`.

The data are declared in `structure`; rules for channels: see `rules`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from prune2onnx.graph.shapes import shapes_of
from prune2onnx.shrinking.branches import branches
from prune2onnx.shrinking.flow import Flow, Ids
from prune2onnx.shrinking.liveness import channel_groups
from prune2onnx.shrinking.rules import trace
from prune2onnx.shrinking.structure import LayerCost, Norm, Structure


def structure(model: ModelProto) -> Structure:
    """Follows the channels of a model, as `shrink` does; values of its weights do not matter.

    Args:
        model: not modified; a dense ONNX graph, external data loaded.

    Raises:
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    flow, group_of, fixed = followed(model)
    layers = []
    for layer, macs in zip(flow.layers, _macs(model, flow), strict=True):
        size = flow.values(layer.weight).size
        columns = None if layer.inputs is None else group_of[layer.inputs]
        rows = group_of[layer.channels.ids]
        layers.append(LayerCost(layer.weight, rows, columns, size, macs, float(macs)))
    norms = tuple(
        Norm(node.input[1], node.input[2], group_of[flow.channels[node.output[0]].ids])
        for node in model.graph.node
        if node.op_type == "BatchNormalization" and node.output[0] in flow.channels
    )
    return Structure(tuple(layers), branches(flow), norms, fixed)


def followed(model: ModelProto) -> tuple[Flow, Ids, NDArray[np.bool_]]:
    """The channels of a model; [channels] the group of each; [groups] whether it must stay."""
    flow = trace(model)
    for made, read, groups in flow.grouped:  # they must keep one size
        for ids in (made.reshape(groups, -1), read.reshape(groups, -1)):
            for part in ids[1:]:
                flow.couple(ids[0], part)
    group_of = channel_groups(flow)
    fixed = np.zeros(int(group_of.max(initial=-1)) + 1, bool)
    fixed[group_of[list(flow.pinned)]] = True
    return flow, group_of, fixed


def multiply_adds(model: ModelProto) -> int:
    """Multiply-adds for one example of the layers that hold weights (Conv, Gemm, MatMul).

    Args:
        model: a dense ONNX graph; its first axis is the batch.
    """
    return sum(_macs(model, trace(model)))


def _macs(model: ModelProto, flow: Flow) -> list[int]:
    """Multiply-adds of each layer for one example."""
    shapes = shapes_of(model, batch=1)
    return [flow.values(x.weight).size * _places(x.node, shapes) for x in flow.layers]


def _places(node: NodeProto, shapes: dict[str, list[int]]) -> int:
    """How often each element of a weight is multiplied for one example.

    A convolution applies its kernel at each output pixel, a transposed one at each input pixel. An
    unknown extent counts as 1.
    """
    if node.op_type in ("Attention", "Gemm", "MatMul"):
        extents = shapes.get(node.output[0], [])[:-1]
    else:
        made = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
        extents = shapes.get(made, [])[2:]
    return math.prod(max(1, extent) for extent in extents)
