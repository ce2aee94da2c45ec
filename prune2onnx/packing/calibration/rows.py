"""What a layer multiplies its weight with: activations as rows.

Activations are rows X [n, groups, inputs]; a convolution has a row for each place of its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from prune2onnx.graph.walk import attribute
from prune2onnx.packing.approximation.candidates import Weight

Picked = Callable[[int], NDArray[np.int64]]
"""Of so many rows, the indices of those that are looked at, ascending."""

Rows = Callable[[NDArray[Any], Picked], NDArray[np.float32]]
"""Activations and which rows -> those rows, [n, groups, inputs]."""

_RECURRENT = ("GRU", "LSTM", "RNN")
_LOST = "/prune2onnx.states"  # name of an output that has none


@dataclass(frozen=True)
class Multiplied:
    """What a node multiplies a weight with.

    Attributes:
        source: the value.
        groups: groups of inputs and outputs that have nothing to do with each other.
        rows: that value as rows; None for a table of which rows are looked up.
    """

    source: str
    groups: int
    rows: Rows | None


def rows_of(node: NodeProto, index: int, weight: Weight) -> Multiplied | None:
    """What a node multiplies its input `index` with; None where that is no weight of a layer."""
    op, rank, layout = node.op_type, weight.array.ndim, weight.role.layout
    other = node.input[1 - index] if index < 2 and len(node.input) > 1 else ""
    kernel = [weight.array.shape[axis] for axis in layout.kernel] if layout else []
    if op == "MatMul" and rank == 2:
        return Multiplied(other, 1, _columns if index == 0 else _last)
    if op == "Gemm" and index < 2 and attribute(node, "alpha", 1.0) == 1.0:
        turned = attribute(node, "transA" if index else "transB", 0) != (0 if index else 1)
        return Multiplied(other, 1, _columns if turned else _last)
    if op == "Conv" and index == 1:
        groups = attribute(node, "group", 1)
        return Multiplied(other, groups, partial(_windows, _Window.of(node, kernel), groups))
    if op == "ConvTranspose" and index == 1:
        groups = attribute(node, "group", 1)
        return Multiplied(other, groups, partial(_channels, groups))
    if op in _RECURRENT and index == 1:
        return Multiplied(node.input[0], 1, _last)
    if op in _RECURRENT and index == 2 and not attribute(node, "layout", 0):
        both = attribute(node, "direction", "forward") == "bidirectional"
        return Multiplied(states_of(node), 2 if both else 1, _states)
    if op == "Gather" and index == 0 and not attribute(node, "axis", 0):
        return Multiplied(node.input[1], 1, None)
    return None


def states_of(node: NodeProto) -> str:
    """The value that holds all states of a recurrent node."""
    if node.output and node.output[0]:
        return str(node.output[0])
    return f"{next(filter(None, node.output), node.name)}{_LOST}"


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
    """What a convolution sees of its input; `same` is how it pads to keep places, if it does."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    same: str = ""

    @staticmethod
    def of(node: NodeProto, kernel: Sequence[int]) -> _Window:
        ones = [1] * len(kernel)
        auto = attribute(node, "auto_pad", "NOTSET")
        pads = attribute(node, "pads", [0] * 2 * len(kernel))
        if auto != "NOTSET":
            pads = [0] * 2 * len(kernel)
        return _Window(
            tuple(kernel),
            tuple(attribute(node, "strides", ones)),
            tuple(attribute(node, "dilations", ones)),
            tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)),
            auto if auto.startswith("SAME") else "",
        )

    @property
    def spans(self) -> list[int]:
        """Extents of what one output sees."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    def pads_of(self, extents: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """What is added to inputs of these extents, before and after."""
        if not self.same:
            return self.pads
        found = []
        for extent, stride, span in zip(extents, self.strides, self.spans, strict=True):
            every = max((-(-extent // stride) - 1) * stride + span - extent, 0)
            less, more = every // 2, every - every // 2
            found.append((less, more) if self.same == "SAME_UPPER" else (more, less))
        return tuple(found)


def _windows(window: _Window, groups: int, x: NDArray[Any], picked: Picked) -> NDArray[np.float32]:
    padded = np.pad(x, ((0, 0), (0, 0), *window.pads_of(x.shape[2:])))
    axes = tuple(range(2, x.ndim))
    seen = np.lib.stride_tricks.sliding_window_view(padded, window.spans, axes)
    steps = [slice(None, None, stride) for stride in window.strides]
    holes = [slice(None, None, dilation) for dilation in window.dilations]
    where: Any = (slice(None), slice(None), *steps, *holes)
    seen = seen[where]
    places = (len(x), *seen.shape[2 : x.ndim])
    at = np.unravel_index(picked(math.prod(places)), places)
    where = (at[0], slice(None), *at[1:])
    rows: NDArray[np.float32] = seen[where]
    return rows.reshape(len(rows), groups, -1)
