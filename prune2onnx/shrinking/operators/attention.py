"""Rules for attention, whose heads are channels: products of computed values, softmax, masks.

A head is removed with its rows of the projections of query, key and value, and its columns of the
projection of the output; where heads share keys, with all that share them.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from prune2onnx.graph.walk import attribute
from prune2onnx.shrinking.flow import Flow, Opaque, unknown
from prune2onnx.shrinking.operators.channelwise import operand


def product(flow: Flow, node: NodeProto) -> None:
    """A product of two computed values; channels are matrices, each multiplied by itself."""
    names = list(node.input[:2])
    followed = [name for name in names if name in flow.channels]
    if not followed:
        return
    rank = max(len(flow.shape(name)) for name in names)
    first = max(followed, key=lambda name: len(flow.channels[name].ids))
    channels = flow.channels[first]
    axis = channels.axis + rank - len(flow.shape(first))
    if axis >= rank - 2:
        raise Opaque("along rows or columns")
    one, other = (operand(flow, node, name, axis - rank, channels.ids) for name in names)
    constants = np.where((one == 0) | (other == 0), 0.0, np.nan)
    if all(name not in flow.stored for name in names):
        flow.heads.append(channels.ids)
    flow.carry(node, axis, channels.ids, constants)


def softmax(flow: Flow, node: NodeProto) -> None:
    """Over another axis than that of the channels."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    axis = int(attribute(node, "axis", -1 if flow.opset >= 13 else 1)) % rank
    if channels.axis >= axis:
        raise Opaque("over channels" if channels.axis == axis else "over axes before its channels")
    flow.carry(node, channels.axis, channels.ids, unknown(len(channels.ids)))


def is_nan(flow: Flow, node: NodeProto) -> None:
    """Of each element; a mask of the same channels."""
    channels = flow.channels.get(node.input[0])
    if channels is not None:
        flow.carry(node, channels.axis, channels.ids, unknown(len(channels.ids)))


def where(flow: Flow, node: NodeProto) -> None:
    """One of two values; where both are the same constant, that one."""
    followed = [name for name in node.input if name in flow.channels]
    if not followed:
        return
    rank = len(flow.shape(node.output[0]))
    first = max(followed, key=lambda name: len(flow.channels[name].ids))
    channels = flow.channels[first]
    axis = channels.axis + rank - len(flow.shape(first))
    if flow.shape(node.output[0])[axis] != len(channels.ids):
        raise Opaque("that broadcasts it along its channels")
    _, one, other = (operand(flow, node, name, axis - rank, channels.ids) for name in node.input)
    flow.carry(node, axis, channels.ids, np.where(one == other, one, np.nan))
