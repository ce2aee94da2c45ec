"""Unties vectors that several nodes share while channels are removed, and ties those still equal.

Exporters store equal biases once, or pass them on by Identity; without this, independent layers
could lose only the same channels. Weights of more axes stay shared: a copy would cost more than the
channels of one reader save.
"""

from __future__ import annotations

from onnx import ModelProto

from prune2onnx.graph.names import Names, rename
from prune2onnx.graph.protobuf import keep
from prune2onnx.graph.tensors import fingerprint
from prune2onnx.graph.walk import DEFAULT_DOMAINS
from prune2onnx.shrinking.flow import FLOATS


def untie(model: ModelProto) -> dict[str, str]:
    """Gives each node a vector of its own, in place; an Identity of an initializer is removed.

    Returns:
        Copy -> initializer.
    """
    graph = model.graph
    given = {value.name for value in (*graph.input, *graph.output)}
    stored = {t.name: t for t in graph.initializer if t.name not in given}
    vectors = {name for name, t in stored.items() if t.data_type in FLOATS and len(t.dims) == 1}
    passed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Identity" and node.domain in DEFAULT_DOMAINS
        if node.input[0] in stored and node.output[0] not in given
    }
    rename(graph, passed)
    keep(graph.node, lambda node: not passed.keys() & set(node.output))
    names = Names(model)
    copies: dict[str, str] = {}
    read: set[str] = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in read:
                copy = graph.initializer.add()
                copy.CopyFrom(stored[name])
                copy.name = node.input[index] = names.fresh(name)
                copies[copy.name] = name
            elif name in vectors:
                read.add(name)
    return copies


def tie(model: ModelProto, copies: dict[str, str]) -> None:
    """Stores copies once that are still equal, in place."""
    first: dict[tuple[str, bytes], str] = {}
    equal: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.name in copies or tensor.name in copies.values():
            key = copies.get(tensor.name, tensor.name), fingerprint(tensor)
            if first.setdefault(key, tensor.name) != tensor.name:
                equal[tensor.name] = first[key]
    rename(model.graph, equal)
    keep(model.graph.initializer, lambda tensor: tensor.name not in equal)
