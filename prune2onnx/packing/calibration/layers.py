"""The layers of a graph whose weights can be calibrated, and what each multiplies its weight with.

A layer's output is X W, plus a bias: a weight is seen as `groups` matrices [inputs, outputs], and
activations as rows X [n, inputs] for each of them. A convolution has a row for each place of its
output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute, nodes_in
from prune2onnx.packing.approximation.candidates import Weight
from prune2onnx.packing.approximation.subject import Subject

Picked = Callable[[int], NDArray[np.int64]]
"""Of so many rows, the indices of those that are looked at, ascending."""

Rows = Callable[[NDArray[Any], Picked], NDArray[np.float32]]
"""Activations and which rows -> those rows, [n, groups, inputs]."""

_CARRIERS = ("Cast", "Identity", "Transpose")
_RECURRENT = ("GRU", "LSTM", "RNN")
_LOST = "/prune2onnx.states"  # name of an output that has none


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer.

    Attributes:
        name: of the initializer that is its weight.
        weight: the same, and its layout.
        source: the value that it is multiplied with.
        at: place of its node in the graph.
        groups: groups of inputs and outputs that have nothing to do with each other.
        rows: activations as rows; None for a table of which rows are looked up.
        bias: initializer that is added to its outputs, one for each; "" where there is none of its
            own.
    """

    name: str
    weight: Weight
    source: str
    at: int
    groups: int
    rows: Rows | None
    bias: str = ""

    @property
    def view(self) -> Hashable:
        """What two layers have in common if their inputs have the same moments."""
        how = (self.rows.func, self.rows.args) if isinstance(self.rows, partial) else self.rows
        size = len(self.weight.array) if self.rows is None else 0
        return self.source, bool(self.bias), how, size

    def matrices(self, rows: NDArray[Any]) -> NDArray[Any]:
        """What has the shape of `Weight.rows`, as [groups, inputs, outputs]."""
        if self.rows is None:
            return rows.reshape(1, len(rows), -1)
        return rows.reshape(self.groups, -1, math.prod(rows.shape[1:])).transpose(0, 2, 1)

    def as_rows(self, matrices: NDArray[Any]) -> NDArray[Any]:
        """The way back."""
        shape = self.weight.rows.shape
        return (matrices if self.rows is None else matrices.transpose(0, 2, 1)).reshape(shape)


def layers_of(subject: Subject) -> list[Layer]:
    """The layers whose weights have one reader, in the order of their nodes."""
    found = []
    graph = _Graph(subject.model)
    for name, weight in subject.weights.items():
        role = subject.roles[name]
        if role.kind != "weight" or role.layout is None or weight.array.dtype.kind != "f":
            continue
        layer = graph.layer(name, weight)
        if layer is not None:
            found.append(layer)
    return sorted(found, key=lambda layer: layer.at)


