"""Walks models: their nodes, subgraphs, tensors and attributes, at any depth.

What a tensor declares: see `tensors`; what values are called: see `names`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
)

from prune2onnx.graph.protobuf import keep

DEFAULT_DOMAINS = ("", "ai.onnx")
"""Both spellings of the domain of ONNX's own operators."""


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes_in(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those of their subgraphs at any depth."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from nodes_in(body.node)


def in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor of a graph at any depth; values and indices of sparse ones."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from in_nodes(graph.node)


def in_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    """Every tensor in the attributes of nodes, at any depth."""
    for node in nodes:
        for attribute in node.attribute:
            yield from _in_attribute(attribute)


def _in_attribute(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("sparse_tensor"):
        yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
    for sparse in attribute.sparse_tensors:
        yield from (sparse.values, sparse.indices)
    if attribute.HasField("g"):
        yield from in_graph(attribute.g)
    for graph in attribute.graphs:
        yield from in_graph(graph)


def in_model(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: of the graph, of functions and of training information."""
    yield from in_graph(model.graph)
    for function in model.functions:
        yield from in_nodes(function.node)
        for attribute in function.attribute_proto:
            yield from _in_attribute(attribute)
    for training in model.training_info:
        yield from in_graph(training.initialization)
        yield from in_graph(training.algorithm)


def opset(imports: Iterable[Any]) -> int | None:
    """Version of ONNX's own operators among operator set imports; None where it is missing."""
    return next((int(e.version) for e in imports if e.domain in DEFAULT_DOMAINS), None)


def is_constant(node: NodeProto) -> bool:
    """Whether a node is a Constant of ONNX's own operators."""
    return bool(node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS and node.output)


def used_in(nodes: Iterable[NodeProto]) -> set[str]:
    """Every name that nodes read, at any depth, or that their subgraphs output."""
    used: set[str] = set()
    for node in nodes_in(nodes):
        used.update(node.input)
        used.update(value.name for body in bodies(node) for value in body.output)
    return used


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, text as str; `default` where it is missing or set by a call."""
    for one in node.attribute:
        if one.name == name and not one.ref_attr_name:
            value = helper.get_attribute_value(one)
            return value.decode() if isinstance(value, bytes) else value
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Sets an attribute; None removes it."""
    keep(node.attribute, lambda one: one.name != name)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))
