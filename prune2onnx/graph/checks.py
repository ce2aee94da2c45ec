"""What a model from a file must fulfil before anything else looks at it.

onnx's own checker comes later: it trusts sizes, and inlines functions. What a single tensor
declares is checked in `tensors`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.tensors import check
from prune2onnx.graph.walk import DEFAULT_DOMAINS, bodies, in_model, nodes_in, opset

_MOST_NODES = 10**6  # a transformer of 10^9 weights has some 10^4


def check_parts(model: ModelProto, path: Path) -> None:
    """Checks that there is a graph, that names are text, that tensors have their data.

    Raises:
        Prune2OnnxError: one is missing; the message names the file.
    """
    graph = model.graph
    if not (graph.node or graph.initializer or graph.sparse_initializer):
        raise Prune2OnnxError(f"{path}: no graph in it; not an ONNX model, or cut short")
    if not model.opset_import:
        raise Prune2OnnxError(f"{path}: no operator set is imported; not ONNX, or cut short")
    try:
        _check_names(model)
        _check_unique(model.graph)
        _check_operands(model)
        for tensor in in_model(model):
            check(tensor)
    except Prune2OnnxError as error:
        raise Prune2OnnxError(f"{path}: {error}") from error


def _check_names(model: ModelProto) -> None:
    """Checks that names are text: protobuf returns bytes where they are not UTF-8."""
    nodes = [model.graph.node, *(function.node for function in model.functions)]
    names: set[str | bytes] = {v.name for v in (*model.graph.input, *model.graph.output)}
    names.update(tensor.name for tensor in in_model(model))
    names.update(entry.domain for entry in model.opset_import)
    for function in model.functions:
        names.update((function.domain, function.name, *function.input, *function.output))
    for node in itertools.chain.from_iterable(map(nodes_in, nodes)):
        names.update((node.domain, node.op_type, node.name, *node.input, *node.output))
        names.update(attribute.name for attribute in node.attribute)
    messages: list[ModelProto | TensorProto] = [model, *in_model(model)]
    for message in messages:
        names.add(message.doc_string)
        for entry in message.metadata_props:
            names.update((entry.key, entry.value))
    for name in names:
        if not isinstance(name, str):
            raise Prune2OnnxError(
                f"{name[:40]!r}: a name or a note that is not UTF-8; the file is damaged"
            )


def _check_unique(graph: GraphProto) -> None:
    """Checks that initializers have names of their own; onnxruntime takes one of several."""
    names = Counter(tensor.name for tensor in graph.initializer)
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    for name, count in names.items():
        if count > 1:
            raise Prune2OnnxError(
                f"{name}: {count} initializers have this name; the file is damaged, export it again"
            )
    for node in graph.node:
        for body in bodies(node):
            _check_unique(body)


def _check_operands(model: ModelProto) -> None:
    """Checks that no operand is left out but an optional one; onnxruntime crashes where one is."""
    parts = [(model.graph.node, model.opset_import)]
    parts += [(function.node, function.opset_import) for function in model.functions]
    for nodes, imports in parts:
        version = opset(imports) or 0
        for node in nodes_in(nodes):
            if "" in node.input and node.domain in DEFAULT_DOMAINS:
                _check_left_out(node, version)


def _check_left_out(node: NodeProto, version: int) -> None:
    try:
        formal = onnx.defs.get_schema(node.op_type, version).inputs
    except (onnx.defs.SchemaError, OverflowError, TypeError):
        return  # left to onnx's checker
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    for index, name in enumerate(node.input):
        if not name and formal and formal[min(index, len(formal) - 1)].option != optional:
            raise Prune2OnnxError(
                f"{node.op_type} {', '.join(node.output)!r}: its input {index} is left out, which "
                "it needs; the file is damaged, export it again"
            )


def check_expansion(model: ModelProto, path: Path) -> None:
    """Checks how many nodes a model has once its functions are inlined, which tools do.

    Raises:
        Prune2OnnxError: more than `_MOST_NODES`, or a function calls itself.
    """
    functions = {(each.domain, each.name): each for each in model.functions}
    counts: dict[tuple[str, str], int] = {}

    def count(nodes: Iterable[NodeProto]) -> int:
        called = Counter((node.domain, node.op_type) for node in nodes_in(nodes))
        return sum(times * counts.get(key, 1) for key, times in called.items())

    waiting = [(key, False) for key in functions]
    open_calls: set[tuple[str, str]] = set()
    while waiting:
        key, ready = waiting.pop()
        if ready:
            counts[key] = count(functions[key].node)
            open_calls.discard(key)
        elif key not in counts:
            if key in open_calls:
                raise Prune2OnnxError(f"{path}: function {key[1]!r} calls itself; not valid ONNX")
            open_calls.add(key)
            waiting.append((key, True))
            inner = {(node.domain, node.op_type) for node in nodes_in(functions[key].node)}
            waiting += [(each, False) for each in inner if each in functions]
    total = count(model.graph.node)
    if total > _MOST_NODES:
        raise Prune2OnnxError(
            f"{path}: {total:,} nodes once its functions are inlined, expected at most "
            f"{_MOST_NODES:,}; the file is damaged, or made to do harm"
        )
