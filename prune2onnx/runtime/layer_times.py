"""How long each layer takes by itself, in the installed onnxruntime: the cost of its channels.

Multiply-adds do not determine time: at equal multiply-adds, a layer with many pixels and few
channels is slower than one with few pixels and many channels, and int8 speeds them up differently.
So every layer is put into a model of its own, and its kernel is timed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.file import save
from prune2onnx.graph.shapes import shapes_of
from prune2onnx.runtime.benchmark import operators
from prune2onnx.runtime.int8 import LAYERS, quantize_int8

_AROUND = ("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput")
"""Kernels around a layer in a model of its own that its neighbours would make unnecessary."""


def layer_times(model: ModelProto, *, batch: int = 1, int8: bool = False) -> dict[str, float]:
    """Times the layers of a graph, one by one.

    Args:
        model: a dense float32 graph; not modified.
        batch: examples per inference.
        int8: whether the layers compute in int8.

    Returns:
        Weight -> milliseconds of its layer, or of all layers that read it.

    Raises:
        Prune2OnnxError: a layer's shape is not known, or onnxruntime cannot run it by itself.
    """
    shapes = shapes_of(model, batch)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    known: dict[bytes, float] = {}
    times: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type not in LAYERS or node.input[1] not in stored:
            continue
        weight = node.input[1]
        shape = shapes.get(node.input[0], [])
        if not shape or 0 in shape:
            raise Prune2OnnxError(
                f"{weight}: the shape of its layer's input is not known, so it cannot be timed; "
                "count multiply-adds instead, with --channels-price macs"
            )
        alone = _alone(model, node, shape, stored)
        key = _key(node, shape, [list(t.dims) for t in alone.graph.initializer])
        if key not in known:
            known[key] = _time(alone, shape, int8)
        times[weight] = times.get(weight, 0.0) + known[key]
    return times


def _alone(
    model: ModelProto, node: NodeProto, shape: list[int], stored: dict[str, TensorProto]
) -> ModelProto:
    """A model of one layer."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    layer = NodeProto()
    layer.CopyFrom(node)
    layer.input[0], layer.output[0] = "x", "y"
    weights = [stored[name] for name in node.input[1:] if name]
    graph = helper.make_graph([layer], "layer", [value], [made], weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _key(node: NodeProto, shape: list[int], weights: list[list[int]]) -> bytes:
    """Equal for layers that take the same time."""
    attributes = sorted(one.SerializeToString() for one in node.attribute)
    return repr((node.op_type, shape, weights, attributes)).encode()


def _time(alone: ModelProto, shape: list[int], int8: bool) -> float:
    given = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    if int8:
        x = np.random.default_rng(0).random(shape, np.float32)
        alone = quantize_int8(alone, [{"x": x}]).model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        save(alone, path)
        kernels = operators(path, given, batch=shape[0])
    return max(sum(one.ms for one in kernels if one.name not in _AROUND), 1e-4)
