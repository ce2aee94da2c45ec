"""Rules for operators that treat each channel by itself: activations, arithmetic, pooling, norms.

Operators that sum over channels: see `linear`; that move channels: see `reshaping`,
`regroup`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from prune2onnx.graph.tensors import evaluated
from prune2onnx.graph.walk import attribute
from prune2onnx.shrinking.flow import (
    FLOATS,
    Channels,
    Claim,
    Flow,
    Ids,
    Opaque,
    finite,
    label,
    unknown,
)
from prune2onnx.shrinking.operators.linear import padded

# All continuous, so that a rounding error stays small. None is infinite where a dead channel
# becomes zero: its output is still multiplied by a weight of zero.
ELEMENTWISE = (
    *("Abs", "Add", "Cast", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu"),
    *("HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "PRelu"),
    *("Pow", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum"),
    *("Swish", "Tanh"),
)
_ZEROED = ("Add", "Mul", "Sub", "Sum")


def elementwise(flow: Flow, node: NodeProto) -> None:
    """Any number of operands, broadcast as in numpy."""
    names = [name for name in node.input if name]
    followed = [name for name in names if name in flow.channels]
    if not followed:
        return
    if attribute(node, "broadcast") is not None:  # before opset 7
        raise Opaque("in the form of an old opset")
    if node.op_type in ("Div", "Pow"):
        second = flow.array(names[1])
        if second is None or (node.op_type == "Pow" and not (second > 0).all()):
            raise Opaque("whose second operand is computed, or not a positive power")
    if flow.element_types.get(node.output[0]) not in FLOATS:
        raise Opaque("whose result is not floating point")
    shape = flow.shape(node.output[0])
    first = max(followed, key=lambda name: len(flow.channels[name].ids))
    axis = flow.channels[first].axis + len(shape) - len(flow.shape(first))
    ids = flow.channels[first].ids
    if shape[axis] != len(ids):
        raise Opaque("that broadcasts it along its channels")
    vectors = []
    for name in names:
        vectors.append(operand(flow, node, name, axis - len(shape), ids))
    constants = _evaluated(flow, node, vectors)
    flow.channels[node.output[0]] = Channels(axis, ids, constants)


def operand(flow: Flow, node: NodeProto, name: str, axis: int, ids: Ids) -> NDArray[np.float64]:
    """Couples an operand's channels with those of the result; returns the operand's constants.

    Args:
        flow: changed.
        node: the operator.
        name: the operand.
        axis: of the channels, counted from the end.
        ids: channels of the result.
    """
    shape = flow.shape(name)
    own = axis + len(shape)
    extent = shape[own] if own >= 0 else 1
    array = flow.array(name)
    if array is not None:
        along = {own: ids} if own >= 0 and extent == len(ids) else {}
        flow.claims.append(Claim(name, along, zeroed=node.op_type in _ZEROED))
        rows = np.moveaxis(array, own, 0) if own >= 0 else array[None]
        rows = rows.reshape(len(rows), -1).astype(np.float64)
        if not rows.size:
            raise Opaque("with an empty operand")
        held = np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], np.nan)
        return np.broadcast_to(held, len(ids))
    channels = flow.channels.get(name)
    if channels is not None and channels.axis == own and extent == len(ids):
        flow.couple(channels.ids, ids)
        return channels.constants
    if channels is not None:
        flow.pin(channels.ids, f"spread over other channels by {label(node)}")
    if extent != 1:
        flow.pin(ids, f"joined by {label(node)} with a value whose channels stay")
    elif channels is not None and channels.axis == own:
        return np.broadcast_to(channels.constants, len(ids))
    return unknown(len(ids))


def _evaluated(
    flow: Flow, node: NodeProto, vectors: list[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The result of an elementwise operator on constants, by onnx's reference evaluator."""
    missing = np.isnan(np.stack(vectors)).any(axis=0)
    zero = np.logical_or.reduce([vector == 0 for vector in vectors])
    result = unknown(len(vectors[0]))
    if node.op_type == "Mul":
        result[missing & zero] = 0
    if missing.all():
        return result
    names = [name for name in node.input if name]
    values = {}
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [str(names.index(name)) if name else "" for name in node.input]
    scalars = node.op_type == "Clip"
    for number, (name, vector) in enumerate(zip(names, vectors, strict=True)):
        element_type = flow.element_types[name]
        known = vector[~missing].astype(helper.tensor_dtype_to_np_dtype(element_type))
        values[str(number)] = known[0] if scalars and number else known
    try:
        with np.errstate(all="ignore"):
            made = evaluated([copy], values, node.output[0], flow.opset).astype(np.float64)
    except Exception:  # whatever it raises: then the result is unknown
        return result
    result[~missing] = np.where(np.isfinite(made), made, np.nan)
    return result


