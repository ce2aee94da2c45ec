"""Shapes and element types of a graph's values, inferred without its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from prune2onnx.graph.protobuf import copy_but
from prune2onnx.graph.tensors import declared_nbytes
from prune2onnx.graph.walk import attribute, is_constant


def without_weights(model: ModelProto, least: int = 2**16) -> ModelProto:
    """A copy whose large initializers and constants are inputs of the graph, for type and shape.

    onnx's checker and shape inference serialize a model; what values its weights have is no matter.

    Args:
        model: not modified; its large weights are not copied.
        least: bytes from which on a tensor is left out.
    """
    result = ModelProto()
    copy_but(result, model, "graph")
    graph = result.graph
    graph.SetInParent()
    copy_but(graph, model.graph, "initializer", "node")
    inputs = {value.name for value in graph.input}

    def left_out(tensor: TensorProto, name: str) -> bool:
        if (declared_nbytes(tensor) or 0) < least:
            return False
        if name not in inputs:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        return True

    graph.initializer.extend(t for t in model.graph.initializer if not left_out(t, t.name))
    for node in model.graph.node:
        if is_constant(node):
            values = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
            if values and left_out(values[0], node.output[0]):
                continue
        graph.node.append(node)
    return result


def inferred(model: ModelProto, batch: int | None = None) -> ModelProto:
    """The model `without_weights`, with the shapes of its values as far as they can be inferred.

    Where inference fails, only the shapes that the model declares.

    Args:
        model: not modified.
        batch: extent of the first axis of each input that has no initializer; default: as declared.
    """
    known = without_weights(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in known.graph.input[: len(model.graph.input)]:
        dims = value.type.tensor_type.shape.dim
        if batch is not None and dims and value.name not in stored:
            dims[0].dim_value = batch
    for _ in range(_PASSES):
        try:
            result = onnx.shape_inference.infer_shapes(known, data_prop=True)
        except Exception:  # onnx raises several types, which have no common base
            return known
        if not (found := list(_ranks(result.graph))):
            break
        known.graph.value_info.extend(found)
    return result


_PASSES = 8  # of inference: each may find the ranks that the next one builds on
_SHAPE_INPUT = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}


def _ranks(graph: GraphProto) -> Iterator[ValueInfoProto]:
    """What a computed shape tells, and onnx leaves open: how many axes, and the last extent."""
    known = {value.name: value for value in values_in(graph)}
    shapes = {name: extents_of(value) for name, value in known.items()}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.domain == "com.microsoft" and node.output[0] not in shapes:
            if (made := _of_contrib(node, shapes)) is not None:
                number = known[node.input[0]].type.tensor_type.elem_type
                yield helper.make_tensor_value_info(node.output[0], number, made)
            continue
        at = _SHAPE_INPUT.get(node.op_type)
        if at is None or len(node.input) <= at:
            continue
        if (stated := shapes.get(node.output[0])) is not None:
            solved = (
                _solved(shapes.get(node.input[0]), stated) if node.op_type == "Reshape" else None
            )
            if solved is not None and node.output[0] in known:
                number = known[node.output[0]].type.tensor_type.elem_type
                yield helper.make_tensor_value_info(node.output[0], number, solved)
            continue
        entries = shapes.get(node.input[at])
        if entries is None or len(entries) != 1 or not isinstance(entries[0], int):
            continue
        rank = entries[0]
        if node.op_type == "Expand":
            given = shapes.get(node.input[0])
            if given is None:
                continue
            rank = max(rank, len(given))
        declared = known.get(node.output[0])
        element_type = declared.type.tensor_type.elem_type if declared is not None else 0
        if element_type:  # an entry without one is not valid
            yield helper.make_tensor_value_info(node.output[0], element_type, [None] * rank)


_AS_ITS_INPUT = (
    *("BiasGelu", "FastGelu", "Gelu", "GroupQueryAttention", "QuickGelu", "RotaryEmbedding"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
)


def _of_contrib(
    node: NodeProto, shapes: Mapping[str, tuple[int | str, ...] | None]
) -> tuple[int | str, ...] | None:
    """The shape that an operator of onnxruntime makes, which onnx does not know."""
    first = shapes.get(node.input[0])
    if first is None or node.op_type in _AS_ITS_INPUT:
        return first
    if node.op_type == "MultiHeadAttention" and len(first) == 3 and len(node.input) > 2:
        value = shapes.get(node.input[2])
        return None if value is None or len(value) != 3 else (*first[:2], value[2])
    if node.op_type == "Attention" and len(first) == 3:
        sizes, weight = attribute(node, "qkv_hidden_sizes"), shapes.get(node.input[1])
        if sizes is None and weight is not None and isinstance(weight[-1], int):
            sizes = [weight[-1] // 3] * 3
        return None if sizes is None else (*first[:2], int(sizes[2]))
    return None


def _solved(
    old: tuple[int | str, ...] | None, new: tuple[int | str, ...]
) -> list[int | str] | None:
    """The shape after a Reshape, of which onnx leaves one extent open."""
    if old is None:
        return None
    left, open_ = list(old), []
    for place, extent in enumerate(new):
        if isinstance(extent, str) and extent and extent in left:
            left.remove(extent)
        elif isinstance(extent, str):
            open_.append(place)
    numbers = [extent for extent in left if isinstance(extent, int)]
    rest = math.prod(extent for extent in new if isinstance(extent, int))
    if len(open_) != 1 or len(numbers) < len(left) or not rest or math.prod(numbers) % rest:
        return None
    extent = math.prod(numbers) // rest
    return [extent if place == open_[0] else other for place, other in enumerate(new)]


def values_in(graph: GraphProto) -> Iterator[ValueInfoProto]:
    """The values that a graph declares: inputs, inner values, outputs."""
    yield from graph.input
    yield from graph.value_info
    yield from graph.output


def extents_of(value: ValueInfoProto) -> tuple[int | str, ...] | None:
    """Extents of a value: a number, the name of a dynamic one, or "" for an unknown one.

    None where the number of axes is unknown.
    """
    declared = value.type.tensor_type
    if not declared.HasField("shape"):
        return None
    dims = declared.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)


def shapes_of(model: ModelProto, batch: int | None = None) -> dict[str, list[int]]:
    """Shapes of a graph's values; an unknown extent is 0.

    Args:
        model: not modified.
        batch: examples at a time; default: as the model declares.
    """
    shapes = ((value.name, extents_of(value)) for value in values_in(inferred(model, batch).graph))
    return {
        name: [extent if isinstance(extent, int) else 0 for extent in extents]
        for name, extents in shapes
        if extents is not None
    }