class _Graph:
    """Who reads what in the main graph."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
        self._taken = {value.name for value in (*graph.input, *graph.output)}
        # value -> who reads it, as which input, and the place of that node; -1 in a body
        self._readers: dict[str, list[tuple[NodeProto, int, int]]] = defaultdict(list)
        for at, node in enumerate(graph.node):
            for inner in nodes_in([node]):
                for index, name in enumerate(inner.input):
                    self._readers[name].append((inner, index, at if inner is node else -1))

    def layer(self, name: str, weight: Weight) -> Layer | None:
        """The layer that reads a weight; None where it is none of those that are known."""
        value = name
        while True:
            readers = self._readers[value]
            if len(readers) != 1 or value in self._taken:
                return None
            ((node, index, at),) = readers
            if node.op_type not in _CARRIERS:
                break
            value = node.output[0]
        if node.domain not in DEFAULT_DOMAINS or at < 0:
            return None
        made = _known(node, index, weight)
        if made is None:
            return None
        source, groups, rows = made
        if source in self._sizes:
            return None  # both are stored
        bias = self._bias(node, weight.rows.shape[0])
        return Layer(name, weight, source, at, groups, rows, bias)

    def _bias(self, node: NodeProto, outputs: int) -> str:
        """The initializer that is added to nothing but the outputs of a node."""
        name = ""
        if node.op_type in ("Conv", "Gemm"):
            plain = node.op_type == "Conv" or attribute(node, "beta", 1.0) == 1.0
            name = node.input[2] if len(node.input) > 2 and plain else ""
        elif node.op_type == "MatMul" and node.output[0] not in self._taken:
            readers = self._readers[node.output[0]]
            if len(readers) == 1 and readers[0][0].op_type == "Add":
                added, index, _ = readers[0]
                name = added.input[1 - index]
        own = name in self._sizes and name not in self._taken and len(self._readers[name]) == 1
        return name if own and self._sizes[name] == outputs else ""


def _known(node: NodeProto, index: int, weight: Weight) -> tuple[str, int, Rows | None] | None:
    """The source, groups and rows of a node that reads a weight as input `index`."""
    op, rank = node.op_type, weight.array.ndim
    other = node.input[1 - index] if index < 2 and len(node.input) > 1 else ""
    if op == "MatMul" and rank == 2:
        return other, 1, _columns if index == 0 else _last
    if op == "Gemm" and index < 2 and attribute(node, "alpha", 1.0) == 1.0:
        turned = attribute(node, "transA" if index else "transB", 0) != (0 if index else 1)
        return other, 1, _columns if turned else _last
    if op == "Conv" and index == 1 and attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        groups = attribute(node, "group", 1)
        return other, groups, partial(_windows, _Window.of(node, weight.array.shape[2:]), groups)
    if op == "ConvTranspose" and index == 1:
        groups = attribute(node, "group", 1)
        return other, groups, partial(_channels, groups)
    if op in _RECURRENT and index == 1:
        return node.input[0], 1, _last
    if op in _RECURRENT and index == 2 and not attribute(node, "layout", 0):
        return states_of(node), weight.array.shape[0], _states
    if op == "Gather" and index == 0 and not attribute(node, "axis", 0):
        return node.input[1], 1, None
    return None


def states_of(node: NodeProto) -> str:
    """The value that holds all states of a recurrent node."""
    return node.output[0] if node.output and node.output[0] else f"{node.name}{_LOST}"


def with_states(node: NodeProto) -> NodeProto:
    """A node; a recurrent one has a name for all of its states."""
    if node.op_type not in _RECURRENT or (node.output and node.output[0]):
        return node
    named = NodeProto()
    named.CopyFrom(node)
    named.output[:] = [states_of(node), *node.output[1:]]
    return named


def _last(x: NDArray[Any], picked: Picked) -> NDArray[np.float32]:
    flat = x.reshape(-1, x.shape[-1])
    return flat[picked(len(flat))][:, None]


def _columns(x: NDArray[Any], picked: Picked) -> NDArray[np.float32]:
    return _last(np.swapaxes(x, -1, -2), picked)


def _channels(groups: int, x: NDArray[Any], picked: Picked) -> NDArray[np.float32]:
    flat = np.moveaxis(x, 1, -1).reshape(-1, groups, x.shape[1] // groups)
    return flat[picked(len(flat))]


def _states(x: NDArray[Any], picked: Picked) -> NDArray[np.float32]:
    """[steps, directions, batch, hidden]: what the next step is multiplied with."""
    flat = np.moveaxis(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])
    return flat[picked(len(flat))]


@dataclass(frozen=True)
class _Window:
    """What a convolution sees of its input."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @staticmethod
    def of(node: NodeProto, kernel: Sequence[int]) -> _Window:
        ones = [1] * len(kernel)
        pads = attribute(node, "pads", [0] * 2 * len(kernel))
        if attribute(node, "auto_pad", "NOTSET") == "VALID":
            pads = [0] * 2 * len(kernel)
        return _Window(
            tuple(kernel),
            tuple(attribute(node, "strides", ones)),
            tuple(attribute(node, "dilations", ones)),
            tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)),
        )


def _windows(window: _Window, groups: int, x: NDArray[Any], picked: Picked) -> NDArray[np.float32]:
    padded = np.pad(x, ((0, 0), (0, 0), *window.pads))
    axes = tuple(range(2, x.ndim))
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(padded, spans, axes)
    steps = [slice(None, None, stride) for stride in window.strides]
    holes = [slice(None, None, dilation) for dilation in window.dilations]
    where: Any = (slice(None), slice(None), *steps, *holes)
    seen = seen[where]
    places = (len(x), *seen.shape[2 : x.ndim])
    at = np.unravel_index(picked(math.prod(places)), places)
    where = (at[0], slice(None), *at[1:])
    rows: NDArray[np.float32] = seen[where]
    return rows.reshape(len(rows), groups, -1)
