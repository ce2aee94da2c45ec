"""Names of values in a model: new ones that occur nowhere, renaming, and the shortest for all.

Names of nodes are of no interest here; `strip` removes them.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from prune2onnx.graph.rewritten import Rewritten
from prune2onnx.graph.walk import bodies


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
        """Reserves the first of `stem`, `stem_1`, `stem_2`, ... that is not in the model."""
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(1)))
        name = next(n for n in names if n and n not in self._defined and n not in self._used)
        self._defined[name] = 1
        return name

    def shortest(self) -> str:
        """Reserves the shortest name that occurs nowhere in the model."""
        name = next(n for n in self._short if n not in self._defined and n not in self._used)
        self._defined[name] = 1
        return name


def rename(graph: GraphProto | FunctionProto, renamed: Mapping[str, str]) -> None:
    """Renames values where a graph uses them, at any depth, but not where it defines them."""
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


@dataclass(frozen=True)
class Anonymized(Rewritten):
    """A model whose initializers have the shortest names.

    Attributes:
        new_name: old name -> new name, of initializers that were renamed.
    """

    new_name: Mapping[str, str] = field(default_factory=dict)


def anonymize(model: ModelProto) -> Anonymized:
    """Gives initializers the shortest names.

    Initializers that are inputs or outputs of the graph keep their names. All of them do where the
    model holds training information, which refers to them by name.

    Args:
        model: any; not modified.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    known = {value.name for value in (*graph.input, *graph.output)}
    names = Names(result)
    renamed: dict[str, str] = {}
    for tensor in () if result.training_info else graph.initializer:
        if tensor.name not in known:
            renamed[tensor.name] = tensor.name = names.shortest()
    rename(graph, renamed)
    return Anonymized(result, new_name=renamed)
