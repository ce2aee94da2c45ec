"""LSTM in int8: DynamicQuantizeLSTM of com.microsoft, weights with a scale for each unit of a gate.

Only LSTM has such a kernel: GRU and RNN stay float32. Weights are followed through what exporters
put in front of them (slices of the gates, joined in another order), also in bodies of If, Loop and
Scan; what is arranged so becomes an initializer of the main graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from prune2onnx.graph.names import Names
from prune2onnx.graph.protobuf import keep as keep_only
from prune2onnx.graph.protobuf import tensor as stored
from prune2onnx.graph.tensors import array_of, evaluated
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute, bodies, opset, used_in
from prune2onnx.packing.compute.codes import in_bytes
from prune2onnx.packing.compute.uses import LEAST_ELEMENTS, RECURRENT
from prune2onnx.packing.quantized import Quantized
from prune2onnx.packing.readers import Key, Reader, Readers

_ARRANGING = ("Concat", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_WEIGHTS = (1, 2)  # inputs: of the layer's inputs, and of its own outputs
_CONTRIB = "com.microsoft"

OTHER = "the other weight of its LSTM is float32"
"""A reason: the kernel takes both or none."""


@dataclass(frozen=True, eq=False)
class Arranged:
    """A weight as an LSTM reads it.

    Attributes:
        tensor: that is stored.
        value: what the LSTM reads.
        nodes: that make it of the tensor, in order, with the constants that they read.
        constants: these, by name.
    """

    tensor: TensorProto
    value: str
    nodes: tuple[NodeProto, ...]
    constants: tuple[tuple[str, TensorProto], ...]

    def of(self, array: NDArray[Any], version: int) -> NDArray[Any]:
        """An array of the tensor's shape in the order of the LSTM: [directions, 4 units, inputs].

        Args:
            array: float32.
            version: of the operator set.
        """
        if not self.nodes:
            return array
        given = {name: array_of(tensor) for name, tensor in self.constants}
        return evaluated(self.nodes, {self.tensor.name: array, **given}, self.value, version)


@dataclass(frozen=True, eq=False)
class Lstm:
    """An LSTM that can compute in int8.

    Attributes:
        output: what it makes first, which names it.
        weights: of its inputs, and of its own outputs.
    """

    output: str
    weights: tuple[Arranged, Arranged]

    @property
    def names(self) -> tuple[str, str]:
        """Of the weights."""
        first, second = self.weights
        return first.tensor.name, second.tensor.name


def recurrent(model: ModelProto, keep: Collection[str] = ()) -> tuple[list[Lstm], dict[str, str]]:
    """The LSTMs that can compute in int8, and why weights of other recurrent layers cannot.

    Args:
        model: unpacked and normalized.
        keep: weights that stay float in any case.

    Returns:
        LSTMs, in the order of the graph; name of a weight -> reason.
    """
    readers = Readers(model)
    stored_at = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    reasons: dict[str, str] = {}
    found: dict[int, tuple[NodeProto, dict[int, Arranged]]] = {}
    for name, tensor in stored_at.items():
        ends: list[tuple[Reader, Key]] = []
        refused = _follow(readers, ((), name), ends)
        layers = [reader.node.op_type for reader, _ in ends if _is_weight(reader)]
        if not layers:
            continue
        if refused or len(layers) < len(ends):
            reasons[name] = refused or "read in other ways than by recurrent layers"
        elif set(layers) != {"LSTM"}:
            op = next(op for op in layers if op != "LSTM")
            reasons[name] = f"read by {op}; onnxruntime has an int8 kernel for LSTM alone"
        elif any(attribute(reader.node, "layout", 0) for reader, _ in ends):
            reasons[name] = "read by LSTM with the batch first, for which there is no int8 kernel"
        elif math.prod(tensor.dims) < LEAST_ELEMENTS:
            reasons[name] = f"fewer than {LEAST_ELEMENTS} elements"
        elif name in keep:
            reasons[name] = "as asked"
        else:
            for reader, key in ends:
                arranged = _arranged(readers, key, tensor)
                if isinstance(arranged, str):
                    reasons[name] = arranged
                else:
                    own = found.setdefault(reader.number, (reader.node, {}))[1]
                    own[reader.index] = arranged
    return _whole(found, reasons), reasons


def _whole(
    found: Mapping[int, tuple[NodeProto, dict[int, Arranged]]], reasons: dict[str, str]
) -> list[Lstm]:
    """LSTMs of which both weights can be narrow, also those of other LSTMs that they are in."""
    left = dict(found)
    before = -1
    while before != (before := len(left)):
        for number, (_, weights) in list(left.items()):
            missing = len(weights) < len(_WEIGHTS)
            if missing or any(one.tensor.name in reasons for one in weights.values()):
                del left[number]
                for one in weights.values():
                    reasons.setdefault(one.tensor.name, OTHER)
    return [
        Lstm(node.output[0] or node.output[1], (weights[1], weights[2]))
        for _, (node, weights) in sorted(left.items())
    ]


def _is_weight(reader: Reader) -> bool:
    """Whether a recurrent layer multiplies with what it reads."""
    known = reader.node.domain in DEFAULT_DOMAINS and reader.node.op_type in RECURRENT
    return known and reader.index in _WEIGHTS


def _follow(readers: Readers, key: Key, ends: list[tuple[Reader, Key]]) -> str:
    """Collects who reads a weight in the end, and what; returns why that is not known."""
    if key in readers.taken:
        return "also an input or output of a graph"
    for reader in readers.of[key]:
        node = reader.node
        arranges = node.op_type in _ARRANGING and node.domain in DEFAULT_DOMAINS
        if not arranges or (node.op_type != "Concat" and reader.index):
            ends.append((reader, key))
            continue
        if refused := _follow(readers, (reader.path, node.output[0]), ends):
            return refused
    return ""


def _arranged(readers: Readers, key: Key, tensor: TensorProto) -> Arranged | str:
    """A value that is made of one weight; a text: of what else it is made."""
    nodes: list[NodeProto] = []
    constants: dict[str, TensorProto] = {}

    def visit(key: Key) -> str:
        if key == ((), tensor.name):
            return ""
        if (constant := readers.stored.get(key)) is not None:
            constants[key[1]] = constant
            return "" if constant.data_type == TensorProto.INT64 else f"joined with {key[1]}"
        maker = readers.makers.get(key)
        if maker is None or maker.node.op_type not in _ARRANGING:
            return f"joined with {key[1]}, which is computed"
        if any(maker.node.output[0] == node.output[0] for node in nodes):
            return ""
        for name in maker.node.input:
            if name and (refused := visit(maker.key(name))):
                return refused
        nodes.append(maker.node)
        return ""

    refused = visit(key)
    return refused or Arranged(tensor, key[1], tuple(nodes), tuple(constants.items()))


def in_int8(
    model: ModelProto, layers: list[Lstm], quantized: Mapping[str, Quantized]
) -> ModelProto:
    """The model with some LSTMs in int8.

    Args:
        model: not modified.
        layers: of `recurrent`.
        quantized: weights that are on few levels, which stay so where they have a scale for each
            unit of a gate.
    """
    result = ModelProto()
    result.CopyFrom(model)
    names, version = Names(result), opset(model.opset_import) or 0
    made: dict[tuple[str, bytes], list[str]] = {}

    def codes_of(one: Arranged) -> list[str]:
        codes, scales = _coded(one, quantized.get(one.tensor.name), version)
        key = one.tensor.name, codes.tobytes()
        if key not in made:
            name = one.tensor.name
            if any(other == name for other, _ in made):  # in another order
                name = names.fresh(name)
            parts: dict[str, NDArray[Any]] = {
                name: codes,
                names.fresh(f"{name}_scale"): scales,
                names.fresh(f"{name}_zero"): np.zeros(scales.shape, np.int8),
            }
            made[key] = list(parts)
            added.extend(
                stored(own, array, helper.np_dtype_to_tensor_dtype(array.dtype))
                for own, array in parts.items()
            )
        return made[key]

    added: list[TensorProto] = []
    instead = {layer.output: [codes_of(one) for one in layer.weights] for layer in layers}
    _replace(result.graph, instead)
    outputs = {value.name for value in result.graph.output}
    gone = used_in(model.graph.node) - used_in(result.graph.node) - outputs
    gone.update(name for layer in layers for name in layer.names)
    keep_only(result.graph.initializer, lambda tensor: tensor.name not in gone)
    result.graph.initializer.extend(added)
    if all(entry.domain != _CONTRIB for entry in result.opset_import):
        result.opset_import.add(domain=_CONTRIB, version=1)
    return result


def _coded(
    one: Arranged, known: Quantized | None, version: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [directions, inputs, 4 units], scales [directions, 4 units]."""
    array = one.of(array_of(one.tensor), version)
    shape = array.shape
    rows = array.reshape(-1, shape[-1])
    own: Quantized | None = None
    if known is not None and known.scale is not None:
        levels, scale = known.levels(), np.broadcast_to(known.scale, known.codes.shape)
        every = one.of(np.ascontiguousarray(scale), version).reshape(rows.shape)
        if (every == every[:, :1]).all():
            moved = one.of(levels.astype(np.float32), version).reshape(rows.shape)
            book, places = np.unique(moved, return_inverse=True)
            counts = np.cumsum(book != 0) * (book != 0)
            places = counts[places.reshape(rows.shape)]
            own = Quantized(places, book[book != 0], np.ascontiguousarray(every[:, :1]))
    codes, scales = in_bytes(rows, own)
    scales = np.broadcast_to(scales, (len(rows), 1)).reshape(shape[:-1])
    return np.ascontiguousarray(codes.reshape(shape).swapaxes(1, 2)), np.ascontiguousarray(scales)


