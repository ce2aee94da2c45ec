"""What a network computes per channel: which channels are one, and what each layer costs.

A *class* is all channels that live and die together: those a residual sum adds, one after another
through activations, pooling and padding. A layer multiplies and adds once for each pair of a row
(output channel) and a column (input channel) that are there, at every place and tap; so what it
costs is what it costs whole, times the part of its rows, times the part of its columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from prune2onnx.graphs import without_weights
from prune2onnx.shrink.fate import families
from prune2onnx.shrink.flow import Ids
from prune2onnx.shrink.rules import trace


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
    """

    weight: str
    rows: Ids
    columns: Ids | None
    size: int
    macs: int


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


@dataclass(frozen=True, eq=False)
class Structure:
    """The layers of a network, and its classes of channels.

    Attributes:
        layers: those with a weight of their own, in the order of the graph.
        norms: those that are not folded into a layer.
        fixed: bool [classes], those that must stay: inputs, outputs, and what is not followed.
    """

    layers: tuple[LayerCost, ...]
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


def structure(model: ModelProto) -> Structure:
    """Follows the channels of a model, as `shrink` does; zeros of its weights do not matter.

    Args:
        model: not modified; a dense ONNX graph, external data loaded.

    Raises:
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    flow = trace(model)
    family = families(flow)
    count = int(family.max(initial=-1)) + 1
    fixed = np.zeros(count, bool)
    fixed[family[list(flow.pinned)]] = True
    places = _places(model)
    layers = []
    for layer in flow.layers:
        size = flow.values(layer.weight).size
        columns = None if layer.inputs is None else family[layer.inputs]
        macs = size * places.get(id(layer.node), 1)
        layers.append(LayerCost(layer.weight, family[layer.channels.ids], columns, size, macs))
    norms = tuple(
        Norm(node.input[1], node.input[2], family[flow.channels[node.output[0]].ids])
        for node in model.graph.node
        if node.op_type == "BatchNormalization" and node.output[0] in flow.channels
    )
    return Structure(tuple(layers), norms, fixed)


def multiply_adds(model: ModelProto) -> int:
    """Multiply-adds for one example of the layers that hold weights (Conv, Gemm, MatMul).

    Args:
        model: a dense ONNX graph; its first axis is the batch.
    """
    return structure(model).macs


def _places(model: ModelProto) -> dict[int, int]:
    """How often each element of a weight is multiplied for one example, by the node's identity."""
    single = without_weights(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in single.graph.input[: len(model.graph.input)]:
        dims = value.type.tensor_type.shape.dim
        if dims and value.name not in stored:
            dims[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    return {id(node): _of(node, shapes) for node in model.graph.node}


def _of(node: NodeProto, shapes: dict[str, list[int]]) -> int:
    """A convolution meets its kernel at each pixel it makes, a transposed one at each it reads.

    An extent that is not known counts as 1.
    """
    if node.op_type in ("Gemm", "MatMul"):
        extents = shapes.get(node.output[0], [])[:-1]
    else:
        made = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
        extents = shapes.get(made, [])[2:]
    return math.prod(max(1, extent) for extent in extents)
