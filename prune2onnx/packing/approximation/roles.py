"""The role of each initializer in the graph: weight, bias or factor, and which elements are summed.

The effect of lost precision can be judged only where it is known what a tensor does. Reads the
graph only; `approximate` decides how weights of each role change.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from prune2onnx.graph.tensors import array_of
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute, bodies, nodes_in

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_BYTES = (TensorProto.INT8, TensorProto.UINT8)

# operator -> inputs that are added to a result; operator -> inputs that multiply or divide a result
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
# operators that hand elements on as they are
_MOVES = (
    *("Cast", "Concat", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose"),
    "Unsqueeze",
)
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layout:
    """Which elements of a weight are summed.

    A linear layer's output is sum_j w[r, j] x[j]: row r is one output channel, and j runs over the
    inputs.

    Attributes:
        rows: axes of the weight that count outputs.
        inner: axes that are summed over and count input channels.
        kernel: axes that are summed over and count kernel positions of one input channel.
        groups: groups into which the first of `inner` is split; each is summed separately.
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
        kind: "weight" (factors of sums), "bias" (added), "factor" (multiplies or divides a
            channel), "integer" (a weight in int8 or uint8) or "" (not to be changed).
        reason: why it is not to be changed; "" otherwise.
        layout: of a weight; None where its readers disagree or nothing is summed.
        zero_point: of an integer weight, broadcastable to it.
    """

    kind: str
    reason: str = ""
    layout: Layout | None = None
    zero_point: NDArray[np.int64] | None = None


def roles(model: ModelProto) -> dict[str, Role]:
    """The role of every initializer of the main graph, in its order.

    A weight is a floating-point tensor of two or more axes in which every node that reads it
    multiplies into sums or looks rows up: Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU, RNN,
    Gather, also behind operators that hand elements on (`_MOVES`), QuantizeLinear, or a Mul by
    stored scales. An integer weight is the same behind DequantizeLinear or Cast, or read by an
    operator that computes in integers.

    Args:
        model: unpacked, external data loaded; weights in subgraphs and Constant nodes are not
            seen (`graph.normalize` moves them).
    """
    reader = _Reader(model)
    return {tensor.name: reader.role(tensor) for tensor in model.graph.initializer}


def _unchanged(reason: str) -> Role:
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
        # the outputs of a body are read by the node that it belongs to
        self._outputs |= {
            v.name for node in nodes_in(graph.node) for body in bodies(node) for v in body.output
        }

    def role(self, tensor: TensorProto) -> Role:
        name = tensor.name
        if name in self._inputs:
            return _unchanged("also an input of the graph, so a caller may replace it")
        if name in self._outputs:
            return _unchanged("also an output of the graph")
        if tensor.data_type in _BYTES:
            found = self._merged(name, len(tensor.dims))
            if found.kind == "weight":  # cast to floats, and scaled
                none = np.zeros((1,) * len(tensor.dims), np.int64)
                point = none if found.zero_point is None else found.zero_point
                return replace(found, kind="integer", zero_point=point)
            if found.kind in ("integer", ""):
                return found
            return _unchanged("integers, but not a weight")
        if tensor.data_type not in FLOATS:
            name = TensorProto.DataType.Name(tensor.data_type)
            return _unchanged(f"{name.lower()} is not approximated")
        found = self._merged(name, len(tensor.dims))
        if found.kind == "integer" or found.zero_point is not None:
            return _unchanged("floating-point, but read as an integer weight")
        return found

    def _merged(self, name: str, rank: int) -> Role:
        """The role that all readers agree on."""
        found = [self._of(node, index, rank) for node, index in self._readers.get(name, [])]
        if not found:
            return _unchanged("used by no node")
        for role in found:
            if not role.kind:
                return role
        first = found[0]
        kinds = {role.kind for role in found}
        if kinds == {"bias", "factor"}:
            return Role("factor")
        if len(kinds) > 1:
            return _unchanged(f"read both as {' and as '.join(sorted(kinds))}")
        for role in found[1:]:
            first = replace(first, layout=_common(first.layout, role.layout))
            if first.zero_point is not None and (
                role.zero_point is None or not np.array_equal(role.zero_point, first.zero_point)
            ):
                return _unchanged("read with different zero points")
        return first

    def _of(self, node: NodeProto, index: int, rank: int) -> Role:
        """The role that a tensor of this rank has for one reader, at its input `index`."""
        op = node.op_type
        if node.domain == "com.microsoft" and op == "DynamicQuantizeLSTM" and index == 3:
            return Role("bias")
        if node.domain == "com.microsoft" and op == "DynamicQuantizeLSTM" and index in (1, 2):
            point = node.input[7 + 2 * index] if len(node.input) > 7 + 2 * index else ""
            return self._with_zero_point(Layout((0, 2), (1,)), point, rank, 0)
        if node.domain not in DEFAULT_DOMAINS:
            return _unchanged(f"read by {node.domain}.{op}, whose meaning is not known")
        if index in _ADDED.get(op, ()):
            return Role("bias")
        if index in _FACTORS.get(op, ()):
            return Role("factor")
        if op == "Add" and rank == 1 and self._is_bias_of_sum(node, index):
            return Role("bias")
        if op in _MOVES:
            return self._behind(node, index, rank)
        if op in ("Mul", "Div", "Sub") and rank > 1 and self._is_constant(node.input[1 - index]):
            return self._scaled(node, index, rank)
        if op == "QuantizeLinear" and index == 0 and node.output[0] not in self._outputs:
            role = self._merged(node.output[0], rank)
            return Role("weight", layout=role.layout) if role.kind == "integer" else role
        if op == "DequantizeLinear":
            return self._dequantized(node, index, rank)
        if op in _INTEGER and index == _INTEGER[op][0]:
            return self._integer(node, rank)
        layout = layout_of(node, index, rank)
        if rank < 2 or layout is None:
            return _unchanged(f"read by {op} as input {index}: not a weight of sums")
        return Role("weight", layout=layout)

    def _is_bias_of_sum(self, node: NodeProto, index: int) -> bool:
        maker = self._makers.get(node.input[1 - index])
        return maker is not None and maker.domain in DEFAULT_DOMAINS and maker.op_type in _LINEAR

    def _behind(self, node: NodeProto, index: int, rank: int) -> Role:
        """The role of a tensor behind a node that only moves elements or changes their type."""
        if (index and node.op_type != "Concat") or node.output[0] in self._outputs:
            return _unchanged(f"read by {node.op_type} as input {index}")
        if node.op_type == "Cast" and attribute(node, "to", 0) not in FLOATS:
            return _unchanged("cast to an integer type")
        known = node.op_type in ("Identity", "Cast", "Transpose")
        # Elements are not followed through a Reshape: behind it, any weight of two axes counts.
        role = self._merged(node.output[0], self._rank_behind(node, rank))
        # Zero points lie along an axis, which other nodes than Identity may move.
        kinds = ("weight", "bias", "integer") if node.op_type == "Identity" else ("weight", "bias")
        if role.kind not in kinds:
            return role if not role.kind else _unchanged(f"{role.kind} behind {node.op_type}")
        if role.zero_point is not None and role.zero_point.size > 1 and node.op_type != "Cast":
            return _unchanged(f"zero points of channels behind {node.op_type}")
        if not known:
            return replace(role, layout=None)
        if node.op_type == "Transpose" and role.layout is not None:
            axes = list(attribute(node, "perm", range(rank)[::-1]))
            moved = role.layout
            layout = replace(
                moved,
                rows=tuple(axes[a] for a in moved.rows),
                inner=tuple(axes[a] for a in moved.inner),
                kernel=tuple(axes[a] for a in moved.kernel),
            )
            return replace(role, layout=layout)
        return role

    def _rank_behind(self, node: NodeProto, rank: int) -> int:
        """The number of axes that a node of `_MOVES` gives; at least 2 where it is not known."""
        if node.op_type in ("Cast", "Concat", "Identity", "Slice", "Transpose"):
            return rank
        axes = list(attribute(node, "axes", ()))
        if len(node.input) > 1 and node.input[1] in self._tensors:
            axes = list(range(int(np.prod(self._tensors[node.input[1]].dims))))
        if node.op_type == "Unsqueeze":
            return rank + max(len(axes), 1)  # one where the axes are no initializer
        if node.op_type == "Squeeze" and axes:
            return rank - len(axes)
        return max(rank, 2)

    def _is_constant(self, name: str) -> bool:
        return name in self._tensors and name not in self._inputs

    def _scaled(self, node: NodeProto, index: int, rank: int) -> Role:
        """The role of a tensor that has stored scales, or less a stored zero point."""
        if node.output[0] in self._outputs or (index and node.op_type != "Mul"):
            return _unchanged(f"read by {node.op_type} as input {index}")
        other = self._tensors[node.input[1 - index]]
        if len(other.dims) > rank:
            return _unchanged(f"spread over more axes by {node.op_type}")
        role = self._merged(node.output[0], rank)
        if role.kind != "weight" or node.op_type != "Sub":
            return (
                role if role.kind in ("weight", "") else _unchanged(f"{role.kind} that is scaled")
            )
        points = array_of(other)
        if role.zero_point is not None or not np.array_equal(points, np.round(points)):
            return _unchanged("less a number that is no zero point")
        shape = (1,) * (rank - points.ndim) + points.shape
        return replace(role, zero_point=points.astype(np.int64).reshape(shape))

    def _dequantized(self, node: NodeProto, index: int, rank: int) -> Role:
        if index or node.output[0] in self._outputs:
            return _unchanged("a scale or zero point of DequantizeLinear")
        role = self._merged(node.output[0], rank)
        if role.kind != "weight":
            return role if not role.kind else _unchanged(f"a quantised {role.kind}")
        axis = attribute(node, "axis", 1) % rank
        point = node.input[2] if len(node.input) > 2 else ""
        return self._with_zero_point(role.layout, point, rank, axis)

    def _integer(self, node: NodeProto, rank: int) -> Role:
        as_float = NodeProto()
        as_float.CopyFrom(node)
        as_float.op_type = "Conv" if "Conv" in node.op_type else "MatMul"
        layout = layout_of(as_float, 1, rank)
        if layout is None:
            return _unchanged(f"read by {node.op_type} with {rank} axes")
        place = _INTEGER[node.op_type][1]
        point = node.input[place] if len(node.input) > place else ""
        return self._with_zero_point(layout, point, rank, layout.rows[-1])

    def _with_zero_point(self, layout: Layout | None, name: str, rank: int, axis: int) -> Role:
        if not name:
            return Role("integer", layout=layout, zero_point=np.zeros((1,) * rank, np.int64))
        if name not in self._tensors or name in self._inputs:
            return _unchanged(f"its zero point {name!r} is computed")
        points = array_of(self._tensors[name]).astype(np.int64)
        shape = [1] * rank
        if points.ndim == 2 and rank == 3 and axis == 0:  # of directions and rows of an LSTM
            shape = [points.shape[0], 1, points.shape[1]]
        elif points.ndim > 1:
            return _unchanged("its zero points come in blocks")
        elif points.size > 1:
            shape[axis] = points.size
        return Role("integer", layout=layout, zero_point=points.reshape(shape))


def _common(one: Layout | None, other: Layout | None) -> Layout | None:
    """The layout of two readers: rows that are looked up may be summed elsewhere, as logits."""
    if one is None or other is None:
        return None
    summed = one.summed or other.summed
    one, other = replace(one, summed=summed), replace(other, summed=summed)
    return one if one == other else None


def layout_of(node: NodeProto, index: int, rank: int) -> Layout | None:
    """Which elements of input `index` are summed; None where that input is no weight."""
    op = node.op_type
    axes = tuple(range(rank))
    if op == "Conv" and index == 1 and rank > 2:
        return Layout((0,), (1,), axes[2:])
    if op == "ConvTranspose" and index == 1 and rank > 2:
        # With stride s, an output reads every s-th kernel position only: each counts as a row.
        return Layout((1, *axes[2:]), (0,), groups=attribute(node, "group", 1))
    if op == "Gemm" and index < 2 and rank == 2:
        columns = index == 1 and not attribute(node, "transB", 0)
        columns |= index == 0 and bool(attribute(node, "transA", 0))
        return Layout((1,), (0,)) if columns else Layout((0,), (1,))
    if op == "MatMul" and rank > 1:
        if index == 1:
            return Layout((*axes[:-2], rank - 1), (rank - 2,))
        return Layout(axes[:-1], (rank - 1,))
    if op in ("LSTM", "GRU", "RNN") and index in (1, 2) and rank == 3:
        return Layout((0, 1), (2,))
    if op == "Gather" and index == 0 and rank > 1 and not attribute(node, "axis", 0):
        return Layout((0,), axes[1:], summed=False)
    return None
