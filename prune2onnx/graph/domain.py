"""The names that mark a packed file; code that rewrites graphs leaves them alone."""

from __future__ import annotations

from onnx import ModelProto, NodeProto

DOMAIN = "prune2onnx"
"""Operator set of the decode calls and their functions."""

DOMAIN_VERSION = 3
"""Version of that operator set; docs/FORMAT.md describes it."""

OP = "w"
"""The decode call, and its function."""

MARK = "prune2onnx"
"""Metadata entry of a packed file: most tools keep it, even those that undo the packing."""


def decoder(model: ModelProto) -> list[NodeProto]:
    """The nodes of a decoder that is written out, the last one named `w`; none where there is none.

    They stand before all others, and take initializers alone (docs/FORMAT.md).
    """
    if not any(entry.key == MARK for entry in model.metadata_props):
        return []
    stored = {tensor.name for tensor in model.graph.initializer}
    stored -= {value.name for value in model.graph.input}
    nodes = []
    for node in model.graph.node:
        if node.domain or not all(not name or name in stored for name in node.input):
            return []
        nodes.append(node)
        stored.update(node.output)
        if node.name == OP:
            return nodes
    return []
