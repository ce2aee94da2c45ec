"""The layers of a graph whose weights can be calibrated.

A layer's output is X W, plus a bias: a weight is seen as `groups` matrices [inputs, outputs], and
activations as `rows` for each of them. Between an initializer and the node that multiplies it may
be operators that move its elements, or scale integers; several nodes may read one weight, also in
the bodies of If, Loop and Scan.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute
from prune2onnx.packing.approximation.candidates import Weight, Written
from prune2onnx.packing.approximation.roles import FLOATS, Role, layout_of
from prune2onnx.packing.approximation.subject import Subject
from prune2onnx.packing.calibration.capture import can_capture
from prune2onnx.packing.calibration.moves import Moves
from prune2onnx.packing.calibration.rows import Rows, rows_of
from prune2onnx.packing.readers import Key, Path, Reader, Readers


@dataclass(frozen=True, eq=False)
class Use:
    """A node that multiplies with a layer's weight.

    Attributes:
        source: the value that the weight is multiplied with.
        path: where that is defined; () in the main graph.
        at: place of the node, or of the one around it, in the main graph.
        number: of the node among all, in the order of the graph.
        rows: activations as rows; None for a table of which rows are looked up.
    """

    source: str
    path: Path
    at: int
    number: int
    rows: Rows | None

    @property
    def view(self) -> Hashable:
        """What two uses have in common if they see the same rows."""
        how = (self.rows.func, self.rows.args) if isinstance(self.rows, partial) else self.rows
        return self.source, self.path, how


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer.

    Attributes:
        name: of the initializer that is its weight.
        stored: the same, as it is stored.
        weight: as its readers see it, with a layout; integers without their scale.
        uses: who reads it, in the order of the graph.
        groups: groups of inputs and outputs that have nothing to do with each other.
        bias: initializer that is added to its outputs, one for each, or is the mean that a
            BatchNormalization takes from them; "" where there is none of its own.
        order: [elements] place in `stored` of each element of `weight`; None where it is its own.
        scale: [rows] of an integer weight, what each of its rows is multiplied with.
        is_mean: whether its bias is a mean.
    """

    name: str
    stored: Weight
    weight: Weight
    uses: tuple[Use, ...]
    groups: int
    bias: str = ""
    order: NDArray[np.int64] | None = None
    scale: NDArray[np.float64] | None = None
    is_mean: bool = False

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up, and never multiplied."""
        return all(use.rows is None for use in self.uses)

    @property
    def view(self) -> Hashable:
        """What two layers have in common if their inputs have the same moments."""
        size = len(self.weight.array) if self.is_table else 0
        return tuple(use.view for use in self.uses), bool(self.bias), size

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of its matrices: groups, inputs, outputs."""
        groups, inputs, outputs = self.matrices(self.weight.rows).shape
        return groups, inputs, outputs

    def matrices(self, rows: NDArray[Any]) -> NDArray[Any]:
        """What has the shape of `Weight.rows`, as [groups, inputs, outputs]."""
        if self.is_table:
            return rows.reshape(1, len(rows), -1)
        return rows.reshape(self.groups, -1, math.prod(rows.shape[1:])).transpose(0, 2, 1)

    def as_rows(self, matrices: NDArray[Any]) -> NDArray[Any]:
        """The way back."""
        shape = self.weight.rows.shape
        return (matrices if self.is_table else matrices.transpose(0, 2, 1)).reshape(shape)

    def values(self) -> NDArray[np.float64]:
        """What inputs are multiplied with, as matrices; integers are scaled."""
        return self._scaled(self.weight.rows)

    def values_of(self, array: NDArray[Any]) -> NDArray[np.float64]:
        """The same of other values of the initializer."""
        if self.order is not None:
            array = array.reshape(-1)[self.order].reshape(self.weight.array.shape)
        if self.weight.role.zero_point is not None:
            array = array.astype(np.int64) - self.weight.role.zero_point
        return self._scaled(self.weight.rows_of(array))

    def _scaled(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        scaled = rows.astype(np.float64)
        if self.scale is not None:
            scaled = scaled * self.scale[:, None, None]
        return self.matrices(scaled)

    def written(
        self, codes: NDArray[np.integer[Any]], steps: NDArray[np.float32], parameter: int = 1
    ) -> Written:
        """The initializer as multiples of a step; arguments as of `Weight.on_grid`."""
        made = self.weight.on_grid(codes, steps, parameter)
        if self.order is None:
            return made
        array = self.restored(made.array)
        known = made.quantized  # whose scale is one for all: see `has_channel_steps`
        if known is not None:
            known = replace(known, codes=self.restored(known.codes))
            if known.scale is not None:
                known = replace(known, scale=known.scale.reshape((1,) * array.ndim))
        return Written(array, known, made.bits)

    def restored(self, array: NDArray[Any]) -> NDArray[Any]:
        """What has the shape of `weight`, as the initializer has it."""
        if self.order is None:
            return array
        found = np.empty(self.stored.array.size, array.dtype)
        found[self.order] = array.reshape(-1)
        return found.reshape(self.stored.array.shape)

    def with_bias(self, bias: NDArray[Any], change: NDArray[np.float64]) -> NDArray[Any]:
        """The bias with which each output becomes larger by `change`, in the bias's type."""
        change = change.reshape(bias.shape)
        made: NDArray[Any] = (bias - change if self.is_mean else bias + change).astype(bias.dtype)
        return made

    @property
    def has_channel_steps(self) -> bool:
        """Whether each of its outputs may have a step of its own."""
        layout = self.weight.role.layout
        plain = self.weight.array.dtype == np.float32 and self.order is None
        return plain and layout is not None and layout.groups == 1


def layers_of(subject: Subject) -> list[Layer]:
    """The layers whose readers are all known, in the order of their first ones."""
    finder = _Finder(subject)
    found = (finder.layer(name) for name in subject.weights)
    return sorted((one for one in found if one is not None), key=lambda one: one.uses[0].number)


class _Finder:
    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._readers = Readers(subject.model)

    def layer(self, name: str) -> Layer | None:
        """The layer that reads a weight; None where it is none of those that are known."""
        stored, role = self._subject.weights[name], self._subject.roles[name]
        moves = Moves(self._readers, name, stored)
        ends = moves.ends()
        if not ends:
            return None
        seen = moves.seen(ends[0])
        if seen is None or any(not seen.same(moves.seen(end)) for end in ends[1:]):
            return None
        weight = stored
        if seen.order is not None:
            layout = layout_of(ends[0].node, ends[0].index, seen.order.ndim)
            array = stored.array.reshape(-1)[seen.order]
            point = role.zero_point
            if point is not None and point.size > 1:
                return None
            moved = None if point is None else point.reshape((1,) * array.ndim)
            weight = Weight(array, Role(role.kind, layout=layout, zero_point=moved))
        if weight.role.layout is None:
            return None
        uses, groups = [], set()
        for end in ends:
            known = self._use(end, weight)
            if known is None:
                return None
            uses.append(known[0])
            groups.add(known[1])
        if len(groups) > 1:
            return None
        biases = {self._bias(end, weight, len(ends)) for end in ends}
        if len(biases) > 1 or not all(use.rows for use in uses):
            biases = {("", False)}
        bias, is_mean = biases.pop()
        order = None if seen.order is None else seen.order.reshape(-1)
        scale = None
        if stored.role.zero_point is not None:
            if seen.scale is None:
                return None
            every = weight.rows_of(np.broadcast_to(seen.scale, weight.array.shape))
            if np.ptp(every, axis=(1, 2)).any():
                return None  # scales of blocks
            scale = every[:, 0, 0].astype(np.float64)
        elif weight.array.dtype.kind != "f" and weight.array.dtype.name != "bfloat16":
            return None
        return Layer(name, stored, weight, tuple(uses), groups.pop(), bias, order, scale, is_mean)

    def _use(self, end: Reader, weight: Weight) -> tuple[Use, int] | None:
        node = end.node
        if node.domain not in DEFAULT_DOMAINS or not can_capture(self._subject.model, end.path):
            return None
        found = rows_of(node, end.index, weight)
        if found is None:
            return None
        path, source = end.key(found.source)
        if found.source not in node.input:  # the states of a recurrent node
            path = end.path
        elif (path, source) in self._readers.stored:
            return None  # both are stored
        return Use(source, path, end.at, end.number, found.rows), found.groups

    def _bias(self, end: Reader, weight: Weight, uses: int) -> tuple[str, bool]:
        """The initializer that shifts nothing but the outputs of so many nodes; is it a mean?"""
        node, outputs = end.node, len(weight.rows)
        key: Key = ((), "")
        is_mean = False
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            if node.op_type != "Gemm" or attribute(node, "beta", 1.0) == 1.0:
                key = end.key(node.input[2])
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            key, is_mean = self._shift_behind(end, outputs, weight.array.ndim)
        return (key[1], is_mean) if self._is_own(key, outputs, uses) else ("", False)

    def _shift_behind(self, end: Reader, outputs: int, rank: int) -> tuple[Key, bool]:
        """What the only reader of a node's outputs adds to them, one for each; is it a mean?"""
        made = (end.path, end.node.output[0])
        readers = self._readers.of[made] if made not in self._readers.taken else []
        if len(readers) != 1:
            return ((), ""), False
        reader, node = readers[0], readers[0].node
        if node.op_type == "BatchNormalization" and not attribute(node, "training_mode", 0):
            return (reader.key(node.input[3]), True) if reader.index == 0 else (((), ""), False)
        if node.op_type != "Add":
            return ((), ""), False
        key = reader.key(node.input[1 - reader.index])
        tensor = self._readers.stored.get(key)
        dims = [] if tensor is None else list(tensor.dims)
        behind = [outputs] + [1] * (rank - 2 if end.node.op_type == "Conv" else 0)
        return (key if dims[-len(behind) :] == behind else ((), "")), False

    def _is_own(self, key: Key, outputs: int, uses: int) -> bool:
        tensor = self._readers.stored.get(key)
        if tensor is None or key[0] or key in self._readers.taken:
            return False
        if key in self._readers.makers:  # a Constant node
            return False
        read = len(self._readers.of[key])
        return read == uses and math.prod(tensor.dims) == outputs and tensor.data_type in FLOATS
