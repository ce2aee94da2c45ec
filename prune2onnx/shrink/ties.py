"""Vectors that several nodes share: each its own while channels go, one again where still equal.

Exporters store equal biases once, or hand them on by Identity; without this, layers that have
nothing to do with each other could lose the same channels only. Weights of more axes stay shared:
a copy would cost more than the channels of one reader are worth.
"""

from __future__ import annotations

from onnx import ModelProto

from prune2onnx.graphs import DEFAULT_DOMAINS, Names, keep, rename
from prune2onnx.shrink.flow import FLOATS
from prune2onnx.tensors import fingerprint


def untie(model: ModelProto) -> dict[str, str]:
    """Gives each node a vector of its own, in place, and each the initializer behind an Identity.

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
    """Makes copies one again that are equal, in place."""
    first: dict[tuple[str, bytes], str] = {}
    equal: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.name in copies or tensor.name in copies.values():
            key = copies.get(tensor.name, tensor.name), fingerprint(tensor)
            if first.setdefault(key, tensor.name) != tensor.name:
                equal[tensor.name] = first[key]
    rename(model.graph, equal)
    keep(model.graph.initializer, lambda tensor: tensor.name not in equal)
