"""Takes out of a model what running it does not need; in a small network that is most of the file.

1. Notes: doc strings, metadata, the producer, names of nodes, inferred types of inner values.
2. Attributes that say what holds without them, and weights that nothing uses.
3. Long names of inner values. Weights, inputs and outputs keep theirs: others know them.

The graph computes what it did before; values of weights are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper

from prune2onnx.codecs import DOMAIN
from prune2onnx.graphs import DEFAULT_DOMAINS, Names, bodies, keep, nodes_in, opset, rename, used_in

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
    _unused(result.graph)
    _names(result)
    return result


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