def same(flow: Flow, node: NodeProto) -> None:
    """Identity, and Dropout, which is one in inference."""
    name = node.input[0]
    if name not in flow.channels:
        return
    training = flow.array(node.input[2]) if len(node.input) > 2 and node.input[2] else False
    if training is None or training or any(flow.uses[other] for other in node.output[1:]):
        raise Opaque("in training, or whose mask is read")
    flow.channels[node.output[0]] = flow.channels[name]


def _image(flow: Flow, node: NodeProto) -> Channels | None:
    """Channels of an operator that reads them along axis 1 and has one output."""
    if any(flow.uses[name] for name in node.output[1:]):
        raise Opaque("of which more than the first output is read")
    return flow.at(node.input[0], 1)


def pool(flow: Flow, node: NodeProto) -> None:
    """Constants stay: padding is never the maximum, nor is it averaged."""
    if (channels := _image(flow, node)) is not None:
        flow.channels[node.output[0]] = channels


def average_pool(flow: Flow, node: NodeProto) -> None:
    """Padding may be averaged; then a constant is smaller at the borders."""
    if (channels := _image(flow, node)) is None:
        return
    counted = bool(attribute(node, "count_include_pad", 0))
    exact = not counted or not padded(node, tuple(attribute(node, "kernel_shape")))
    exact &= not attribute(node, "ceil_mode", 0)  # what is averaged at the far border is unclear
    flow.channels[node.output[0]] = _constant_if(channels, exact)


def _constant_if(channels: Channels, exact: bool) -> Channels:
    """The same channels; unless `exact`, only those of zero stay constant."""
    kept = np.where((channels.constants == 0) | exact, channels.constants, np.nan)
    return Channels(channels.axis, channels.ids, kept)


def batch_normalization(flow: Flow, node: NodeProto) -> None:
    """Y = scale (x - mean) / sqrt(var + epsilon) + bias, statistics stored."""
    if attribute(node, "training_mode", 0) or any(
        attribute(node, name) is not None for name in ("is_test", "spatial", "consumed_inputs")
    ):
        raise Opaque("in training, or in the form of an old opset")
    if (channels := _image(flow, node)) is None:
        return
    scale, bias, mean, var = (flow.weight(name) for name in node.input[1:5])
    for index, name in enumerate(node.input[1:5]):
        flow.claims.append(Claim(name, {0: channels.ids}, zeroed=index < 2))
    epsilon = attribute(node, "epsilon", 1e-5)
    x = np.where(scale == 0, mean.astype(np.float64), channels.constants)
    made = scale * ((x - mean) / np.sqrt(var.astype(np.float64) + epsilon)) + bias
    flow.channels[node.output[0]] = Channels(1, channels.ids, finite(made, scale))


def instance_normalization(flow: Flow, node: NodeProto) -> None:
    """Each channel of each example minus its mean: of zero, or times zero, the bias is left."""
    if (channels := _image(flow, node)) is None:
        return
    scale, bias = (flow.weight(name) for name in node.input[1:3])
    for name in node.input[1:3]:
        flow.claims.append(Claim(name, {0: channels.ids}, zeroed=True))
    known = (scale == 0) | (channels.constants == 0)
    made = np.where(known, bias.astype(np.float64), np.nan)
    flow.channels[node.output[0]] = Channels(1, channels.ids, made)


def reduce(flow: Flow, node: NodeProto) -> None:
    """Over other axes than that of the channels; a constant stays the same."""
    _reduce(flow, node, exact=True)


def reduce_sum(flow: Flow, node: NodeProto) -> None:
    """As `reduce`, but only zero stays constant."""
    _reduce(flow, node, exact=False)


def _reduce(flow: Flow, node: NodeProto, exact: bool) -> None:
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    axes = flow.whole_numbers(node, "axes", 1)
    if not axes:
        raise Opaque("over all axes")
    reduced = {axis % rank for axis in axes}
    if channels.axis in reduced:
        raise Opaque("over channels")
    gone = 0 if attribute(node, "keepdims", 1) else sum(a < channels.axis for a in reduced)
    still = _constant_if(channels, exact)
    flow.channels[node.output[0]] = Channels(channels.axis - gone, still.ids, still.constants)
