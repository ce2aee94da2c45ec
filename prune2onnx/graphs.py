"""Walks models: their subgraphs, tensors and names; renames, and copies without the heavy parts.

No more than that. What a tensor declares is `tensors`' business, where weights may stand is
`intake`'s.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
)

from prune2onnx.tensors import declared_nbytes

DEFAULT_DOMAINS = ("", "ai.onnx")
"""Both spellings of the domain of ONNX's own operators."""


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes_in(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes and those of their subgraphs, at any depth."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from nodes_in(body.node)


def in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor of a graph at any depth; of a sparse one both parts."""
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
    """Every tensor of a model: graph, functions and what is kept for training."""
    yield from in_graph(model.graph)
    for function in model.functions:
        yield from in_nodes(function.node)
        for attribute in function.attribute_proto:
            yield from _in_attribute(attribute)
    for training in model.training_info:
        yield from in_graph(training.initialization)
        yield from in_graph(training.algorithm)


def opset(imports: Iterable[Any]) -> int | None:
    """Version of ONNX's own operators among operator set imports; None where there is none."""
    return next((int(e.version) for e in imports if e.domain in DEFAULT_DOMAINS), None)


def is_constant(node: NodeProto) -> bool:
    """Whether it is ONNX's Constant."""
    return bool(node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS and node.output)


class Names:
    """All names of values in a model, to make new ones that occur nowhere in it."""

    def __init__(self, model: ModelProto) -> None:
        self._defined: Counter[str] = Counter()
        self._used: set[str] = set()
        letters = string.ascii_letters + string.digits
        self._short = (
            "".join(parts)
            for length in itertools.count(1)
            for parts in itertools.product(letters, repeat=length)
        )
        self._add_graph(model.graph)
        for function in model.functions:
            self._defined.update(function.input)
            self._used.update(function.output)
            self._add_nodes(function.node)
        for training in model.training_info:
            self._add_graph(training.initialization)
            self._add_graph(training.algorithm)

    def _add_graph(self, graph: GraphProto) -> None:
        stored = {tensor.name for tensor in graph.initializer}
        stored.update(sparse.values.name for sparse in graph.sparse_initializer)
        stored.update(value.name for value in graph.input)
        self._defined.update(stored)
        self._used.update(value.name for value in (*graph.output, *graph.value_info))
        self._add_nodes(graph.node)

    def _add_nodes(self, nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            self._used.update(node.input)
            self._defined.update(node.output)
            for body in bodies(node):
                self._add_graph(body)

    def defined_once(self, name: str) -> bool:
        """Whether one graph, body or function defines it, and no other."""
        return self._defined[name] == 1

    def fresh(self, stem: str) -> str:
        """`stem`, or `stem_1`, `stem_2`, ...: the first that occurs nowhere; now it does."""
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(1)))
        name = next(n for n in names if n and n not in self._defined and n not in self._used)
        self._defined[name] = 1
        return name

    def shortest(self) -> str:
        """The shortest name that occurs nowhere; now it does."""
        name = next(n for n in self._short if n not in self._defined and n not in self._used)
        self._defined[name] = 1
        return name


def used_in(nodes: Iterable[NodeProto]) -> set[str]:
    """Every name that nodes take, at any depth, or that their subgraphs give out."""
    used: set[str] = set()
    for node in nodes_in(nodes):
        used.update(node.input)
        used.update(value.name for body in bodies(node) for value in body.output)
    return used


def keep(repeated: Any, wanted: Callable[[Any], bool]) -> None:
    """Leaves in a repeated field what is wanted."""
    kept = [item for item in repeated if wanted(item)]
    if len(kept) < len(repeated):
        del repeated[:]
        repeated.extend(kept)


def copy_but(target: Any, source: Any, *fields: str) -> None:
    """Copies all set fields of a message into an empty one, but those named."""
    for field, value in source.ListFields():
        if field.name in fields:
            continue
        if hasattr(value, "MergeFrom"):  # a message, or a repeated field of any kind
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)


def rename(graph: GraphProto | FunctionProto, renamed: Mapping[str, str]) -> None:
    """Renames what a graph uses, at any depth; what it defines under the old name is gone."""
    renamed = {old: new for old, new in renamed.items() if old != new}
    if not renamed:
        return
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name in renamed:
            del graph.value_info[index]
    if isinstance(graph, GraphProto):
        for annotation in graph.quantization_annotation:
            annotation.tensor_name = renamed.get(annotation.tensor_name, annotation.tensor_name)
            for entry in annotation.quant_parameter_tensor_names:
                entry.value = renamed.get(entry.value, entry.value)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]
        for configuration in node.device_configurations:
            for spec in configuration.sharding_spec:
                spec.tensor_name = renamed.get(spec.tensor_name, spec.tensor_name)
        for body in bodies(node):
            own = {value.name for value in body.input} | {t.name for t in body.initializer}
            own.update(name for inner in body.node for name in inner.output)
            seen = {old: new for old, new in renamed.items() if old not in own}
            rename(body, seen)
            for value in body.output:
                value.name = seen.get(value.name, value.name)


def without_weights(model: ModelProto, least: int = 2**16) -> ModelProto:
    """A copy whose large initializers and constants are inputs of the graph, for type and shape.

    What checks or infers has to serialize a model; of its weights it looks at no value.

    Args:
        model: the model; of its weights nothing is copied.
        least: bytes of the smallest tensor that is left out.
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
