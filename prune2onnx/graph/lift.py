"""Moves weights to the initializers of the main graph, where they can be coded.

Weights are found in three places:

1. Constant nodes of the main graph;
2. bodies of If, Loop and Scan, at any depth: initializers and Constant nodes;
3. bodies of model-local functions, which cannot see the graph: the weight becomes a new last input
   of the function, and every call passes it, through as many functions as it takes.

A weight keeps its name where nothing else in the model has it. Equal weights from 2 and 3 are
stored once. A weight that cannot move stays, with the reason. How weights are coded: `packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.names import Names, rename
from prune2onnx.graph.rewritten import Changes
from prune2onnx.graph.tensors import WEIGHT_NBYTES, fill_dense, fingerprint, is_weight
from prune2onnx.graph.walk import DEFAULT_DOMAINS, bodies, in_graph, is_constant

_SEE_OUTSIDE = ("If", "Loop", "Scan")

# A runtime may have a kernel of its own for a function of these, whose inputs are fixed.
_FOREIGN_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.")

_ATTRIBUTE_NBYTES = 1024  # smaller ones, such as pads, are not weights

_Key = tuple[str, str, str]
_Place = Callable[[TensorProto, bool], str]


def lift(model: ModelProto, changes: Changes) -> None:
    """Moves the weights that can be moved, in place; `changes` takes notes and reasons."""
    _Lift(model, changes).run()


class _Lift:
    """Lifts the weights of one model."""

    def __init__(self, model: ModelProto, changes: Changes) -> None:
        self._model = model
        self._changes = changes
        self._names = Names(model)
        self._lifted: dict[bytes, str] = {}
        self._moved = 0

    def run(self) -> None:
        graph = self._model.graph
        self._count("from Constant nodes to initializers", self._constants)
        self._count("out of subgraphs", lambda: self._bodies(graph.node, self._to_graph))
        self._count("out of functions, which have new inputs for them", self._functions)
        self._attributes(graph.node)

    def _count(self, what: str, step: Callable[[], None]) -> None:
        self._moved, before = 0, len(self._model.graph.initializer)
        step()
        if self._moved:
            stored = len(self._model.graph.initializer) - before
            once = f", {stored} of them different" if stored != self._moved else ""
            plural = "weights" if self._moved > 1 else "weight"
            self._changes.notes.append(f"moved {self._moved} {plural} {what}{once}")

    # --- 1. constants of the main graph ---

    def _constants(self) -> None:
        graph = self._model.graph
        outputs = {value.name for value in graph.output}
        moved = []
        for index, tensor in _constant_weights(graph.node):
            if tensor.name in outputs:
                self._changes.stays(tensor.name, "also an output of the graph")
            else:
                del graph.node[index]
                moved.append(tensor)
        graph.initializer.extend(reversed(moved))
        self._moved = len(moved)

    # --- 2. bodies of control flow ---

    def _bodies(self, nodes: Iterable[NodeProto], place: _Place) -> None:
        for node in nodes:
            for body in bodies(node):
                if node.domain in DEFAULT_DOMAINS and node.op_type in _SEE_OUTSIDE:
                    self._body(body, place)
                    self._bodies(body.node, place)
                else:
                    where = f"{node.domain}.{node.op_type}".lstrip(".")
                    self._stay_inside(
                        body, f"inside a subgraph of {where}, which may not see the main graph"
                    )

    def _body(self, body: GraphProto, place: _Place) -> None:
        """Moves the weights of one body; those of the bodies nested in it are left."""
        inputs = {value.name for value in body.input}
        outputs = {value.name for value in body.output}
        renamed: dict[str, str] = {}
        found: list[tuple[Any, int, TensorProto]] = []
        for index, tensor in enumerate(body.initializer):
            if is_weight(tensor):
                if tensor.name in inputs:
                    self._changes.stays(tensor.name, "also an input of its subgraph")
                else:
                    copy = TensorProto()
                    copy.CopyFrom(tensor)
                    found.append((body.initializer, index, copy))
        constants = [(body.node, index, tensor) for index, tensor in _constant_weights(body.node)]
        found += reversed(constants)
        for _, _, tensor in found:
            name = tensor.name
            renamed[name] = place(tensor, name not in outputs)
            self._moved += 1
        for holder, index, _ in reversed(found):
            del holder[index]
        for index in reversed(range(len(body.value_info))):
            if body.value_info[index].name in renamed:
                del body.value_info[index]
        rename(body, renamed)
        for name, new in renamed.items():
            if name in outputs:  # a body cannot output what it does not compute
                body.node.append(helper.make_node("Identity", [new], [name]))

    def _stay_inside(self, body: GraphProto, why: str) -> None:
        for tensor in in_graph(body):
            if is_weight(tensor):
                self._changes.stays(tensor.name or body.name, why)

    def _to_graph(self, tensor: TensorProto, keeps_name: bool) -> str:
        """Stores a weight in the initializers of the main graph; returns its name there."""
        key = fingerprint(tensor)
        if key not in self._lifted:
            if not (keeps_name and self._names.defined_once(tensor.name)):
                tensor.name = self._names.fresh(tensor.name)
            self._lifted[key] = tensor.name
            self._model.graph.initializer.append(tensor)
        return self._lifted[key]

    # --- 3. functions ---

    def _functions(self) -> None:
        functions = {_key(f.domain, f.name, f.overload): f for f in self._model.functions}
        calls = {
            key: list(dict.fromkeys(_key_of(node) for node in _calls(function.node, functions)))
            for key, function in functions.items()
        }
        formal = {key: len(function.input) for key, function in functions.items()}
        passed: dict[_Key, list[str]] = {}  # function -> the initializers that its calls pass
        fixed, dead = self._fixed(calls)
        for key in _callees_first(calls):
            function = functions[key]
            if key in fixed:
                self._stay_in_function(function, fixed[key])
                continue
            parameters: dict[str, str] = {}  # initializer -> the function's input
            if key in dead:
                self._stay_in_function(function, "in a function that is never called")
            else:
                self._function(function, parameters)
            names = _names_in(function) | set(parameters.values())
            for node in _calls(function.node, passed):
                for name in passed[_key_of(node)]:
                    if name not in parameters:
                        parameters[name] = _fresh(name, names)
                _pass(node, formal, [parameters[name] for name in passed[_key_of(node)]])
            if parameters:
                function.input.extend(parameters.values())
                passed[key] = list(parameters)
        for node in _calls(self._model.graph.node, passed):
            _pass(node, formal, passed[_key_of(node)])

    def _fixed(self, calls: Mapping[_Key, list[_Key]]) -> tuple[dict[_Key, str], set[_Key]]:
        """Functions that can get no new inputs, and why; and those that nothing calls."""
        fixed: dict[_Key, str] = {}
        for key in calls:
            if not key[0] or key[0].startswith(_FOREIGN_DOMAINS):
                fixed[key] = f"in a function of {key[0] or 'ONNX'}, which runtimes know themselves"
            elif key[0] == DOMAIN:
                fixed[key] = "in a decode function"
        for training in self._model.training_info:
            for graph in (training.initialization, training.algorithm):
                for node in _calls(graph.node, calls):
                    fixed[_key_of(node)] = "in a function that is called in training"
        order = _callees_first(calls)
        for at, key in enumerate(order):
            for called in set(calls[key]) - set(order[:at]):
                fixed[called] = "in functions that call each other"
        for key in (queue := list(fixed)):
            for called in calls[key]:
                if called not in fixed:
                    fixed[called] = fixed[key]
                    queue.append(called)
        live = [_key_of(node) for node in _calls(self._model.graph.node, calls)]
        for key in live:
            live += [called for called in calls[key] if called not in live]
        return fixed, set(calls) - set(live)

    def _function(self, function: FunctionProto, parameters: dict[str, str]) -> None:
        """Turns a function's weights into its inputs; those of the functions it calls are left."""
        names = _names_in(function)
        outputs = set(function.output)
        renamed: dict[str, str] = {}

        def place(tensor: TensorProto, keeps_name: bool, own: bool = False) -> str:
            name = tensor.name
            stored = self._to_graph(tensor, keeps_name)
            if stored not in parameters:
                parameters[stored] = name if own and keeps_name else _fresh(name, names)
            return parameters[stored]

        constants = list(_constant_weights(function.node))
        for _, tensor in reversed(constants):
            name = tensor.name
            renamed[name] = place(tensor, name not in outputs, own=True)
            self._moved += 1
        for index, _ in constants:
            del function.node[index]
        rename(function, renamed)
        for name, new in renamed.items():
            if name in outputs:
                function.node.append(helper.make_node("Identity", [new], [name]))
        self._bodies(function.node, place)

    def _stay_in_function(self, function: FunctionProto, why: str) -> None:
        if function.domain == DOMAIN:
            return
        for _, tensor in _constant_weights(function.node):
            self._changes.stays(tensor.name, why)
        for node in function.node:
            for body in bodies(node):
                self._stay_inside(body, why)

    # --- weights that stay in attributes ---

    def _attributes(self, nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            for body in bodies(node):
                self._attributes(body.node)
            if is_constant(node):
                continue
            for attribute in node.attribute:
                if attribute.type in _WEIGHT_TYPES and attribute.ByteSize() >= _ATTRIBUTE_NBYTES:
                    name = node.output[0] if node.output else node.name
                    self._changes.stays(name, f"{attribute.name} is an attribute of {node.op_type}")


_WEIGHT_TYPES = (
    AttributeProto.TENSOR,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
    AttributeProto.SPARSE_TENSOR,
    AttributeProto.TENSORS,
)


def _constant_weights(nodes: Any) -> Iterator[tuple[int, TensorProto]]:
    """Constant nodes that hold a weight, last first: (index, tensor with the output's name)."""
    for index in reversed(range(len(nodes))):
        if is_constant(nodes[index]):
            tensor = _weight_of(nodes[index])
            if tensor is not None:
                yield index, tensor


def _weight_of(node: NodeProto) -> TensorProto | None:
    tensor = TensorProto()
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            continue  # its value is set by each call
        if attribute.name == "value" and is_weight(attribute.t):
            tensor.CopyFrom(attribute.t)
        elif attribute.name == "value_floats" and 4 * len(attribute.floats) >= WEIGHT_NBYTES:
            tensor = numpy_helper.from_array(np.asarray(attribute.floats, np.float32))
        elif attribute.name == "value_ints" and 8 * len(attribute.ints) >= WEIGHT_NBYTES:
            tensor = numpy_helper.from_array(np.asarray(attribute.ints, np.int64))
        elif attribute.name == "sparse_value":
            sparse = attribute.sparse_tensor
            if is_weight(TensorProto(dims=sparse.dims, data_type=sparse.values.data_type)):
                named = type(sparse)()
                named.CopyFrom(sparse)
                named.values.name = node.output[0]  # for errors
                fill_dense(tensor, named)
    if not tensor.data_type:
        return None
    tensor.name = node.output[0]
    if node.doc_string and not tensor.doc_string:
        tensor.doc_string = node.doc_string
    known = {entry.key for entry in tensor.metadata_props}
    tensor.metadata_props.extend(e for e in node.metadata_props if e.key not in known)
    return tensor


def _key(domain: str, name: str, overload: str) -> _Key:
    return ("" if domain in DEFAULT_DOMAINS else domain, name, overload)


def _key_of(node: NodeProto) -> _Key:
    return _key(node.domain, node.op_type, node.overload)


def _calls(nodes: Iterable[NodeProto], functions: Mapping[_Key, Any]) -> list[NodeProto]:
    """The calls of any of these functions, at any depth."""
    found = []
    for node in nodes:
        if _key_of(node) in functions:
            found.append(node)
        for body in bodies(node):
            found += _calls(body.node, functions)
    return found


def _pass(node: NodeProto, formal: Mapping[_Key, int], names: Iterable[str]) -> None:
    node.input.extend([""] * (formal[_key_of(node)] - len(node.input)))
    node.input.extend(names)


def _callees_first(calls: Mapping[_Key, list[_Key]]) -> list[_Key]:
    """Every function after those it calls."""
    order: dict[_Key, None] = {}
    entered: set[_Key] = set()
    for root in calls:
        path = [root]
        while path:
            entered.add(path[-1])
            waiting = [called for called in calls[path[-1]] if called not in entered]
            if waiting:
                path.append(waiting[0])
            else:
                order.setdefault(path.pop())
    return list(order)


def _names_in(function: FunctionProto) -> set[str]:
    taken = {*function.input, *function.output}
    for node in function.node:
        taken.update((*node.input, *node.output))
    graphs = [body for node in function.node for body in bodies(node)]
    for graph in graphs:  # grows
        taken.update(value.name for value in (*graph.input, *graph.output))
        taken.update(tensor.name for tensor in graph.initializer)
        for node in graph.node:
            taken.update((*node.input, *node.output))
            graphs.extend(bodies(node))
    return taken


def _fresh(stem: str, taken: set[str]) -> str:
    name, number = stem, 0
    while not name or name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name
