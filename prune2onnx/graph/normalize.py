"""Normalizes any ONNX model: opset 13 or newer, its weights dense initializers of the main graph.

All other modules work on this form. No weight is an input of the graph. In this order:

1. `sort_nodes`: each node stands behind those whose results it reads;
2. `densify`: sparse initializers become dense ones;
3. `drop_inputs`: inputs of the graph that have an initializer go, so that it is constant;
4. `upgrade`: operators of opset 6 to 12 are rewritten for 13;
5. `lift`: weights in Constant nodes, subgraphs and functions move to the main graph;
6. `declare`: the model imports ONNX's own operators, and its IR version allows what it now uses.

The values of weights stay as they are, bit for bit. `runtime.compare` checks in onnxruntime that
the outputs are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.lift import lift
from prune2onnx.graph.order import sort_nodes
from prune2onnx.graph.protobuf import keep
from prune2onnx.graph.rewritten import Changes, Rewritten, rewritten
from prune2onnx.graph.tensors import check_loaded, declared_nbytes, element_type, fill_dense, within
from prune2onnx.graph.upgrade import TARGET, upgrade
from prune2onnx.graph.walk import bodies, in_model, opset

CONSTANT_IR = 4
"""The first IR version in which an initializer need not be an input of the graph."""

OLDEST_IR = 3
"""The first IR version that says which operator sets a model uses."""

_NAMED = 3  # most names in a note


def normalize(model: ModelProto, max_bytes: int | None = None) -> Rewritten:
    """Normalizes any ONNX model (see above).

    `normalize(normalize(m).model).model == normalize(m).model`. Packed models stay packed.

    Args:
        model: not modified; external data must be loaded.
        max_bytes: most bytes that sparse initializers may take when dense; default: no limit but
            2 GB for each.

    Raises:
        Prune2OnnxError: external data are not loaded; the opset is below 6 or an operator has no
            equivalent in opset 13; a sparse tensor is damaged or too large.
    """
    for tensor in in_model(model):
        check_loaded(tensor)
    if model.ir_version < OLDEST_IR:
        raise Prune2OnnxError(
            f"the model has IR version {model.ir_version}, which names no operator set; "
            f"export it with opset {TARGET} or newer"
        )
    dense = partial(densify, max_bytes=max_bytes)
    return rewritten(model, sort_nodes, dense, drop_inputs, upgrade, lift, declare)


def densify(model: ModelProto, changes: Changes, *, max_bytes: int | None) -> None:
    """Makes sparse initializers dense, at any depth; `max_bytes` as in `normalize`."""
    dense = _Dense(max_bytes, changes)
    dense.graph(model.graph)
    for function in model.functions:
        dense.within(function.node)
    if dense.count:
        changes.notes.append(f"made {_counted(dense.count, 'sparse initializer')} dense")


class _Dense:
    """Makes sparse initializers dense, at any depth, and counts them and their bytes."""

    def __init__(self, max_bytes: int | None, changes: Changes) -> None:
        self.count = 0
        self._left = max_bytes
        self._changes = changes

    def graph(self, graph: GraphProto) -> None:
        kept = []
        for sparse in graph.sparse_initializer:
            nbytes = declared_nbytes(
                TensorProto(dims=sparse.dims, data_type=sparse.values.data_type)
            )
            if nbytes is None:
                reason = f"a sparse tensor of {element_type(sparse.values)}"
                self._changes.stays(sparse.values.name, reason)
                kept.append(sparse)
                continue
            if self._left is not None:
                self._left = within(self._left, sparse)
            fill_dense(graph.initializer.add(), sparse)
            self.count += 1
        if len(kept) < len(graph.sparse_initializer):
            del graph.sparse_initializer[:]
            graph.sparse_initializer.extend(kept)
        self.within(graph.node)

    def within(self, nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            for body in bodies(node):
                self.graph(body)


def drop_inputs(model: ModelProto, changes: Changes) -> None:
    """Removes the inputs of the main graph for which there are initializers."""
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    stored.update(sparse.values.name for sparse in graph.sparse_initializer)
    dropped = [value.name for value in graph.input if value.name in stored]
    keep(graph.input, lambda value: value.name not in stored)
    if dropped:
        named = ", ".join(dropped[:_NAMED])
        more = f" and {len(dropped) - _NAMED} more" if len(dropped) > _NAMED else ""
        changes.notes.append(
            f"{_counted(len(dropped), 'initializer')} could be fed as inputs too, now constant: "
            f"{named}{more}"
        )


def declare(model: ModelProto, changes: Changes) -> None:
    """Imports ONNX's own operators, and raises the IR version to one that allows constants."""
    if opset(model.opset_import) is None:
        model.opset_import.add(domain="", version=TARGET)
        changes.notes.append(f"imports opset {TARGET} of ONNX's own operators, for decoding")
    inputs = {value.name for value in model.graph.input}
    constant = any(tensor.name not in inputs for tensor in model.graph.initializer)
    if constant and model.ir_version < CONSTANT_IR:
        changes.notes.append(f"raised the IR version from {model.ir_version} to {CONSTANT_IR}")
        model.ir_version = CONSTANT_IR


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
