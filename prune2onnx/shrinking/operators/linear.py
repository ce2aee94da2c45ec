"""Rules for operators that sum over channels: Conv, ConvTranspose, Gemm, MatMul.

The output has channels of its own. An input channel is needed by the output channels that have a
nonzero weight for it. A constant input channel, which adds the same to each position of an output,
can be absorbed by the bias. Operators without sums: see `channelwise`,
`reshaping` and `regroup`; products of two computed values: see `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from prune2onnx.graph.walk import attribute, set_attribute
from prune2onnx.shrinking.flow import (
    Array,
    Bias,
    Channels,
    Claim,
    Flow,
    Ids,
    Layer,
    Link,
    Opaque,
    finite,
    label,
)


def conv(flow: Flow, node: NodeProto) -> None:
    """Weight [out, in / groups, *kernel]; a constant input is one in the output unless padded."""
    weight = flow.weight(node.input[1])
    groups = _groups(node, weight.shape[0])
    summed = weight.reshape(*weight.shape[:2], -1)
    exact = not padded(node, weight.shape[2:])
    _convolution(flow, node, _Sum(summed, groups, exact), (0, 1))


def conv_transpose(flow: Flow, node: NodeProto) -> None:
    """Weight [in, out / groups, *kernel]; output positions see different parts of the kernel."""
    weight = flow.weight(node.input[1])
    groups = _groups(node, weight.shape[0])
    inputs, outputs = weight.shape[:2]
    parts = weight.reshape(groups, inputs // groups, outputs, -1).swapaxes(1, 2)
    summed = parts.reshape(groups * outputs, inputs // groups, -1)
    _convolution(flow, node, _Sum(summed, groups, exact=False), (1, 0))


def _groups(node: NodeProto, channels: int) -> int:
    groups = int(attribute(node, "group", 1))
    if not 0 < groups <= channels or channels % groups:
        raise Opaque(f"of {groups} groups, and {channels} channels in its weight")
    return groups


def gemm(flow: Flow, node: NodeProto) -> None:
    """Y = alpha A B + beta C, with the weight in B."""
    weight = flow.weight(node.input[1])
    columns, rows = (1, 0) if attribute(node, "transB", 0) else (0, 1)
    summed = (weight if rows == 0 else weight.T)[:, :, None] * attribute(node, "alpha", 1.0)
    channels = flow.at(node.input[0], 0 if attribute(node, "transA", 0) else 1)
    bias = _bias(flow, node, 2, len(summed), attribute(node, "beta", 1.0))
    _sum(flow, node, _Sum(summed), channels, (rows, columns), 1, bias)


def matmul(flow: Flow, node: NodeProto) -> None:
    """Y = A B, with the weight [in, out] in B; the bias is that of an Add which follows."""
    weight = flow.weight(node.input[1])
    rank = len(flow.shape(node.input[0]))
    if weight.ndim != 2 or rank < 2:
        raise Opaque(f"of ranks {rank} and {weight.ndim}")
    channels = flow.at(node.input[0], rank - 1)
    bias = _added(flow, node, weight.shape[1])
    _sum(flow, node, _Sum(weight.T[:, :, None]), channels, (1, 0), rank - 1, bias)


def padded(node: NodeProto, kernel: tuple[int, ...]) -> bool:
    """Whether some positions of the output may see the padding."""
    pad = attribute(node, "auto_pad", "NOTSET")
    if pad in ("SAME_UPPER", "SAME_LOWER"):
        return max(kernel, default=1) > 1
    return pad != "VALID" and any(attribute(node, "pads", ()))


@dataclass(frozen=True, eq=False)
class _Sum:
    """Factors of a sum.

    Attributes:
        factors: [out, in / groups, taps].
        groups: of outputs and inputs; each is summed by itself.
        exact: whether each position of an output sees all taps.
    """

    factors: Array
    groups: int = 1
    exact: bool = True

    def spread(self, matrix: Array) -> Array:
        """[out, in] from [out, in / groups], block-diagonal: zero between groups."""
        if self.groups == 1:
            return matrix
        rows, columns = matrix.shape[0] // self.groups, matrix.shape[1]
        result = np.zeros((matrix.shape[0], columns * self.groups), matrix.dtype)
        for group in range(self.groups):
            part = slice(group * rows, (group + 1) * rows)
            result[part, group * columns : (group + 1) * columns] = matrix[part]
        return result


@dataclass(frozen=True, eq=False)
class _Added:
    """What a sum adds to each output, and where a constant can be added.

    Attributes:
        values: [out], NaN where an output has different ones.
        name: of the weight with the values; "" where another node adds them.
        axis: along which its channels lie; None where one value is for all.
        place: None where nothing can be added.
    """

    values: NDArray[np.float64]
    name: str = ""
    axis: int | None = None
    place: Bias | None = None


def _bias(flow: Flow, node: NodeProto, index: int, rows: int, factor: float = 1.0) -> _Added:
    name = node.input[index] if len(node.input) > index else ""
    place = Bias(node, index, factor) if factor else None
    if not name:
        return _Added(np.zeros(rows), place=place if flow.may_add else None)
    array = flow.weight(name)
    along = array.ndim > 0 and array.shape[-1] == rows
    if not flow.can_absorb(name) or not (along or flow.may_add):
        place = None
    table = np.broadcast_to(array, (*array.shape[:-1], rows)).reshape(-1, rows).astype(np.float64)
    values = np.where((table == table[0]).all(axis=0), table[0] * factor, np.nan)
    return _Added(values, name, array.ndim - 1 if along else None, place)


def _added(flow: Flow, node: NodeProto, rows: int) -> _Added:
    """The initializer that an Add, the only reader of a MatMul, adds."""
    nothing = np.zeros(rows)
    name = node.output[0]
    if flow.uses[name] != 1 or name not in flow.readers:
        return _Added(nothing)
    add = flow.readers[name][0]
    if add.op_type != "Add" or not flow.is_standard(add):
        return _Added(nothing)
    index = 1 - list(add.input).index(name)
    array = flow.array(add.input[index])
    if array is None or not array.ndim or array.shape[-1] != rows:
        return _Added(nothing)
    if not flow.can_absorb(add.input[index]):
        return _Added(nothing)
    return _Added(nothing, place=Bias(add, index))


def _convolution(flow: Flow, node: NodeProto, summed: _Sum, axes: tuple[int, int]) -> None:
    channels = flow.at(node.input[0], 1)
    bias = _bias(flow, node, 2, len(summed.factors))
    if summed.groups > 1 and summed.factors.shape[1] == 1:
        _depthwise(flow, node, summed, channels, axes, bias)
    else:
        _sum(flow, node, summed, channels, axes, 1, bias)


def _sum(
    flow: Flow,
    node: NodeProto,
    summed: _Sum,
    inputs: Channels | None,
    axes: tuple[int, int],
    axis: int,
    bias: _Added,
) -> None:
    """Outputs have channels of their own, along `axis`; `axes` of the weight: output, input."""
    factors, groups = summed.factors, summed.groups
    nonzero = summed.spread((factors != 0).any(axis=2))
    rows, columns = nonzero.shape
    known = np.full(columns, np.nan) if inputs is None else inputs.constants
    absorbed = ~np.isnan(known) if summed.exact else known == 0
    absorbed |= known == 0
    moved = np.flatnonzero(absorbed & (known != 0) & nonzero.any(axis=0))
    amounts = np.zeros((rows, len(moved)))
    if len(moved):
        totals = summed.spread(factors.sum(axis=2, dtype=np.float64))
        amounts = totals[:, moved] * known[moved]
    varies = (nonzero & ~absorbed).any(axis=1)
    constants = np.where(varies, np.nan, amounts.sum(axis=1) + bias.values)
    ids = flow.fresh(rows)
    if bias.place is None:
        absorbed = known == 0
        moved, amounts = moved[:0], amounts[:, :0]
    if inputs is not None:
        stuck = ~np.isnan(known) & ~absorbed & nonzero.any(axis=0)
        why = "has no bias to absorb it" if bias.place is None else "pads it with zeros"
        _stuck(flow, node, inputs.ids[stuck], why)
        needs = nonzero & ~absorbed
        flow.links.append(Link(node, ids, inputs.ids, needs, moved, amounts, bias.place))
    along = {axes[0]: ids}
    if inputs is not None:
        along[axes[1]] = inputs.ids
    if groups > 1:
        others = flow.fresh(columns) if inputs is None else inputs.ids
        if inputs is None:
            flow.pin(others, "an input of the graph")
        along[axes[1]] = others
        flow.grouped.append((ids, others, groups))
        flow.edits.append(lambda kept: _regroup(node, kept(others), kept(ids), groups))
    flow.claims.append(Claim(node.input[1], along, groups, zeroed=True))
    made = Channels(axis, ids, finite(constants, factors))
    _finish(flow, node, made, bias, None if inputs is None else inputs.ids)


def _depthwise(
    flow: Flow,
    node: NodeProto,
    summed: _Sum,
    inputs: Channels | None,
    axes: tuple[int, int],
    bias: _Added,
) -> None:
    """Depthwise: one group per input channel, which stays or goes with its group's outputs."""
    each = len(summed.factors) // summed.groups
    if inputs is None:
        heads = flow.fresh(summed.groups)
        flow.pin(heads, f"each computed from one channel that stays, by {label(node)}")
        known = np.full(len(summed.factors), np.nan)
    else:
        heads = inputs.ids
        known = np.repeat(inputs.constants, each)
    ids = np.repeat(heads, each)
    nonzero = (summed.factors != 0).any(axis=(1, 2))
    absorbed = ~np.isnan(known) & (summed.exact | (known == 0))
    totals = summed.factors.sum(axis=(1, 2), dtype=np.float64)
    held = np.where(absorbed, known, 0) * totals + bias.values
    constants = np.where(absorbed | ~nonzero, held, np.nan)
    stuck = ~np.isnan(known) & ~absorbed & nonzero
    _stuck(flow, node, ids[stuck], "pads it with zeros")
    along = {0: ids if axes[0] == 0 else heads}
    flow.claims.append(Claim(node.input[1], along, zeroed=True))
    flow.edits.append(lambda kept: set_attribute(node, "group", int(kept(heads).sum())))
    _finish(flow, node, Channels(1, ids, finite(constants, summed.factors)), bias)


def _finish(
    flow: Flow, node: NodeProto, made: Channels, bias: _Added, inputs: Ids | None = None
) -> None:
    if bias.name:
        axes = {} if bias.axis is None else {bias.axis: made.ids}
        flow.claims.append(Claim(bias.name, axes, zeroed=True))
    flow.channels[node.output[0]] = made
    flow.layers.append(Layer(node, node.input[1], made, inputs))


def _regroup(
    node: NodeProto, inputs: NDArray[np.bool_], outputs: NDArray[np.bool_], groups: int
) -> None:
    alive = inputs.reshape(groups, -1).any(axis=1) | outputs.reshape(groups, -1).any(axis=1)
    set_attribute(node, "group", int(alive.sum()))


def _stuck(flow: Flow, node: NodeProto, ids: Ids, why: str) -> None:
    flow.note(ids, f"its constant goes to {label(node)}, which {why}")
