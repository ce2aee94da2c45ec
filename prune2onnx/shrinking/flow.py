"""How channels run through a graph: which are coupled, which are constant, which sums read them.

Every channel of every value has a number. Rules (see `rules`) walk the nodes and record of each
number with which others it is coupled, whether it must stay, along which axes of weights it lies
and which sums read it. Which channels are dead: see `liveness`; how they are removed: see `cut`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from prune2onnx.graph.names import Names
from prune2onnx.graph.shapes import extents_of, inferred, values_in
from prune2onnx.graph.tensors import array_of, replace
from prune2onnx.graph.walk import (
    DEFAULT_DOMAINS,
    attribute,
    is_constant,
    nodes_in,
    opset,
    set_attribute,
    used_in,
)
from prune2onnx.graph.walk import bodies as bodies_of

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
"""Element types in which channels are followed."""

_FREE_IR = 4  # the first IR version in which an initializer need not be an input of the graph

Ids = NDArray[np.int64]
Array = NDArray[Any]
Kept = Callable[[Ids], NDArray[np.bool_]]
"""Maps channels to whether each one stays."""

Extent = int | str | Ids | None
"""An element of a computed shape: a number, the name of an unknown one, the number of these
channels, or None: none of them."""


_MOST_CHANNELS = 1 << 25  # 16 bytes for each


class Opaque(Exception):  # noqa: N818 - no error: the node counts as reading everything
    """Why a node's channels cannot be followed; continues "read by Softmax 'y' ..."."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one value.

    Attributes:
        axis: along which they lie, from 0.
        ids: [extent] their numbers; equal ones are one channel.
        constants: [extent] float64, the value of each at every position for every input of the
            graph; NaN where it is unknown or not constant.
    """

    axis: int
    ids: Ids
    constants: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Claim:
    """How one node reads a weight.

    Attributes:
        name: of the initializer or Constant.
        axes: axis -> the channels along it; of a grouped weight, axis 1 has those of every group.
        groups: of the first two axes, as in Conv.
        zeroed: whether the weights of dead channels may become zero.
    """

    name: str
    axes: dict[int, Ids]
    groups: int = 1
    zeroed: bool = False


@dataclass(frozen=True, eq=False)
class Bias:
    """Where constants can be added to each output channel of a sum.

    Attributes:
        node: that has it as an input.
        index: of that input.
        factor: by which the node multiplies it.
    """

    node: NodeProto
    index: int
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Link:
    """A sum over channels: y[r] = sum_c w[r, c] x[c] + b[r].

    Attributes:
        node: that sums.
        rows: [rows] channels of y.
        columns: [columns] channels of x.
        needs: bool [rows, columns], whether the row depends on the column.
        known: columns of a nonzero constant that the bias can absorb.
        amounts: float64 [rows, known], what the bias then adds to each row.
        bias: that absorbs it; None where there is none.
    """

    node: NodeProto
    rows: Ids
    columns: Ids
    needs: NDArray[np.bool_]
    known: Ids
    amounts: NDArray[np.float64]
    bias: Bias | None


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight and its output channels.

    Attributes:
        node: that reads the weight.
        weight: its name.
        channels: of the output.
        inputs: channels that each row sums over; None where they are not followed, or where each
            row reads another one.
    """

    node: NodeProto
    weight: str
    channels: Channels
    inputs: Ids | None


