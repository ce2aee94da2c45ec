"""Where the channels of a graph run: which live and die together, what they hold, who sums them.

Every channel of every value has a number. Rules (`rules` has the table) walk the nodes and say of
each number: that it is one with another, that it must stay, along which axis of a weight it
lies, which sum reads it. What follows from that is `fate`'s business, and the graph is changed by
`cut`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from prune2onnx.graphs import Names, is_constant, keep, nodes_in, opset, used_in, without_weights
from prune2onnx.graphs import bodies as bodies_of
from prune2onnx.tensors import array_of

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
"""Element types in which channels are followed."""

_FREE_IR = 4  # the first IR version in which an initializer need not be an input of the graph

Ids = NDArray[np.int64]
Array = NDArray[Any]
Kept = Callable[[Ids], NDArray[np.bool_]]
"""Which of some channels stay."""

Extent = int | Ids | None
"""An element of a computed shape: a number, as many as these channels, or independent of any."""


class Opaque(Exception):  # noqa: N818 - no error: the node is taken as one that reads everything
    """Why a node's channels cannot be followed; reads on after "read by Softmax 'y'"."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one value.

    Attributes:
        axis: where they lie, from 0.
        ids: [extent] their numbers; equal ones are one channel.
        constants: [extent] float64, what each holds at every place for every input of the graph;
            NaN where that is not known.
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
        groups: into which the first two axes fall apart, as in Conv.
        zeroed: whether zeros may stand for dead channels.
    """

    name: str
    axes: dict[int, Ids]
    groups: int = 1
    zeroed: bool = False


@dataclass(frozen=True, eq=False)
class Bias:
    """Where constants can be added to each output channel of a sum.

    Attributes:
        node: whose input it is.
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
        needs: bool [rows, columns], which columns a row cannot do without.
        known: columns whose constant the bias can take, each not zero.
        amounts: float64 [rows, known], what it then adds to each row.
        bias: that takes it; None where there is nothing to take.
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
    """A weight and the channels that it makes.

    Attributes:
        node: that reads the weight.
        weight: its name.
        channels: what comes out.
        inputs: channels that each row sums over; None where they are not followed, or each row has
            one of its own.
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
        may_add: whether a new initializer may take a constant where there is no bias.
    """

    model: ModelProto
    may_add: bool
    count: int = 0
    channels: dict[str, Channels] = field(default_factory=dict)
    extents: dict[str, list[Extent]] = field(default_factory=dict)
    same: list[tuple[Ids, Ids]] = field(default_factory=list)
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
        self.names = Names(self.model)
        self.opset = opset(self.model.opset_import) or 0
        self.uses = Counter(value.name for value in graph.output)
        self.readers: dict[str, list[NodeProto]] = {}
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
        try:
            known = onnx.shape_inference.infer_shapes(without_weights(self.model), data_prop=True)
        except Exception:  # of several kinds; what is not known is not followed
            known = self.model
        self._shapes: dict[str, tuple[int | None, ...]] = {}
        self._symbols: dict[str, tuple[int | str, ...]] = {}
        self.kinds: dict[str, int] = {}
        for value in (*known.graph.input, *known.graph.output, *known.graph.value_info):
            declared = value.type.tensor_type
            self.kinds[value.name] = declared.elem_type
            if declared.HasField("shape"):
                dims = declared.shape.dim
                self._shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else None for dim in dims
                )
                self._symbols[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims
                )
        for name, tensor in self.stored.items():
            self.kinds[name] = tensor.data_type
            self._shapes[name] = tuple(tensor.dims)

    def shape(self, name: str) -> tuple[int | None, ...]:
        """Extents, None where they depend on the input of the graph.

        Raises:
            Opaque: not even the rank is known.
        """
        if name not in self._shapes:
            raise Opaque(f"as {name!r}, whose shape is not known")
        return self._shapes[name]

    def alike(self, one: str, other: str) -> bool:
        """Whether two computed values surely have one type and shape, whatever the input is."""
        shape = self._symbols.get(one)
        if shape is None or "" in shape or shape != self._symbols.get(other):
            return False
        return self.kinds[one] == self.kinds[other]

    def array(self, name: str) -> Array | None:
        """The values of an initializer or Constant; None for anything else."""
        return self.values(name) if name in self.stored else None

    def values(self, name: str) -> Array:
        """The values of what is known to be an initializer or Constant."""
        if name not in self._arrays:
            self._arrays[name] = array_of(self.stored[name])
        return self._arrays[name]

    def weight(self, name: str) -> Array:
        """The values of an initializer or Constant.

        Raises:
            Opaque: it is none, or of a type that is not followed.
        """
        array = self.array(name)
        seen = self.may_add or name in self.initializers
        if array is None or self.kinds[name] not in FLOATS or not seen:
            raise Opaque("with a weight that is computed, quantised, or given as an input")
        return array

    def whole_numbers(self, node: NodeProto, name: str, index: int) -> list[int] | None:
        """A list that is an attribute in old operator sets and an input in new; None for none.

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
        """Numbers of new channels."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def unite(self, one: Ids, other: Ids) -> None:
        """These channels live and die together, pair by pair."""
        self.same.append((one, other))

    def pin(self, ids: Iterable[int], reason: str) -> None:
        """These channels must stay."""
        for number in ids:
            self.pinned.setdefault(int(number), reason)

    def pin_all(self, name: str, reason: str) -> None:
        """All channels of a value, and those whose number it tells, must stay."""
        if name in self.channels:
            self.pin(self.channels[name].ids, reason)
        for extent in self.extents.get(name, ()):
            if isinstance(extent, np.ndarray):
                self.pin(extent, reason)

    def note(self, ids: Iterable[int], reason: str) -> None:
        """Why a constant is not sent on, in case that it matters."""
        for number in ids:
            self.notes.setdefault(int(number), reason)

    def seal(self, node: NodeProto, why: str) -> None:
        """The node may read all of all its inputs, and what it makes is not followed."""
        reason = f"read by {label(node)} {why}".rstrip()
        for name in used_in([node]):
            self.pin_all(name, reason)
        for name in node.output:
            self.channels.pop(name, None)

    def write(self, node: NodeProto, index: int, values: Array, stem: str = "") -> str:
        """Gives a node other values for an input; other nodes keep what they read.

        Returns:
            The name of the input; if it has to be a new one, `stem` or one like it.
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
        self.kinds[name] = tensor.data_type
        self.uses[name] = 1
        node.input[index] = name
        return name

    def takes(self, name: str) -> bool:
        """Whether a weight may take a constant: in place, or as a new initializer."""
        return self.may_add or (name in self.initializers and self.uses[name] == 1)

    def set_numbers(self, node: NodeProto, name: str, index: int, values: list[int]) -> None:
        """Gives a node another list, where it has the old: see `whole_numbers`."""
        if attribute(node, name) is not None:
            set_attribute(node, name, values)
        elif values != self.whole_numbers(node, name, index):
            self.write(node, index, numbers(values))


def replace(tensor: TensorProto, values: Array) -> None:
    """Other values for a tensor, in its type; name and notes stay."""
    new = numpy_helper.from_array(np.ascontiguousarray(values))
    for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(name)
    tensor.raw_data = new.raw_data
    tensor.dims[:] = new.dims


def label(node: NodeProto) -> str:
    """A node, for a reader."""
    return f"{node.op_type} {node.output[0]!r}" if node.output else node.op_type


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    for one in node.attribute:
        if one.name == name:
            value = helper.get_attribute_value(one)
            return value.decode() if isinstance(value, bytes) else value
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Sets an attribute; None takes it away."""
    keep(node.attribute, lambda one: one.name != name)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def product(extents: Sequence[int | None]) -> int | None:
    """The product, None where an extent is not known."""
    result = 1
    for extent in extents:
        if extent is None:
            return None
        result *= extent
    return result


def unknown(count: int) -> NDArray[np.float64]:
    """Constants of channels of which none is known."""
    return np.full(count, np.nan)


def finite(values: Array, kind: Array) -> NDArray[np.float64]:
    """Constants as they are in the type of `kind`; not known where they are not finite there."""
    rounded = values.astype(kind.dtype).astype(np.float64)
    return np.where(np.isfinite(rounded), rounded, np.nan)


def numbers(values: ArrayLike) -> Array:
    """An int64 array, as shapes and indices are stored."""
    return np.asarray(values, np.int64)
