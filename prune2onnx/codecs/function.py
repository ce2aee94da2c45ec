"""Writes the body of a model-local function, node by node, in few bytes.

A small network counts every byte, so internal names are single letters, 32-bit constants are
stored as varints and nothing carries a name or a doc string that the decoding does not need.
Knows ONNX, knows nothing of codecs.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, TensorProto, helper

DOMAIN = "prune2onnx"
DOMAIN_VERSION = 2


def int32_constant(values: Sequence[int], shape: tuple[int, ...]) -> TensorProto:
    """An int32 tensor in its varint form, which is shorter than raw bytes for small values."""
    return TensorProto(dims=shape, data_type=TensorProto.INT32, int32_data=values)


class Body:
    """A function under construction: every method adds a node and returns its output's name.

    Args:
        op: the function's name.
        inputs: how many inputs it takes; they are called a, b, c, ... More come with `input`.
        attributes: names of its attributes, one letter each.
    """

    def __init__(self, op: str, inputs: int = 0, attributes: str = "") -> None:
        self._proto = FunctionProto(name=op, domain=DOMAIN, attribute=list(attributes))
        self._names = _short_names()
        self._constants: dict[tuple[object, ...], str] = {}
        self._proto.input.extend(self.fresh() for _ in range(inputs))
        self._calls = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(self._proto.input)

    def fresh(self) -> str:
        """A name that is used nowhere yet."""
        return next(self._names)

    def input(self) -> str:
        """Adds an input."""
        self._proto.input.append(self.fresh())
        return self._proto.input[-1]

    def nodes(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Adds a node with several outputs."""
        names = [self.fresh() for _ in range(outputs)]
        self.named(op, inputs, names, **attributes)
        return names

    def named(
        self, op: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any
    ) -> None:
        """Adds a node whose outputs have these names."""
        self._proto.node.append(helper.make_node(op, inputs, names, **attributes))

    def move_to_front(self, count: int) -> None:
        """Puts the nodes after the first `count` before them."""
        nodes = list(self._proto.node)
        del self._proto.node[:]
        self._proto.node.extend(nodes[count:] + nodes[:count])

    def __len__(self) -> int:
        """The number of nodes so far."""
        return len(self._proto.node)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output."""
        return self.nodes(op, *inputs, **attributes)[0]

    def constant(self, values: int | Sequence[int], shape: tuple[int, ...] | None = None) -> str:
        """Adds an int32 constant: a scalar, a vector, or `values` in `shape`."""
        flat = [values] if isinstance(values, int) else list(values)
        shape = shape or (() if isinstance(values, int) else (len(flat),))
        key = (*flat, shape)
        if key not in self._constants:
            self._constants[key] = self.node("Constant", value=int32_constant(flat, shape))
        return self._constants[key]

    def indices(self, *values: int) -> str:
        """Adds a constant int64 vector: shapes, axes and slice bounds have to be int64."""
        if values not in self._constants:
            if len(values) < 5:
                name = self.node("Constant", value_ints=values)
            else:  # a tensor packs its integers, which from five on is shorter
                packed = TensorProto(
                    dims=[len(values)], data_type=TensorProto.INT64, int64_data=values
                )
                name = self.node("Constant", value=packed)
            self._constants[values] = name
        return self._constants[values]

    def call(self, op: str, *inputs: str, outputs: int = 1) -> list[str]:
        """Calls another function of this domain."""
        self._calls = True
        return self.nodes(op, *inputs, outputs=outputs, domain=DOMAIN)

    def function(self, *outputs: str, opset: int) -> FunctionProto:
        """Ends the body.

        The function imports the operators of the model it is written into (`opset`): onnxruntime
        inlines the nodes into that model's graph and reads them by that version.
        """
        self._proto.output.extend(outputs)
        # Constants first: one that is used twice may have been asked for late.
        nodes = sorted(self._proto.node, key=lambda node: node.op_type != "Constant")
        del self._proto.node[:]
        self._proto.node.extend(nodes)
        self._proto.opset_import.add(version=opset)
        if self._calls:
            self._proto.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
        return self._proto


def _short_names() -> Iterator[str]:
    """a, b, ..., Z, aa, ab, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters, repeat=length))


def tensor(name: str, array: NDArray[Any], data_type: int) -> TensorProto:
    """An initializer in raw little-endian form; `data_type` is ONNX's."""
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":  # pragma: no cover - big-endian input only
        array = array.byteswap()
    return TensorProto(name=name, dims=array.shape, data_type=data_type, raw_data=array.tobytes())


def framed(nbytes: int, tag: int = 1) -> int:
    """Bytes of a message inside another: its field's tag, its length as a varint, itself."""
    return tag + max(1, -(-nbytes.bit_length() // 7)) + nbytes