@dataclass(eq=False)
class Flow:
    """What the rules have found so far.

    Attributes:
        model: read by the rules, changed by `cut`.
        may_add: whether a new bias may be added to absorb a constant.
        channels: of values.
        folded: the same where the axis counts them anew for each example.
        heads: channels that are heads of attention.
    """

    model: ModelProto
    may_add: bool
    count: int = 0
    channels: dict[str, Channels] = field(default_factory=dict)
    folded: dict[str, Channels] = field(default_factory=dict)
    heads: list[Ids] = field(default_factory=list)
    extents: dict[str, list[Extent]] = field(default_factory=dict)
    coupled: list[tuple[Ids, Ids]] = field(default_factory=list)
    pinned: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    grouped: list[tuple[Ids, Ids, int]] = field(default_factory=list)
    edits: list[Callable[[Kept], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.model.graph
        given = {value.name for value in graph.input}
        self.stored = {t.name: t for t in graph.initializer if t.name not in given}
        self.initializers = set(self.stored)
        for node in graph.node:
            if is_constant(node):
                values = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
                self.stored.update(dict.fromkeys(node.output, values[0]) if values else {})
        self.functions = {(function.domain, function.name) for function in self.model.functions}
        self.names = Names(self.model)
        self.opset = opset(self.model.opset_import) or 0
        self.uses = Counter(value.name for value in graph.output)
        self.readers: dict[str, list[NodeProto]] = {}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.shapes_made: dict[tuple[str, int, int], str] = {}
        for node in nodes_in(graph.node):
            self.uses.update(filter(None, node.input))
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            for body in bodies_of(node):
                self.uses.update(value.name for value in body.output)
        self.found: list[list[Any]] = [
            *(self.claims, self.links, self.layers, self.grouped, self.edits)
        ]
        self._arrays: dict[str, Array] = {}
        self._infer()

    def _infer(self) -> None:
        self._shapes: dict[str, tuple[int | None, ...]] = {}
        self._symbols: dict[str, tuple[int | str, ...]] = {}
        self.element_types: dict[str, int] = {}
        for value in values_in(inferred(self.model).graph):
            self.element_types[value.name] = value.type.tensor_type.elem_type
            if (extents := extents_of(value)) is not None:
                known = (extent if isinstance(extent, int) else None for extent in extents)
                self._shapes[value.name] = tuple(known)
                self._symbols[value.name] = extents
        for name, tensor in self.stored.items():
            self.element_types[name] = tensor.data_type
            self._shapes[name] = tuple(tensor.dims)

    def shape(self, name: str) -> tuple[int | None, ...]:
        """Extents, None where they depend on the input of the graph.

        Raises:
            Opaque: the rank is unknown.
        """
        if name not in self._shapes:
            raise Opaque(f"as {name!r}, whose shape is unknown")
        return self._shapes[name]

    def symbols(self, name: str) -> tuple[int | str, ...]:
        """Extents of a computed value, with names for those that depend on the graph's inputs.

        Raises:
            Opaque: the rank is unknown.
        """
        self.shape(name)
        return self._symbols[name]

    def carry(self, node: NodeProto, axis: int, ids: Ids, constants: Array) -> None:
        """Records the channels of a node's first output."""
        self.channels[node.output[0]] = Channels(axis, ids, constants)

    def alike(self, one: str, other: str) -> bool:
        """Whether two computed values have the same type and shape for every input."""
        shape = self._symbols.get(one)
        if shape is None or "" in shape or shape != self._symbols.get(other):
            return False
        return self.element_types[one] == self.element_types[other]

    def is_standard(self, node: NodeProto) -> bool:
        """Whether a node is one of ONNX's own operators, not a function of the model."""
        known = node.domain in DEFAULT_DOMAINS
        return known and (node.domain, node.op_type) not in self.functions

    def is_contrib(self, node: NodeProto) -> bool:
        """Whether a node is one of onnxruntime's own operators."""
        known = node.domain == "com.microsoft"
        return known and (node.domain, node.op_type) not in self.functions

    def array(self, name: str) -> Array | None:
        """The values of an initializer or Constant; None for anything else."""
        return self.values(name) if name in self.stored else None

    def values(self, name: str) -> Array:
        """The values of an initializer or Constant, which the caller knows to be one."""
        if name not in self._arrays:
            self._arrays[name] = array_of(self.stored[name])
        return self._arrays[name]

    def weight(self, name: str) -> Array:
        """The values of an initializer or Constant.

        Raises:
            Opaque: it is neither, or of an element type that is not followed.
        """
        array = self.array(name)
        seen = self.may_add or name in self.initializers
        if array is None or self.element_types[name] not in FLOATS or not seen:
            raise Opaque("with a weight that is computed, quantised, or given as an input")
        return array

    def whole_numbers(self, node: NodeProto, name: str, index: int) -> list[int] | None:
        """A list that is an attribute in old operator sets and an input in new ones, or None.

        Raises:
            Opaque: it is computed.
        """
        if (found := attribute(node, name)) is not None:
            return [int(number) for number in np.atleast_1d(found)]
        if len(node.input) <= index or not node.input[index]:
            return None
        array = self.array(node.input[index])
        if array is None:
            raise Opaque(f"with {name} that are computed")
        return [int(number) for number in array.ravel()]

    def elements(self, name: str) -> list[Extent] | None:
        """The elements of a shape, stored or computed."""
        array = self.array(name)
        return self.extents.get(name) if array is None else [int(n) for n in array.ravel()]

    def at(self, name: str, axis: int) -> Channels | None:
        """The channels of a value along an axis; None where they are not followed.

        Raises:
            Opaque: they lie along another axis.
        """
        channels = self.channels.get(name)
        if channels is not None and channels.axis != axis:
            raise Opaque(f"along axis {axis}, not the one of its channels")
        return channels

    def fresh(self, count: int) -> Ids:
        """Numbers of new channels.

        Raises:
            Opaque: there are too many.
        """
        followed(self.count + count)
        self.count += count
        return np.arange(self.count - count, self.count)

    def couple(self, one: Ids, other: Ids) -> None:
        """Couples channels pair by pair: they stay or go together.

        Raises:
            Opaque: they are not as many.
        """
        if len(one) != len(other):
            raise Opaque(f"that joins {len(one)} channels with {len(other)}")
        self.coupled.append((one, other))

    def pin(self, ids: Iterable[int], reason: str) -> None:
        """Marks channels that must stay; the first reason counts."""
        for number in ids:
            self.pinned.setdefault(int(number), reason)

    def pin_all(self, name: str, reason: str) -> None:
        """Marks that all channels of a value, or those whose number it holds, must stay."""
        for known in (self.channels, self.folded):
            if name in known:
                self.pin(known[name].ids, reason)
        for extent in self.extents.get(name, ()):
            if isinstance(extent, np.ndarray):
                self.pin(extent, reason)

    def note(self, ids: Iterable[int], reason: str) -> None:
        """Records why the constants of channels cannot be propagated."""
        for number in ids:
            self.notes.setdefault(int(number), reason)

    def seal(self, node: NodeProto, why: str) -> None:
        """Treats a node as opaque: it reads all of its inputs, and its outputs are not followed."""
        reason = f"read by {label(node)} {why}".rstrip()
        for name in used_in([node]):
            self.pin_all(name, reason)
        for name in node.output:
            self.channels.pop(name, None)
            self.folded.pop(name, None)

    def write(self, node: NodeProto, index: int, values: Array, stem: str = "") -> str:
        """Replaces the values of a node's input; other nodes keep what they read.

        Returns:
            The name of the input; a new one begins with `stem`, if given.
        """
        while len(node.input) <= index:
            node.input.append("")
        name = node.input[index]
        if name in self.stored and self.uses[name] == 1:
            replace(self.stored[name], values)
            self._arrays.pop(name, None)
            return name
        self.uses[name] -= 1
        self.model.ir_version = max(self.model.ir_version, _FREE_IR)
        name = self.names.fresh(stem or f"{node.output[0]}_{index}")
        tensor = self.model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
        self.stored[name] = tensor
        self.element_types[name] = tensor.data_type
        self.uses[name] = 1
        node.input[index] = name
        return name

    def can_absorb(self, name: str) -> bool:
        """Whether a constant may be added to a weight, in place or in a new initializer."""
        return self.may_add or (name in self.initializers and self.uses[name] == 1)

    def set_numbers(self, node: NodeProto, name: str, index: int, values: list[int]) -> None:
        """Replaces a node's list, as an attribute or an input: see `whole_numbers`."""
        if attribute(node, name) is not None:
            set_attribute(node, name, values)
        elif values != self.whole_numbers(node, name, index):
            self.write(node, index, numbers(values))


def label(node: NodeProto) -> str:
    """A node as messages name it."""
    return f"{node.op_type} {node.output[0]!r}" if node.output else node.op_type


def product(extents: Sequence[int | None]) -> int | None:
    """The product, None where an extent is unknown."""
    result = 1
    for extent in extents:
        if extent is None:
            return None
        result *= extent
    return result


def followed(count: int) -> int:
    """A number of channels, which a damaged file may state as it likes.

    Raises:
        Opaque: it is too large.
    """
    if count > _MOST_CHANNELS:
        raise Opaque(f"of {count:,} channels, more than are followed")
    return count


def unknown(count: int) -> NDArray[np.float64]:
    """[count] NaN: constants of channels none of which is constant."""
    return np.full(count, np.nan)


def finite(values: Array, like: Array) -> NDArray[np.float64]:
    """Constants rounded to the dtype of `like`; NaN, for unknown, where that is not finite."""
    rounded = values.astype(like.dtype).astype(np.float64)
    return np.where(np.isfinite(rounded), rounded, np.nan)


def numbers(values: ArrayLike) -> Array:
    """An int64 array, as shapes and indices are stored."""
    return np.asarray(values, np.int64)
