"""What each initializer is to the nodes that read it: which of its elements meet in one sum.

A loss of precision may be judged only where it is known what a tensor does. Reads the graph; what
is done to a weight of which role is `lossy`'s business.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from prune2onnx.graphs import DEFAULT_DOMAINS, bodies, nodes_in

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_BYTES = (TensorProto.INT8, TensorProto.UINT8)

# operator -> inputs that are added to a result, and inputs that multiply or divide one
_ADDED: dict[str, tuple[int, ...]] = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "LSTM": (3,),
    "GRU": (3,),
    "RNN": (3,),
    "BatchNormalization": (2, 3),
    "InstanceNormalization": (2,),
    "LayerNormalization": (2,),
    "GroupNormalization": (2,),
}
_FACTORS: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 4),
    "InstanceNormalization": (1,),
    "LayerNormalization": (1,),
    "GroupNormalization": (1,),
}
# integer weights of operators that compute in integers: operator -> (weight, its zero point)
_INTEGER: dict[str, tuple[int, int]] = {
    "QLinearConv": (3, 5),
    "QLinearMatMul": (3, 5),
    "ConvInteger": (1, 3),
    "MatMulInteger": (1, 3),
}
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layout:
    """Which elements of a weight meet in one sum.

    A linear layer's output is sum_j w[r, j] x[j]: row r is one output channel, j runs over what is
    added up.

    Attributes:
        rows: axes of the weight that count outputs.
        inner: axes that are added up and count input channels.
        kernel: axes that are added up and count neighbouring places of one input channel.
        groups: groups into which the first of `inner` falls apart; each is summed by itself.
        summed: False where rows are looked up instead.
    """

    rows: tuple[int, ...]
    inner: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    groups: int = 1
    summed: bool = True


@dataclass(frozen=True, eq=False)
class Role:
    """What an initializer does.

    Attributes:
        kind: "weight" (factor of sums), "bias" (added), "factor" (multiplies or divides a
            channel), "integer" (a weight in int8 or uint8) or "" (left alone).
        reason: why it is left alone; "" otherwise.
        layout: of a weight; None where its readers disagree or nothing is added up.
        zero_point: of an integer weight, broadcastable to it.
    """

    kind: str
    reason: str = ""
    layout: Layout | None = None
    zero_point: NDArray[np.int64] | None = None


def roles(model: ModelProto) -> dict[str, Role]:
    """The role of every initializer of the main graph, in its order.

    A weight is a floating tensor of two or more axes which every node that reads it multiplies
    into sums or looks rows up in: Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU, RNN, Gather,
    also behind Identity, Transpose, Reshape, Cast and their like. An integer weight is the same
    behind DequantizeLinear, or read by an operator that computes in integers.

    Args:
        model: unpacked, external data loaded; weights in subgraphs and Constant nodes are not
            seen (`intake` moves them).
    """
    reader = _Reader(model)
    return {tensor.name: reader.role(tensor) for tensor in model.graph.initializer}


def _left(reason: str) -> Role:
    return Role("", reason)


class _Reader:
    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._inputs = {value.name for value in graph.input}
        self._outputs = {value.name for value in graph.output}
        self._readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        self._makers: dict[str, NodeProto] = {}
        for node in nodes_in(graph.node):
            for index, name in enumerate(node.input):
                if name:
                    self._readers[name].append((node, index))
            self._makers.update(dict.fromkeys(node.output, node))
        # what a body returns is read by the node it belongs to
        self._outputs |= {
            v.name for node in nodes_in(graph.node) for body in bodies(node) for v in body.output
        }

    def role(self, tensor: TensorProto) -> Role:
        name = tensor.name
        if name in self._inputs:
            return _left("also an input of the graph, so a caller may replace it")
        if name in self._outputs:
            return _left("also an output of the graph")
        if tensor.data_type in _BYTES:
            found = self._merged(name, len(tensor.dims))
            return found if found.kind in ("integer", "") else _left("integers, but no weight")
        if tensor.data_type not in _FLOATS:
            name = TensorProto.DataType.Name(tensor.data_type)
            return _left(f"{name.lower()} is not approximated")
        found = self._merged(name, len(tensor.dims))
        return (
            _left("floating, but read as an integer weight") if found.kind == "integer" else found
        )

    def _merged(self, name: str, rank: int) -> Role:
        """The one role that all readers agree on."""
        found = [self._of(node, index, rank) for node, index in self._readers.get(name, [])]
        if not found:
            return _left("used by no node")
        for role in found:
            if not role.kind:
                return role
        first = found[0]
        kinds = {role.kind for role in found}
        if kinds == {"bias", "factor"}:
            return Role("factor")
        if len(kinds) > 1:
            return _left(f"read both as {' and as '.join(sorted(kinds))}")
        for role in found[1:]:
            if role.layout != first.layout:
                first = replace(first, layout=None)
            if first.zero_point is not None and (
                role.zero_point is None or not np.array_equal(role.zero_point, first.zero_point)
            ):
                return _left("read with different zero points")
        return first

    def _of(self, node: NodeProto, index: int, rank: int) -> Role:
        """What one reader makes of a tensor of this rank at its input `index`."""
        op = node.op_type
        if node.domain not in DEFAULT_DOMAINS:
            return _left(f"read by {node.domain}.{op}, whose meaning is not known")
        if index in _ADDED.get(op, ()):
            return Role("bias")
        if index in _FACTORS.get(op, ()):
            return Role("factor")
        if op == "Add" and rank == 1 and self._is_bias_of_sum(node, index):
            return Role("bias")
        if op in ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"):
            return self._behind(node, index, rank)
        if op == "DequantizeLinear":
            return self._dequantized(node, index, rank)
        if op in _INTEGER and index == _INTEGER[op][0]:
            return self._integer(node, rank)
        layout = _layout(node, index, rank)
        if rank < 2 or layout is None:
            return _left(f"read by {op} as input {index}: no weight of a sum")
        return Role("weight", layout=layout)

    def _is_bias_of_sum(self, node: NodeProto, index: int) -> bool:
        maker = self._makers.get(node.input[1 - index])
        return maker is not None and maker.domain in DEFAULT_DOMAINS and maker.op_type in _LINEAR

    def _behind(self, node: NodeProto, index: int, rank: int) -> Role:
        """The role behind a node that only moves elements or changes their type."""
        if index or node.output[0] in self._outputs:
            return _left(f"read by {node.op_type} as input {index}")
        if node.op_type == "Cast" and _attribute(node, "to", 0) not in _FLOATS:
            return _left("cast to an integer type")
        known = node.op_type in ("Identity", "Cast", "Transpose")
        # Where elements go is not followed: behind a Reshape, any weight of two axes will do.
        role = self._merged(node.output[0], rank if known else max(rank, 2))
        # Zero points lie along an axis that such a node may move.
        kinds = ("weight", "bias", "integer") if node.op_type == "Identity" else ("weight", "bias")
        if role.kind not in kinds:
            return role if not role.kind else _left(f"{role.kind} behind {node.op_type}")
        if not known:
            return replace(role, layout=None)
        if node.op_type == "Transpose" and role.layout is not None:
            axes = list(_attribute(node, "perm", range(rank)[::-1]))
            moved = role.layout
            layout = Layout(
                tuple(axes[a] for a in moved.rows),
                tuple(axes[a] for a in moved.inner),
                tuple(axes[a] for a in moved.kernel),
                moved.groups,
            )
            return replace(role, layout=layout)
        return role

    def _dequantized(self, node: NodeProto, index: int, rank: int) -> Role:
        if index or node.output[0] in self._outputs:
            return _left("a scale or zero point of DequantizeLinear")
        role = self._merged(node.output[0], rank)
        if role.kind != "weight":
            return role if not role.kind else _left(f"a quantised {role.kind}")
        axis = _attribute(node, "axis", 1) % rank
        point = node.input[2] if len(node.input) > 2 else ""
        return self._with_zero_point(role.layout, point, rank, axis)

    def _integer(self, node: NodeProto, rank: int) -> Role:
        as_float = NodeProto()
        as_float.CopyFrom(node)
        as_float.op_type = "Conv" if "Conv" in node.op_type else "MatMul"
        layout = _layout(as_float, 1, rank)
        if layout is None:
            return _left(f"read by {node.op_type} with {rank} axes")
        place = _INTEGER[node.op_type][1]
        point = node.input[place] if len(node.input) > place else ""
        return self._with_zero_point(layout, point, rank, layout.rows[-1])

    def _with_zero_point(self, layout: Layout | None, name: str, rank: int, axis: int) -> Role:
        if not name:
            return Role("integer", layout=layout, zero_point=np.zeros((1,) * rank, np.int64))
        if name not in self._tensors or name in self._inputs:
            return _left(f"its zero point {name!r} is computed")
        points = numpy_helper.to_array(self._tensors[name]).astype(np.int64)
        if points.ndim > 1:
            return _left("its zero points come in blocks")
        shape = [1] * rank
        if points.size > 1:
            shape[axis] = points.size
        return Role("integer", layout=layout, zero_point=points.reshape(shape))


def _layout(node: NodeProto, index: int, rank: int) -> Layout | None:
    """Which elements of input `index` meet in a sum; None where it is no weight there."""
    op = node.op_type
    axes = tuple(range(rank))
    if op == "Conv" and index == 1 and rank > 2:
        return Layout((0,), (1,), axes[2:])
    if op == "ConvTranspose" and index == 1 and rank > 2:
        # With stride s an output meets every s-th place only: each place counts as a row.
        return Layout((1, *axes[2:]), (0,), groups=_attribute(node, "group", 1))
    if op == "Gemm" and index < 2 and rank == 2:
        columns = index == 1 and not _attribute(node, "transB", 0)
        columns |= index == 0 and bool(_attribute(node, "transA", 0))
        return Layout((1,), (0,)) if columns else Layout((0,), (1,))
    if op == "MatMul" and rank > 1:
        if index == 1:
            return Layout((*axes[:-2], rank - 1), (rank - 2,))
        return Layout(axes[:-1], (rank - 1,))
    if op in ("LSTM", "GRU", "RNN") and index in (1, 2) and rank == 3:
        return Layout((0, 1), (2,))
    if op == "Gather" and index == 0 and rank > 1 and not _attribute(node, "axis", 0):
        return Layout((0,), axes[1:], summed=False)
    return None


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default
