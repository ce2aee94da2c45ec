"""What the layers of a graph cost, and which channels they share: `Structure`, from what flows."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from prune2onnx.graphs import without_weights
from prune2onnx.shrink.branches import branches
from prune2onnx.shrink.fate import families
from prune2onnx.shrink.flow import Flow
from prune2onnx.shrink.rules import trace
from prune2onnx.structure import LayerCost, Norm, Structure


def structure(model: ModelProto) -> Structure:
    """Follows the channels of a model, as `shrink` does; zeros of its weights do not matter.

    Args:
        model: not modified; a dense ONNX graph, external data loaded.

    Raises:
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    flow = trace(model)
    for made, read, groups in flow.grouped:  # they must stay of one size
        for ids in (made.reshape(groups, -1), read.reshape(groups, -1)):
            for part in ids[1:]:
                flow.unite(ids[0], part)
    family = families(flow)
    count = int(family.max(initial=-1)) + 1
    fixed = np.zeros(count, bool)
    fixed[family[list(flow.pinned)]] = True
    layers = []
    for layer, macs in zip(flow.layers, _macs(model, flow), strict=True):
        size = flow.values(layer.weight).size
        columns = None if layer.inputs is None else family[layer.inputs]
        rows = family[layer.channels.ids]
        layers.append(LayerCost(layer.weight, rows, columns, size, macs, float(macs)))
    norms = tuple(
        Norm(node.input[1], node.input[2], family[flow.channels[node.output[0]].ids])
        for node in model.graph.node
        if node.op_type == "BatchNormalization" and node.output[0] in flow.channels
    )
    return Structure(tuple(layers), branches(flow), norms, fixed)


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


def shapes_of(model: ModelProto, batch: int) -> dict[str, list[int]]:
    """Shapes of a graph's values for so many examples; an extent that is not known is 0."""
    known = without_weights(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in known.graph.input[: len(model.graph.input)]:
        dims = value.type.tensor_type.shape.dim
        if dims and value.name not in stored:
            dims[0].dim_value = batch
    graph = onnx.shape_inference.infer_shapes(known, data_prop=True).graph
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def _places(node: NodeProto, shapes: dict[str, list[int]]) -> int:
    """How often each element of a weight is multiplied for one example.

    A convolution meets its kernel at each pixel it makes, a transposed one at each it reads. An
    extent that is not known counts as 1.
    """
    if node.op_type in ("Gemm", "MatMul"):
        extents = shapes.get(node.output[0], [])[:-1]
    else:
        made = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
        extents = shapes.get(made, [])[2:]
    return math.prod(max(1, extent) for extent in extents)
