"""Removes what running a model does not need; in a small network that is most of the file.

1. Notes: doc strings, metadata, the producer, names of nodes, inferred types of inner values; but
   not those of residuals, without which onnxruntime does not fuse SkipLayerNormalization.
2. Attributes that repeat a default, and weights that nothing uses.
3. Shapes stored for a Reshape that only flattens: it becomes a Flatten.
4. Long names of inner values and of constants of int64, such as shapes and axes, which are also
   stored in fewer bytes. Inputs, outputs and weights keep theirs; `names.anonymize` shortens those
   of weights.

The graph computes what it did before. Values of weights do not matter here; `shrinking` removes
weights that are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from prune2onnx.graph.domain import DOMAIN, OP, decoder
from prune2onnx.graph.names import Names, rename
from prune2onnx.graph.protobuf import keep
from prune2onnx.graph.rewritten import Changes, Rewritten, rewritten
from prune2onnx.graph.shapes import shapes_of
from prune2onnx.graph.walk import DEFAULT_DOMAINS, bodies, nodes_in, opset, used_in

_MOST_CONSTANT_NBYTES = 1 << 16
"""Longest constant that is stored in another way."""

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


def strip(model: ModelProto) -> Rewritten:
    """Removes what running a model does not need (see above).

    Functions are left as they are, and so is the decoder of a packed model.

    Args:
        model: any; not modified.
    """
    return rewritten(
        model, drop_notes, drop_implied, flatten, drop_unused, shorten_constants, shorten_names
    )


def drop_notes(model: ModelProto, changes: Changes) -> None:
    """Removes descriptions of a model and its parts, but not what unpacking needs."""
    for field in _MODEL_NOTES:
        model.ClearField(field)
    keep(model.metadata_props, lambda entry: entry.key.split(".")[0] == DOMAIN)
    residuals = _residuals(model.graph)
    stated = [_stated(value) for value in model.graph.value_info if value.name in residuals]
    last = next((node for node in reversed(_decoder(model)) if not node.domain), None)
    _notes(model.graph)
    model.graph.value_info.extend(stated)
    model.graph.name = "g"
    if last is not None:
        last.name = OP


def _residuals(graph: GraphProto) -> set[str]:
    """What is added before a LayerNormalization.

    onnxruntime fuses the two where it knows that both have equal shapes, which it does not infer
    through shapes that are computed, as torch's exporter has them.
    """
    normalized = {node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    return {
        name
        for node in graph.node
        if node.op_type == "Add" and not normalized.isdisjoint(node.output)
        for name in node.input
    }


def _stated(value: ValueInfoProto) -> ValueInfoProto:
    """Name and shape alone."""
    made = ValueInfoProto(name=value.name)
    made.type.CopyFrom(value.type)
    return made


def _decoder(model: ModelProto) -> list[NodeProto]:
    """The nodes of a packed model's decoder: written out, or calls."""
    return decoder(model) or [node for node in model.graph.node if node.domain == DOMAIN]


def drop_implied(model: ModelProto, changes: Changes) -> None:
    """Removes attributes that repeat a default, or what a runtime infers."""
    version = opset(model.opset_import) or 0
    for node in nodes_in(model.graph.node):
        _attributes(node, version)


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


def flatten(model: ModelProto, changes: Changes) -> None:
    """Turns into a Flatten each Reshape to [-1, n] that joins all axes but the first."""
    shapes = {t.name: t for t in model.graph.initializer if list(t.dims) == [2]}
    found = [
        node
        for node in model.graph.node
        if node.op_type == "Reshape" and node.domain in DEFAULT_DOMAINS and node.input[1] in shapes
    ]
    if not found:
        return
    extents = shapes_of(model)
    for node in found:
        inner = extents.get(node.input[0], [])[1:]
        shape = numpy_helper.to_array(shapes[node.input[1]]).tolist()
        # An unknown extent is 0.
        if shape == [-1, math.prod(inner)] and min(inner, default=0) > 0:
            node.op_type = "Flatten"
            del node.input[1], node.attribute[:]


def drop_unused(model: ModelProto, changes: Changes) -> None:
    """Removes weights that no node reads."""
    graph = model.graph
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


def shorten_constants(model: ModelProto, changes: Changes) -> None:
    """Stores int64 in a byte or two for each entry, where that is shorter than in eight."""
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.INT64 or not tensor.HasField("raw_data"):
            continue
        if len(tensor.raw_data) > _MOST_CONSTANT_NBYTES:
            continue
        values = numpy_helper.to_array(tensor).reshape(-1).tolist()
        short = TensorProto(name=tensor.name, dims=tensor.dims, data_type=TensorProto.INT64)
        short.int64_data.extend(values)
        if short.ByteSize() < tensor.ByteSize():
            tensor.CopyFrom(short)


def shorten_names(model: ModelProto, changes: Changes) -> None:
    """Gives inner values, and constants of int64, the shortest names."""
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    constants = [t for t in graph.initializer if t.data_type == TensorProto.INT64]
    fixed.update(t.name for t in graph.initializer if t.data_type != TensorProto.INT64)
    fixed.update(sparse.values.name for sparse in graph.sparse_initializer)
    fixed.update(note.tensor_name for note in graph.quantization_annotation)
    for node in _decoder(model):
        fixed.update((*node.input, *node.output))
    names = Names(model)
    renamed: dict[str, str] = {}
    short = names.shortest()
    for node in graph.node:
        for index, name in enumerate(node.output):
            if len(name) > len(short) and name not in fixed and names.defined_once(name):
                renamed[name] = node.output[index] = short
                short = names.shortest()
    for tensor in () if model.training_info else constants:
        name = tensor.name
        if len(name) > len(short) and name not in fixed and names.defined_once(name):
            renamed[name] = tensor.name = short
            short = names.shortest()
    stated = [_stated(value) for value in graph.value_info if value.name in renamed]
    rename(graph, renamed)
    for value in stated:
        value.name = renamed[value.name]
    graph.value_info.extend(stated)
