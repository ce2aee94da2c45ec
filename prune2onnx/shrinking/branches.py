"""Branches that add nothing: where one operand of a sum is always zero, the sum is the other one.

Of a residual block whose last layer is dead, only the shortcut is left. Such sums are removed, with
all that was computed for them alone. Which channels are zero: see `flow`.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from prune2onnx.graph.names import rename
from prune2onnx.graph.protobuf import keep
from prune2onnx.graph.walk import DEFAULT_DOMAINS, used_in
from prune2onnx.shrinking.flow import Flow
from prune2onnx.shrinking.structure import Branch


def branches(flow: Flow) -> tuple[Branch, ...]:
    """Operands of sums that could be removed, if their last layer had only zeros as its output.

    Where both operands end in a layer, the one with more layers counts.
    """
    found = []
    for node in _sums(flow):
        sides = [_side(flow, node, one, other) for one, other in (node.input, node.input[::-1])]
        longest = max(sides, key=lambda side: 0 if side is None else len(side.layers))
        found += [] if longest is None else [longest]
    return tuple(found)


def _sums(flow: Flow) -> list[NodeProto]:
    """Additions whose result is not an output of the graph."""
    outputs = {value.name for value in flow.model.graph.output}
    return [
        node
        for node in flow.model.graph.node
        if node.op_type == "Add" and node.domain in DEFAULT_DOMAINS
        if node.output[0] not in outputs
    ]


def _side(flow: Flow, node: NodeProto, side: str, other: str) -> Branch | None:
    """The branch that ends in one operand of a sum; None where the sum needs it."""
    last = next((layer for layer in flow.layers if layer.node.output[0] == side), None)
    if last is None or flow.uses[side] != 1 or not flow.alike(other, node.output[0]):
        return None
    alone = {side}  # values that nothing else reads
    for one in reversed(flow.model.graph.node):
        readers = [reader for name in one.output for reader in flow.readers.get(name, ())]
        total = sum(flow.uses[name] for name in one.output)
        if readers and total == len(readers) and all(alone & set(r.output) for r in readers):
            alone.update(one.output)
    layers = [n for n, layer in enumerate(flow.layers) if layer.node.output[0] in alone]
    return Branch(last.weight, tuple(layers))


def bypass(flow: Flow) -> int:
    """Removes sums with zero, and what nothing reads then; changes the flow's model.

    Returns:
        The number of sums removed.
    """
    graph = flow.model.graph
    others = {}
    for node in _sums(flow):
        if (other := _other(flow, node)) is not None:
            others[node.output[0]] = other
    if not others:
        return 0
    keep(graph.node, lambda node: not set(node.output) & others.keys())
    for name, other in others.items():
        while other in others:  # a sum of such a sum
            other = others[other]
        rename(graph, {name: other})
    remove_unread(flow.model)
    return len(others)


def _other(flow: Flow, node: NodeProto) -> str | None:
    """The operand that a sum is equal to, as the other one is zero; None where neither is."""
    for zero, other in (node.input, reversed(node.input)):
        channels = flow.channels.get(zero)
        if channels is None or (channels.constants != 0).any():
            continue
        if flow.alike(other, node.output[0]):
            return other
    return None


def remove_unread(model: ModelProto) -> None:
    """Removes nodes and weights that nothing reads."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    before = -1
    while before != (before := len(graph.node)):
        used = used_in(graph.node) | outputs
        keep(graph.node, lambda node: bool(set(node.output) & used))  # noqa: B023  # read at once
    inputs = {value.name for value in graph.input}
    used = used_in(graph.node) | outputs | inputs
    keep(graph.initializer, lambda tensor: tensor.name in used)
    made = {name for node in graph.node for name in node.output}
    keep(graph.value_info, lambda value: value.name in made)
