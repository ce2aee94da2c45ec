"""Brings any ONNX model to the form that `pack` works on: opset 13 or newer, weights plain.

Plain weights are initializers of the main graph, dense, and no inputs of it. In this order:

1. sparse initializers become dense ones;
2. inputs of the graph that have an initializer go, so that the initializer is a constant;
3. operators of opset 6 to 12 are rewritten for 13 (`opset`);
4. weights in Constant nodes, subgraphs and functions move to the main graph (`hoist`);
5. the model imports ONNX's own operators, and its IR version knows what it now uses.

The values of weights stay as they are, bit for bit. Whether the outputs are equal is for
onnxruntime to say: see `validate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graphs import Names, bodies, in_model, opset
from prune2onnx.hoist import Hoist
from prune2onnx.opset import TARGET, upgrade
from prune2onnx.tensors import check_loaded, declared_nbytes, densified, kind

CONSTANT_IR = 4
"""The first IR version in which an initializer need not be an input of the graph."""

OLDEST_IR = 3
"""The first IR version that says which operator sets a model uses."""

_NAMED = 3  # names in a note


@dataclass(frozen=True)
class Intake:
    """A model that `pack` can work on.

    Attributes:
        model: a new model; equal to the one given where that was plain.
        notes: what was changed, in words; () where nothing was.
        reasons: weights that had to stay where they cannot be packed: name -> why.
    """

    model: ModelProto
    notes: tuple[str, ...]
    reasons: Mapping[str, str]


def plain(model: ModelProto, max_bytes: int | None = None) -> Intake:
    """Brings any ONNX model to the form that `pack` works on.

    `plain(plain(m).model).model == plain(m).model`. Packed models stay packed.

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
    result = ModelProto()
    result.CopyFrom(model)
    notes: list[str] = []
    reasons: dict[str, str] = {}
    dense = _Dense(max_bytes, reasons)
    dense.graph(result.graph)
    for function in result.functions:
        dense.within(function.node)
    if dense.count:
        notes.append(f"made {_counted(dense.count, 'sparse initializer')} dense")
    notes += _drop_inputs(result.graph)
    names = Names(result)
    notes += upgrade(result, names)
    hoist = Hoist(result, names)
    hoist.run()
    notes += hoist.notes
    reasons.update(hoist.reasons)
    notes += _declare(result)
    return Intake(result, tuple(notes), reasons)


class _Dense:
    """Makes sparse initializers dense, at any depth, and counts them and their bytes."""

    def __init__(self, max_bytes: int | None, reasons: dict[str, str]) -> None:
        self.count = 0
        self._left = max_bytes
        self._reasons = reasons

    def graph(self, graph: GraphProto) -> None:
        kept = []
        for sparse in graph.sparse_initializer:
            nbytes = declared_nbytes(
                TensorProto(dims=sparse.dims, data_type=sparse.values.data_type)
            )
            if nbytes is None:
                self._reasons[sparse.values.name] = f"a sparse tensor of {kind(sparse.values)}"
                kept.append(sparse)
                continue
            if self._left is not None and (left := self._left - nbytes) < 0:
                raise Prune2OnnxError(
                    f"{sparse.values.name}: dense it takes {nbytes:,} bytes, {-left:,} more than "
                    "are allowed; raise the limit, or shrink the model first"
                )
            graph.initializer.append(densified(sparse))
            self.count += 1
            if self._left is not None:
                self._left -= nbytes
        if len(kept) < len(graph.sparse_initializer):
            del graph.sparse_initializer[:]
            graph.sparse_initializer.extend(kept)
        self.within(graph.node)

    def within(self, nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            for body in bodies(node):
                self.graph(body)


def _drop_inputs(graph: GraphProto) -> list[str]:
    stored = {tensor.name for tensor in graph.initializer}
    stored.update(sparse.values.name for sparse in graph.sparse_initializer)
    dropped = []
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in stored:
            dropped.append(graph.input[index].name)
            del graph.input[index]
    if not dropped:
        return []
    named = ", ".join(reversed(dropped[-_NAMED:]))
    more = f" and {len(dropped) - _NAMED} more" if len(dropped) > _NAMED else ""
    return [
        f"{_counted(len(dropped), 'initializer')} could be fed as inputs too, now constant: "
        f"{named}{more}"
    ]


def _declare(model: ModelProto) -> list[str]:
    notes = []
    if opset(model.opset_import) is None:
        model.opset_import.add(domain="", version=TARGET)
        notes.append(f"imports opset {TARGET} of ONNX's own operators, for decoding")
    inputs = {value.name for value in model.graph.input}
    constant = any(tensor.name not in inputs for tensor in model.graph.initializer)
    if constant and model.ir_version < CONSTANT_IR:
        notes.append(f"raised the IR version from {model.ir_version} to {CONSTANT_IR}")
        model.ir_version = CONSTANT_IR
    return notes


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
