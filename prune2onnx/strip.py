"""Takes out of a model what running it does not need; in a small network that is most of the file.

1. Notes: doc strings, metadata, the producer, names of nodes, inferred types of inner values.
2. Attributes that say what holds without them, and weights that nothing uses.
3. Shapes that are stored to flatten a value: Flatten needs none.
4. Long names of inner values. Inputs and outputs keep theirs, for others know them; so do weights,
   unless `anonymous` is asked for.

The graph computes what it did before; values of weights are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from prune2onnx.codecs import DOMAIN
from prune2onnx.graphs import (
    DEFAULT_DOMAINS,
    Names,
    bodies,
    keep,
    nodes_in,
    opset,
    rename,
    used_in,
    without_weights,
)

_MODEL_NOTES = ("producer_name", "producer_version", "doc_string", "domain", "model_version")


def _ones(attribute: AttributeProto) -> bool:
    return set(attribute.ints) <= {1}


def _zeros(attribute: AttributeProto) -> bool:
    return set(attribute.ints) <= {0}


_IMPLIED: dict[str, dict[str, Callable[[AttributeProto], bool]]] = {
    # The specification says "if not present, ... along each spatial axis", or "inferred from W".
    "Conv": {
        "dilations": _ones,
        "strides": _ones,
        "pads": _zeros,
        "kernel_shape": lambda attribute: True,
    },
    "ConvTranspose": {"dilations": _ones, "strides": _ones, "kernel_shape": lambda attribute: True},
    "MaxPool": {"dilations": _ones, "strides": _ones, "pads": _zeros},
    "AveragePool": {"dilations": _ones, "strides": _ones, "pads": _zeros},
}


def strip(model: ModelProto) -> ModelProto:
    """A copy without what running it does not need.

    Functions are left as they are, and so is the decode call of a packed model.

    Args:
        model: any; not modified.
    """
    result = ModelProto()
    result.CopyFrom(model)
    for field in _MODEL_NOTES:
        result.ClearField(field)
    # Ours say that a file is packed, and what unpacking restores.
    keep(result.metadata_props, lambda entry: entry.key.split(".")[0] == DOMAIN)
    _notes(result.graph)
    result.graph.name = "g"
    version = opset(result.opset_import) or 0
    for node in nodes_in(result.graph.node):
        _attributes(node, version)
    _flatten(result)
    _unused(result.graph)
    _names(result)
    return result


def anonymous(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """A copy with the shortest names for its initializers, and old name -> new name.

    Those that callers know, as inputs or outputs of the graph, keep their names; all do where
    something is stored for training, which calls them by name.

    Args:
        model: any; not modified.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    known = {value.name for value in (*graph.input, *graph.output)}
    names = Names(result)
    renamed: dict[str, str] = {}
    for tensor in () if result.training_info else graph.initializer:
        if tensor.name not in known:
            renamed[tensor.name] = tensor.name = names.shortest()
    rename(graph, renamed)
    return result, renamed


def _notes(graph: GraphProto) -> None:
    for field in ("metadata_props", "value_info", "doc_string"):
        graph.ClearField(field)
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("name")
        for body in bodies(node):
            _notes(body)


def _flatten(model: ModelProto) -> None:
    """Reshapes to [-1, n] that only join all axes but the first become Flatten."""
    shapes = {t.name: t for t in model.graph.initializer if list(t.dims) == [2]}
    found = [
        node
        for node in model.graph.node
        if node.op_type == "Reshape" and node.domain in DEFAULT_DOMAINS and node.input[1] in shapes
    ]
    if not found:
        return
    known = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    extents = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*known.value_info, *known.input)
        if value.type.tensor_type.HasField("shape")
    }
    for node in found:
        inner = extents.get(node.input[0], [])[1:]
        shape = numpy_helper.to_array(shapes[node.input[1]]).tolist()
        # An extent that is not known is 0.
        if shape == [-1, math.prod(inner)] and min(inner, default=0) > 0:
            node.op_type = "Flatten"
            del node.input[1], node.attribute[:]


def _unused(graph: GraphProto) -> None:
    used = used_in(graph.node)
    used.update(value.name for value in (*graph.input, *graph.output))
    for note in graph.quantization_annotation:
        used.update(entry.value for entry in note.quant_parameter_tensor_names)
    keep(graph.initializer, lambda tensor: tensor.name in used)


def _attributes(node: NodeProto, version: int) -> None:
    if node.domain not in DEFAULT_DOMAINS:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return
    implied = _IMPLIED.get(node.op_type, {})
    # With auto_pad a kernel shape or stride is read, not inferred.
    padded = any(a.name == "auto_pad" and a.s not in (b"NOTSET", b"") for a in node.attribute)

    def needed(attribute: AttributeProto) -> bool:
        known = schema.attributes.get(attribute.name)
        if known and not attribute.ref_attr_name and _is(known.default_value, attribute):
            return False
        return padded or attribute.name not in implied or not implied[attribute.name](attribute)

    keep(node.attribute, needed)


def _is(default: AttributeProto, attribute: AttributeProto) -> bool:
    if not default.type or default.type != attribute.type:
        return False
    one: Any = helper.get_attribute_value(default)
    other: Any = helper.get_attribute_value(attribute)
    return bool(one == other)


def _names(model: ModelProto) -> None:
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    fixed.update(tensor.name for tensor in graph.initializer)
    fixed.update(sparse.values.name for sparse in graph.sparse_initializer)
    fixed.update(note.tensor_name for note in graph.quantization_annotation)
    names = Names(model)
    renamed: dict[str, str] = {}
    short = names.shortest()
    for node in graph.node:
        if node.domain == DOMAIN:
            continue
        for index, name in enumerate(node.output):
            if len(name) > len(short) and name not in fixed and names.defined_once(name):
                renamed[name] = node.output[index] = short
                short = names.shortest()
    rename(graph, renamed)
