"""The order of nodes: each behind those whose results it reads, as ONNX demands.

onnxruntime sorts what it opens, so files with another order run, and rewrites would misread them.
"""

from __future__ import annotations

import heapq
from typing import Any

from onnx import ModelProto, NodeProto

from prune2onnx.graph.rewritten import Changes
from prune2onnx.graph.walk import bodies, used_in


def sort_nodes(model: ModelProto, changes: Changes) -> None:
    """Sorts the nodes of the graph, its bodies and the functions, where their order is wrong.

    Nodes that depend on each other in a circle stay as they are: nothing can run them.
    """
    moved = _sort(model.graph.node)
    for function in model.functions:
        moved |= _sort(function.node)
    if moved:
        changes.notes.append("sorted its nodes: some stood before those whose results they read")


def _sort(nodes: Any) -> bool:
    """Sorts a repeated field of nodes, and those of their bodies; returns whether any moved."""
    moved = False
    for node in nodes:
        for body in bodies(node):
            moved |= _sort(body.node)
    order = _order(nodes)
    if order == list(range(len(nodes))):
        return moved
    kept = [NodeProto() for _ in order]
    for copy, index in zip(kept, order, strict=True):
        copy.CopyFrom(nodes[index])
    del nodes[:]
    nodes.extend(kept)
    return True


def _order(nodes: Any) -> list[int]:
    """Indices of nodes in an order that fits; as they stand where that fits, or none does."""
    made = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    readers: dict[int, list[int]] = {}
    waits = [0] * len(nodes)
    for index, node in enumerate(nodes):
        sources = {made[name] for name in used_in([node]) if name in made} - {index}
        waits[index] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(index)
    ready = [index for index, count in enumerate(waits) if not count]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers.get(index, ()):
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, reader)
    return order if len(order) == len(nodes) else list(range(len(nodes)))
