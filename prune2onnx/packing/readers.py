"""Who reads which value of a graph, also in the bodies of If, Loop and Scan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from prune2onnx.graph.walk import attribute, is_constant

Path = tuple[tuple[int, str], ...]
"""A body: the place of each node in its graph and the name of its body, from outside inwards."""

Key = tuple[Path, str]
"""A value: where it is defined, and its name there; () is the main graph."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A node that reads a value.

    Attributes:
        node: that reads.
        index: of its input.
        path: where the node stands.
        at: place of the node, or of the one around it, in the main graph.
        number: of the node among all, in the order of the graph.
        known: where each name that the node can see is defined.
    """

    node: NodeProto
    index: int
    path: Path
    at: int
    number: int
    known: Mapping[str, Path]

    def key(self, name: str) -> Key:
        """A value that the node names."""
        return self.known.get(name, ()), name


class Readers:
    """Readers and makers of all values of a model.

    Attributes:
        of: the readers of each value, in the order of the graph.
        makers: the node that makes a value, as the reader of its first input.
        stored: initializers, and values of Constant nodes.
        taken: inputs of the main graph, and outputs of any: whoever reads those is not known.
    """

    def __init__(self, model: ModelProto) -> None:
        self.of: dict[Key, list[Reader]] = defaultdict(list)
        self.makers: dict[Key, Reader] = {}
        self.stored: dict[Key, TensorProto] = {}
        self.taken: set[Key] = {((), value.name) for value in model.graph.input}
        self._count = 0
        self._visit(model.graph, (), 0, {})

    def _visit(self, graph: GraphProto, path: Path, at: int, outside: Mapping[str, Path]) -> None:
        known = dict(outside)
        known.update((value.name, path) for value in graph.input)
        known.update((tensor.name, path) for tensor in graph.initializer)
        self.stored.update({(path, tensor.name): tensor for tensor in graph.initializer})
        for place, node in enumerate(graph.node):
            top = at if path else place
            self._count += 1
            for index, name in enumerate(node.input):
                reader = Reader(node, index, path, top, self._count, known)
                self.of[reader.key(name)].append(reader)
            for one in node.attribute:
                if one.HasField("g"):
                    self._visit(one.g, (*path, (place, one.name)), top, known)
            for name in node.output:
                known[name] = path
                self.makers[path, name] = Reader(node, 0, path, top, self._count, known)
            if is_constant(node) and (value := attribute(node, "value")) is not None:
                self.stored[path, node.output[0]] = value
        self.taken.update((known.get(value.name, path), value.name) for value in graph.output)
