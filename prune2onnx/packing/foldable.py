"""Operators of a decoder in other words: those that engines besides onnxruntime fold, too.

OpenVINO computes neither CumSum nor GatherElements nor BitShift nor a scatter of bytes while it
compiles a model, nor what depends on them, and its int32 arithmetic at run time is not exact above
2^24. So a decoder with them would stay in the compiled model, and might give other weights. What
stands here in their place it does compute meanwhile, and exactly:

1. GatherElements from a vector: Gather.
2. CumSum: MatMul with a triangle of ones, in blocks, and the same for the sums of blocks. A running
   count, which is the sum of ones: Range.
3. BitShift: Div, or Mul and Mod, in int32.
4. ConstantOfShape, which tract takes to be float64: Expand. Max of a single operand, which some
   converters lack: Concat.
5. ScatterElements and ScatterND of bytes: the same in int32.

Each becomes a call of a function, which `inline.expanded` writes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, NodeProto, TensorProto, helper

from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.walk import attribute
from prune2onnx.packing.codecs.function import Body

_BLOCK = 32
"""Elements of a block: more would take more products, fewer more nodes."""

_I32 = TensorProto.INT32


@dataclass(frozen=True)
class Values:
    """What is known about the values of a decoder.

    Attributes:
        shapes: name -> its extents.
        types: name -> ONNX's number of its element type.
        constants: name -> its array, of small constants.
    """

    shapes: Mapping[str, Sequence[int]]
    types: Mapping[str, int]
    constants: Mapping[str, NDArray[Any]]


@dataclass
class Rewriter:
    """Replaces the operators above by calls.

    Args:
        values: of the decoder.
        opset: of the model.

    """

    values: Values
    opset: int
    _known: dict[bytes, FunctionProto] = field(default_factory=dict)

    @property
    def functions(self) -> list[FunctionProto]:
        """Those that are called."""
        return list(self._known.values())

    def rewrite(self, nodes: Sequence[NodeProto]) -> list[NodeProto]:
        """The nodes of a decoder; those that need it are replaced, the others are the same."""
        made = {name: node for node in nodes for name in node.output}
        same: dict[str, str] = {}  # the results of shifts by 0
        result = []
        for given in nodes:
            node = given
            if same.keys() & set(node.input):
                node = NodeProto()
                node.CopyFrom(given)
                node.input[:] = [same.get(name, name) for name in given.input]
            if node.op_type == "GatherElements":
                node = self._gathered(node)
            elif node.op_type == "CumSum":
                node = self._summed(node, made.get(given.input[0]))
            elif node.op_type == "BitShift":
                if not self.values.constants[node.input[1]].any():
                    same[node.output[0]] = node.input[0]
                    continue
                node = self._shifted(node)
            elif node.op_type == "ConstantOfShape":
                node = self._filled(node)
            elif node.op_type == "Max":
                node = helper.make_node("Concat", node.input, node.output, axis=0)
            elif node.op_type in ("ScatterElements", "ScatterND"):
                node = self._scattered(node)
            result.append(node)
        return result

    def _call(self, function: FunctionProto, node: NodeProto) -> NodeProto:
        """A call in place of a node, with its first input."""
        key = function.SerializeToString()
        if key not in self._known:
            function.name = f"v{len(self._known)}"
            self._known[key] = function
        function = self._known[key]
        count = len(function.input)
        return helper.make_node(function.name, node.input[:count], node.output, domain=DOMAIN)

    def _gathered(self, node: NodeProto) -> NodeProto:
        data, index = node.input
        if len(self.values.shapes[data]) == 1:
            return helper.make_node("Gather", [data, index], node.output)
        body = Body("", 2)  # both are columns: only the first extent is not 1
        flat = body.node("Reshape", body.inputs[0], body.indices(-1))
        found = body.node("Gather", flat, body.inputs[1])
        return self._call(body.function(found, opset=self.opset), node)

    def _summed(self, node: NodeProto, source: NodeProto | None) -> NodeProto:
        shape = list(self.values.shapes[node.input[0]])
        axis = int(self.values.constants[node.input[1]].item()) % len(shape)
        exclusive, reverse = (attribute(node, name, 0) for name in ("exclusive", "reverse"))
        size, number = shape[axis], self.values.types[node.input[0]]
        rows = int(np.prod(shape)) // size  # the axis is the last one that is longer than 1
        body = Body("", 1)
        if self._is_ones(source) and number == _I32 and not exclusive and rows == 1:
            body = Body("", 0)
            bounds = (0, size, 1) if reverse else (1, size + 1, 1)  # tract counts none downwards
            total = body.node("Range", *(body.constant(bound) for bound in bounds))
            total = body.node("Sub", body.constant(size), total) if reverse else total
        else:
            flat = body.node("Reshape", body.inputs[0], body.indices(rows, size))
            total = _sums(body, flat, rows, size, number)
            if reverse:
                whole = body.node("Gather", total, body.indices(size - 1), axis=1)
                total = body.node("Sub", whole, total)
                total = total if exclusive else body.node("Add", total, flat)
            elif exclusive:
                total = body.node("Sub", total, flat)
        if shape != [size] or body.inputs:
            total = body.node("Reshape", total, body.indices(*shape))
        return self._call(body.function(total, opset=self.opset), node)

    def _is_ones(self, node: NodeProto | None) -> bool:
        """Whether a node gives nothing but ones: a Clip between 1 and 1."""
        if node is None or node.op_type != "Clip" or node.input[1] != node.input[2]:
            return False
        return bool((self.values.constants[node.input[1]] == 1).all())

    def _shifted(self, node: NodeProto) -> NodeProto:
        by = self.values.constants[node.input[1]]
        factor = (1 << by.astype(np.int64)).reshape(-1).tolist()
        body = Body("", 1)
        wide = body.node("Cast", body.inputs[0], to=_I32)
        factors = body.constant(factor, by.shape or (1,))
        if attribute(node, "direction") == "RIGHT":
            wide = body.node("Div", wide, factors)
        else:
            wide = body.node("Mod", body.node("Mul", wide, factors), body.constant(256))
        return self._call(
            body.function(body.node("Cast", wide, to=TensorProto.UINT8), opset=self.opset), node
        )

    def _filled(self, node: NodeProto) -> NodeProto:
        fill = attribute(node, "value", helper.make_tensor("", TensorProto.FLOAT, [1], [0.0]))
        body = Body("", 1)
        value = body.node("Constant", value=fill)
        filled = body.node("Expand", value, body.inputs[0])
        return self._call(body.function(filled, opset=self.opset), node)

    def _scattered(self, node: NodeProto) -> NodeProto:
        number = self.values.types[node.input[0]]
        if number not in (TensorProto.INT8, TensorProto.UINT8):
            return node
        body = Body("", 3)
        data, places, updates = body.inputs
        data, updates = (body.node("Cast", one, to=_I32) for one in (data, updates))
        wide = body.node(node.op_type, data, places, updates)
        return self._call(body.function(body.node("Cast", wide, to=number), opset=self.opset), node)


def _sums(body: Body, matrix: str, rows: int, size: int, number: int) -> str:
    """The running sums of each row of a matrix [rows, size]."""
    length = min(size, _BLOCK)
    column = body.constant(list(range(length)), (length, 1))
    row = body.constant(list(range(1, length + 1)))
    triangle = body.node("Cast", body.node("Less", column, row), to=number)
    if size == length:
        return body.node("MatMul", matrix, triangle)
    blocks = -(-size // _BLOCK)
    filling = blocks * _BLOCK - size
    if filling:
        zeros = body.node("Expand", body.constant(0, (1, 1), number), body.indices(rows, filling))
        matrix = body.node("Concat", matrix, zeros, axis=1)
    inside = body.node("Reshape", matrix, body.indices(rows * blocks, _BLOCK))
    inside = body.node("MatMul", inside, triangle)
    last = body.node("Gather", inside, body.indices(_BLOCK - 1), axis=1)
    last = body.node("Reshape", last, body.indices(rows, blocks))
    before = body.node("Sub", _sums(body, last, rows, blocks, number), last)
    before = body.node("Reshape", before, body.indices(rows * blocks, 1))
    whole = body.node("Reshape", body.node("Add", inside, before), body.indices(rows, -1))
    if filling:
        whole = body.node("Slice", whole, body.indices(0, 0), body.indices(rows, size))
    return whole


def without_detours(nodes: Sequence[NodeProto], types: Mapping[str, int]) -> list[NodeProto]:
    """Nodes without a Cast from int32 to bytes and back: the bytes of decoders are never cut off.

    Args:
        nodes: of a decoder in which operators are replaced.
        types: element types of its values before, by name.
    """
    source: dict[str, str] = {}
    same: dict[str, str] = {}
    result = []
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Cast":
            to = attribute(node, "to")
            if to == TensorProto.UINT8 and types.get(node.input[0], _I32) == _I32:
                source[node.output[0]] = node.input[0]
            elif to == _I32 and node.input[0] in source:
                same[node.output[0]] = source[node.input[0]]
                continue
        result.append(node)
    return result