def _replace(graph: GraphProto, instead: Mapping[str, list[list[str]]]) -> None:
    """Replaces LSTMs in a graph and its bodies, in place; what nothing reads then is removed."""
    for node in graph.node:
        for body in bodies(node):
            _replace(body, instead)
        if node.op_type != "LSTM" or node.domain not in DEFAULT_DOMAINS:
            continue
        name = next((name for name in node.output[:2] if name in instead), "")
        if name:
            (w, w_scale, w_zero), (r, r_scale, r_zero) = instead[name]
            inputs = [*node.input, *[""] * (8 - len(node.input))]
            inputs[1:3] = w, r
            node.input[:] = [*inputs, w_scale, w_zero, r_scale, r_zero]
            node.op_type, node.domain = "DynamicQuantizeLSTM", _CONTRIB
            keep_only(node.attribute, lambda one: one.name != "layout")
    outputs = {value.name for value in graph.output}
    before = -1
    while before != (before := len(graph.node)):
        used = used_in(graph.node) | outputs
        keep_only(graph.node, partial(_is_read, used))


def _is_read(used: set[str], node: NodeProto) -> bool:
    """Whether something reads what a node makes, if it could have arranged a weight."""
    return node.op_type not in (*_ARRANGING, "Constant") or bool(used.intersection(node.output))
