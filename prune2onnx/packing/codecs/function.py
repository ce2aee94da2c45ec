"""Writes the body of a model-local function, node by node, in few bytes.

In a small file every byte counts, so internal names are single letters, constants are stored as
varints, and there are no names or doc strings that decoding does not need. Constants of a function
that is called once are initializers which the call passes in: half the bytes of a node.

Knows ONNX, but no codec.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from prune2onnx.graph.domain import DOMAIN, DOMAIN_VERSION
from prune2onnx.graph.protobuf import tensor


def varints(values: Sequence[int], shape: tuple[int, ...], element_type: int) -> TensorProto:
    """An int32 or int64 tensor in its varint form, shorter than raw bytes for small values."""
    if element_type == TensorProto.INT64:
        return TensorProto(name="", dims=shape, data_type=element_type, int64_data=values)
    return TensorProto(name="", dims=shape, data_type=element_type, int32_data=values)


class Body:
    """A function under construction: every method adds a node and returns its output's name.

    Args:
        op: the function's name.
        inputs: how many inputs it takes; they are named a, b, c, ... `give` adds more.
        attributes: names of its attributes, one letter each.
        once: whether it is called once. Its constants are then inputs, too.

    Attributes:
        given: the tensors that its only call passes in, for the inputs that `give` added.
    """

    def __init__(
        self, op: str, inputs: int = 0, attributes: str = "", *, once: bool = False
    ) -> None:
        self.given: list[TensorProto] = []
        self._once = once
        self._proto = FunctionProto(name=op, domain=DOMAIN, attribute=list(attributes))
        # Functions that are called more than once keep the names of earlier versions:
        # `evaluator` recognizes them by their bytes.
        self._names = _short_names(string.ascii_letters + string.digits * once)
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

    def give(self, stored: TensorProto) -> str:
        """Adds an input that holds this tensor."""
        self.given.append(stored)
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

    def copy(self, value: str, element_type: int) -> str:
        """The same value by an operator that copies, in the fewest bytes for this element type."""
        if element_type == TensorProto.FLOAT:
            return self.node("Max", value)
        return self.node("Concat", value, axis=0)

    def split(self, vector: str, *sizes: int) -> list[str]:
        """Names of the parts of a vector; that of an empty part is ""."""
        present = [size for size in sizes if size]
        parts = [vector]
        if len(present) > 1:
            parts = self.nodes("Split", vector, self.indices(*present), outputs=len(present))
        names = iter(parts)
        return [next(names) if size else "" for size in sizes]

    def rename(self, old: str, new: str) -> None:
        """Gives a value another name, wherever it occurs."""
        for node in self._proto.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new

    def move_to_front(self, count: int) -> None:
        """Puts the nodes after the first `count` before them."""
        nodes = list(self._proto.node)
        del self._proto.node[:]
        self._proto.node.extend(nodes[count:] + nodes[:count])

    def __len__(self) -> int:
        """Number of nodes so far."""
        return len(self._proto.node)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output."""
        return self.nodes(op, *inputs, **attributes)[0]

    def constant(
        self,
        values: int | Sequence[int],
        shape: tuple[int, ...] | None = None,
        element_type: int = TensorProto.INT32,
    ) -> str:
        """Adds a constant, int32 or int64: a scalar, a vector, or `values` in `shape`."""
        flat = [values] if isinstance(values, int) else list(values)
        shape = shape or (() if isinstance(values, int) else (len(flat),))
        key = (*flat, shape, element_type)
        if key not in self._constants:
            stored = varints(flat, shape, element_type)
            if self._once:
                name = self.give(stored)
            elif element_type == TensorProto.INT64 and len(shape) == 1 and len(flat) < 5:
                name = self.node("Constant", value_ints=flat)  # a tensor is longer
            else:
                stored.ClearField("name")
                name = self.node("Constant", value=stored)
            self._constants[key] = name
        return self._constants[key]

    def indices(self, *values: int) -> str:
        """Adds a constant int64 vector: shapes, axes and slice bounds have to be int64."""
        return self.constant(values, element_type=TensorProto.INT64)

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
        # Constants first: one that is used twice may have been added after its first use.
        nodes = sorted(self._proto.node, key=lambda node: node.op_type != "Constant")
        del self._proto.node[:]
        self._proto.node.extend(nodes)
        self._proto.opset_import.add(version=opset)
        if self._calls:
            self._proto.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
        return self._proto


def zeros_of(body: Body, shape: Sequence[int], element_type: int) -> str:
    """Adds a constant of zeros."""
    value: dict[str, Any] = {}
    if element_type != TensorProto.FLOAT:
        kind = helper.tensor_dtype_to_np_dtype(element_type)
        value["value"] = tensor("", np.zeros(1, kind), element_type)
    return body.node("ConstantOfShape", body.indices(*shape), **value)


def _short_names(letters: str) -> Iterator[str]:
    """a, b, ..., aa, ab, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(letters, repeat=length))
