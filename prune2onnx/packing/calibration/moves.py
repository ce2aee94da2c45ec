"""From an initializer to the nodes that multiply it: where its elements go on the way.

Operators move elements (Transpose, Reshape, Slice, Concat), change their type (Cast), or scale
integers (DequantizeLinear, Mul). A weight can be calibrated where each reader sees all elements,
each once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from prune2onnx.graph.tensors import array_of
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute
from prune2onnx.packing.approximation.candidates import Weight
from prune2onnx.packing.readers import Key, Reader, Readers

_PLAIN = ("Cast", "Identity", "Transpose")
_MOVING = ("Concat", "Flatten", "Reshape", "Slice", "Squeeze", "Unsqueeze")
_SCALING = ("DequantizeLinear", "Mul", "Sub")  # Sub: of a zero point, which the role knows


@dataclass(frozen=True, eq=False)
class Seen:
    """What a reader sees of an initializer.

    Attributes:
        order: place in the initializer of each element; None where they are all in place, or behind
            transposes alone, which the layout of its role knows.
        scale: of integers, what they are multiplied with: broadcastable to the initializer.
    """

    order: NDArray[np.int64] | None
    scale: NDArray[np.float64] | None

    def same(self, other: Seen | None) -> bool:
        """Whether another reader sees the same."""
        return other is not None and all(
            (mine is None) == (its is None)
            and (mine is None or its is None or np.array_equal(mine, its))
            for mine, its in ((self.order, other.order), (self.scale, other.scale))
        )


class _Unknown(Exception):  # noqa: N818 - no error: such a weight is rounded without examples
    """Elements cannot be followed."""


class Moves:
    """The ways from one initializer to its readers.

    Args:
        readers: of the model.
        name: of the initializer.
        weight: the same.
    """

    def __init__(self, readers: Readers, name: str, weight: Weight) -> None:
        self._readers, self._weight = readers, weight
        self._start: Key = ((), name)
        self._orders: dict[Key, NDArray[np.int64]] = {}

    def ends(self) -> list[Reader]:
        """The nodes that multiply it, or do what is not known; none where it cannot be followed."""
        found: list[Reader] = []
        waiting, known = [self._start], {self._start}
        while waiting:
            key = waiting.pop()
            if key in self._readers.taken:
                return []
            for reader in self._readers.of[key]:
                if not self._carries(reader):
                    found.append(reader)
                    continue
                made = reader.path, reader.node.output[0]
                if made not in known:
                    known.add(made)
                    waiting.append(made)
        return sorted(found, key=lambda reader: reader.number)

    def _carries(self, reader: Reader) -> bool:
        """Whether a node hands elements on, and does nothing else with them."""
        node = reader.node
        if node.domain not in DEFAULT_DOMAINS:
            return False
        if node.op_type == "Concat":
            return True
        if node.op_type in _SCALING and self._weight.role.zero_point is not None:
            scale = node.input[1] if reader.index == 0 else node.input[0]
            return reader.key(scale) in self._readers.stored
        return node.op_type in (*_PLAIN, *_MOVING) and reader.index == 0

    def seen(self, end: Reader) -> Seen | None:
        """What a node sees as the input that it was found by; None where that is not known."""
        key = end.key(end.node.input[end.index])
        try:
            way = self._straight(key)
            if way is not None:
                return Seen(None, self._scale(way))
            order = self._order(key)
        except (_Unknown, IndexError, ValueError):  # the latter where shapes do not fit
            return None
        size = self._weight.array.size
        if order.size != size or (np.bincount(order.reshape(-1), minlength=size) != 1).any():
            return None
        return Seen(order, None)

    def _straight(self, key: Key) -> list[tuple[NodeProto, Key]] | None:
        """The nodes on the way, the first one first, and what each may scale with.

        None where one of them moves elements.
        """
        way: list[tuple[NodeProto, Key]] = []
        while key != self._start:
            maker = self._readers.makers.get(key)
            if maker is None or maker.node.op_type in _MOVING:
                return None
            keys = [maker.key(name) for name in maker.node.input[:2]]
            data = [one for one in keys if one == self._start or one not in self._readers.stored]
            if len(data) != 1:
                return None
            other = [one for one in keys if one not in data]
            way.append((maker.node, other[0] if other else data[0]))
            key = data[0]
        return way[::-1]

    def _scale(self, way: list[tuple[NodeProto, Key]]) -> NDArray[np.float64] | None:
        """The product of all scales, in the axes of the initializer."""
        if self._weight.role.zero_point is None:
            return None
        shape = self._weight.array.shape
        product = np.ones((1,) * len(shape))
        turned = False
        for node, other in way:
            turned |= node.op_type == "Transpose"
            if node.op_type not in ("DequantizeLinear", "Mul"):
                continue
            scale = array_of(self._readers.stored[other]).astype(np.float64)
            if node.op_type == "DequantizeLinear" and scale.ndim == 1 and scale.size > 1:
                along = [1] * len(shape)
                along[attribute(node, "axis", 1) % len(shape)] = scale.size
                scale = scale.reshape(along)
            if scale.size > 1 and (turned or scale.ndim > len(shape)):
                raise _Unknown
            scale = scale.reshape((1,) * max(0, len(shape) - scale.ndim) + scale.shape)
            if scale.size > 1 and any(
                extent not in (1, whole) for extent, whole in zip(scale.shape, shape, strict=True)
            ):
                raise _Unknown  # scales of blocks
            product = product * (scale if scale.size > 1 else scale.reshape(-1)[0])
        return product

    def _order(self, key: Key) -> NDArray[np.int64]:
        if key not in self._orders:
            self._orders[key] = self._made(key)
        return self._orders[key]

    def _made(self, key: Key) -> NDArray[np.int64]:
        if key == self._start:
            return np.arange(self._weight.array.size).reshape(self._weight.array.shape)
        maker = self._readers.makers.get(key)
        if maker is None or maker.node.domain not in DEFAULT_DOMAINS:
            raise _Unknown
        node = maker.node
        if node.op_type == "Concat":
            parts = [self._order(maker.key(name)) for name in node.input]
            return np.concatenate(parts, attribute(node, "axis", 0))
        if node.op_type not in _MOVED:
            raise _Unknown
        first = self._order(maker.key(node.input[0]))

        def numbers(index: int) -> list[int] | None:
            if len(node.input) <= index or not node.input[index]:
                return None
            tensor = self._readers.stored.get(maker.key(node.input[index]))
            if tensor is None:
                raise _Unknown
            return [int(n) for n in array_of(tensor).reshape(-1)]

        return _MOVED[node.op_type](node, first, numbers)


_Numbers = Callable[[int], list[int] | None]


def _reshaped(node: NodeProto, x: NDArray[Any], numbers: _Numbers) -> NDArray[Any]:
    shape = numbers(1) or []
    if not attribute(node, "allowzero", 0):
        shape = [x.shape[at] if not n and at < x.ndim else n for at, n in enumerate(shape)]
    return x.reshape(shape)


def _sliced(node: NodeProto, x: NDArray[Any], numbers: _Numbers) -> NDArray[Any]:
    starts, ends = numbers(1) or [], numbers(2) or []
    axes, steps = numbers(3), numbers(4)
    where = [slice(None)] * x.ndim
    for at, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = 1 if steps is None else steps[at]
        if step < 0:
            raise _Unknown
        axis = at if axes is None else axes[at]
        where[axis] = slice(start, end, step)
    return x[tuple(where)]


def _unsqueezed(node: NodeProto, x: NDArray[Any], numbers: _Numbers) -> NDArray[Any]:
    return np.expand_dims(x, tuple(numbers(1) or []))


def _squeezed(node: NodeProto, x: NDArray[Any], numbers: _Numbers) -> NDArray[Any]:
    axes = numbers(1)
    return np.squeeze(x, None if axes is None else tuple(axes))


def _flattened(node: NodeProto, x: NDArray[Any], numbers: _Numbers) -> NDArray[Any]:
    axis = attribute(node, "axis", 1)
    rows = math.prod(x.shape[: axis + x.ndim if axis < 0 else axis])
    return x.reshape(rows, -1)


_MOVED: dict[str, Callable[[NodeProto, NDArray[Any], _Numbers], NDArray[Any]]] = {
    "Cast": lambda node, x, numbers: x,
    "Flatten": _flattened,
    "Identity": lambda node, x, numbers: x,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Squeeze": _squeezed,
    "Transpose": lambda node, x, numbers: x.transpose(attribute(node, "perm", None)),
    "Unsqueeze": _unsqueezed,
}
