"""Operators that sum over channels: Conv, ConvTranspose, Gemm, MatMul.

What comes out has channels of its own. A channel that goes in is needed by those outputs that
weigh it with anything but zero; where it is a constant that each place of an output meets in the
same way, the bias can take it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from prune2onnx.shrink.flow import (
    Array,
    Bias,
    Channels,
    Claim,
    Flow,
    Ids,
    Layer,
    Link,
    Opaque,
    attribute,
    finite,
    label,
    set_attribute,
)


def conv(flow: Flow, node: NodeProto) -> None:
    """Weight [out, in / groups, *kernel]; a constant is one still where nothing is padded."""
    weight = flow.weight(node.input[1])
    groups = int(attribute(node, "group", 1))
    summed = weight.reshape(*weight.shape[:2], -1)
    exact = not padded(node, weight.shape[2:])
    _convolution(flow, node, _Sum(summed, groups, exact), (0, 1))


def conv_transpose(flow: Flow, node: NodeProto) -> None:
    """Weight [in, out / groups, *kernel]; places of an output meet different parts of a kernel."""
    weight = flow.weight(node.input[1])
    groups = int(attribute(node, "group", 1))
    inputs, outputs = weight.shape[:2]
    parts = weight.reshape(groups, inputs // groups, outputs, -1).swapaxes(1, 2)
    summed = parts.reshape(groups * outputs, inputs // groups, -1)
    _convolution(flow, node, _Sum(summed, groups, exact=False), (1, 0))


def gemm(flow: Flow, node: NodeProto) -> None:
    """Y = alpha A B + beta C, with the weight in B."""
    weight = flow.weight(node.input[1])
    columns, rows = (1, 0) if attribute(node, "transB", 0) else (0, 1)
    summed = (weight if rows == 0 else weight.T)[:, :, None] * attribute(node, "alpha", 1.0)
    channels = flow.at(node.input[0], 0 if attribute(node, "transA", 0) else 1)
    bias = _bias(flow, node, 2, len(summed), attribute(node, "beta", 1.0))
    _sum(flow, node, _Sum(summed), channels, (rows, columns), 1, bias)


def matmul(flow: Flow, node: NodeProto) -> None:
    """Y = A B, with the weight [in, out] in B; constants go where a next Add takes its bias."""
    weight = flow.weight(node.input[1])
    rank = len(flow.shape(node.input[0]))
    if weight.ndim != 2 or rank < 2:
        raise Opaque(f"with axes {rank} and {weight.ndim}")
    channels = flow.at(node.input[0], rank - 1)
    bias = _added(flow, node, weight.shape[1])
    _sum(flow, node, _Sum(weight.T[:, :, None]), channels, (1, 0), rank - 1, bias)


def padded(node: NodeProto, kernel: tuple[int, ...]) -> bool:
    """Whether some places of the output may meet the padding."""
    pad = attribute(node, "auto_pad", "NOTSET")
    if pad in ("SAME_UPPER", "SAME_LOWER"):
        return max(kernel, default=1) > 1
    return pad != "VALID" and any(attribute(node, "pads", ()))


@dataclass(frozen=True, eq=False)
class _Sum:
    """Factors of a sum.

    Attributes:
        factors: [out, in / groups, taps].
        groups: of outputs and inputs; each sums by itself.
        exact: whether each place of an output meets all taps.
    """

    factors: Array
    groups: int = 1
    exact: bool = True

    def spread(self, matrix: Array) -> Array:
        """[out, in] of [out, in / groups]: zero between groups."""
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
    """What a sum adds to each output, and where it can take more.

    Attributes:
        values: [out], NaN where it is not one number.
        name: of the weight with the values; "" where that is another node's.
        axis: along which its channels lie; None where one number is for all.
        place: None where it cannot take any.
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
    if not flow.takes(name) or not (along or flow.may_add):
        place = None
    table = np.broadcast_to(array, (*array.shape[:-1], rows)).reshape(-1, rows).astype(np.float64)
    values = np.where((table == table[0]).all(axis=0), table[0] * factor, np.nan)
    return _Added(values, name, array.ndim - 1 if along else None, place)


def _added(flow: Flow, node: NodeProto, rows: int) -> _Added:
    """The initializer that the only reader of a MatMul adds."""
    nothing = np.zeros(rows)
    name = node.output[0]
    if flow.uses[name] != 1 or name not in flow.readers:
        return _Added(nothing)
    add = flow.readers[name][0]
    index = 1 - list(add.input).index(name) if add.op_type == "Add" and not add.domain else 0
    array = flow.array(add.input[index])
    if array is None or not array.ndim or array.shape[-1] != rows:
        return _Added(nothing)
    if not flow.takes(add.input[index]):
        return _Added(nothing)
    return _Added(nothing, place=Bias(add, index))


def _convolution(flow: Flow, node: NodeProto, summed: _Sum, axes: tuple[int, int]) -> None:
    channels = flow.at(node.input[0], 1)
    bias = _bias(flow, node, 2, len(summed.factors))
    if summed.groups > 1 and summed.factors.shape[1] == 1:
        _each(flow, node, summed, channels, axes, bias)
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
    """Outputs have channels of their own, along `axis`; `axes` of the weight: outputs, inputs."""
    factors, groups = summed.factors, summed.groups
    nonzero = summed.spread((factors != 0).any(axis=2))
    rows, columns = nonzero.shape
    known = np.full(columns, np.nan) if inputs is None else inputs.constants
    sent = ~np.isnan(known) if summed.exact else known == 0
    sent |= known == 0
    moved = np.flatnonzero(sent & (known != 0) & nonzero.any(axis=0))
    amounts = np.zeros((rows, len(moved)))
    if len(moved):
        totals = summed.spread(factors.sum(axis=2, dtype=np.float64))
        amounts = totals[:, moved] * known[moved]
    constants = np.where((nonzero & ~sent).any(axis=1), np.nan, amounts.sum(axis=1) + bias.values)
    ids = flow.fresh(rows)
    if bias.place is None:
        sent = known == 0
        moved, amounts = moved[:0], amounts[:, :0]
    if inputs is not None:
        stuck = ~np.isnan(known) & ~sent & nonzero.any(axis=0)
        why = "has no bias to take it" if bias.place is None else "pads with zeros beside it"
        _stuck(flow, node, inputs.ids[stuck], why)
        flow.links.append(Link(node, ids, inputs.ids, nonzero & ~sent, moved, amounts, bias.place))
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


def _each(
    flow: Flow,
    node: NodeProto,
    summed: _Sum,
    inputs: Channels | None,
    axes: tuple[int, int],
    bias: _Added,
) -> None:
    """A group for each input channel, which lives and dies with what its group makes."""
    each = len(summed.factors) // summed.groups
    if inputs is None:
        heads = flow.fresh(summed.groups)
        flow.pin(heads, f"each made from one channel that stays, by {label(node)}")
        known = np.full(len(summed.factors), np.nan)
    else:
        heads = inputs.ids
        known = np.repeat(inputs.constants, each)
    ids = np.repeat(heads, each)
    nonzero = (summed.factors != 0).any(axis=(1, 2))
    sent = ~np.isnan(known) & (summed.exact | (known == 0))
    totals = summed.factors.sum(axis=(1, 2), dtype=np.float64)
    held = np.where(sent, known, 0) * totals + bias.values
    constants = np.where(sent | ~nonzero, held, np.nan)
    stuck = ~np.isnan(known) & ~sent & nonzero
    _stuck(flow, node, ids[stuck], "pads with zeros beside it")
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
