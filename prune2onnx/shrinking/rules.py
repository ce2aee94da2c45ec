"""The table of rules: what each operator does with channels.

A rule reads a node and records in the flow what it finds. An operator that is not in the table, or
a node whose rule raises Opaque, counts as reading everything. The rules themselves: see
`operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import ModelProto, NodeProto

from prune2onnx.shrinking.flow import Claim, Flow, Opaque, label
from prune2onnx.shrinking.operators import (
    attention,
    channelwise,
    fused,
    linear,
    regroup,
    reshaping,
    shape_values,
)

RULES: Mapping[str, Callable[[Flow, NodeProto], None]] = {
    # sums over channels
    "Conv": linear.conv,
    "ConvTranspose": linear.conv_transpose,
    "Gemm": linear.gemm,
    "MatMul": linear.matmul,
    # each channel by itself
    **dict.fromkeys(channelwise.ELEMENTWISE, channelwise.elementwise),
    **dict.fromkeys(("Dropout", "Identity"), channelwise.same),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "MaxPool"), channelwise.pool),
    "AveragePool": channelwise.average_pool,
    "BatchNormalization": channelwise.batch_normalization,
    "InstanceNormalization": channelwise.instance_normalization,
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin"), channelwise.reduce),
    "ReduceSum": channelwise.reduce_sum,
    # channels that move
    "Concat": reshaping.concat,
    "DepthToSpace": regroup.depth_to_space,
    "Expand": regroup.expand,
    "Flatten": regroup.flatten,
    "Gather": reshaping.gather,
    "Pad": reshaping.pad,
    "Reshape": regroup.reshape,
    **dict.fromkeys(("Resize", "Upsample"), reshaping.resize),
    "Slice": reshaping.slice_,
    "SpaceToDepth": regroup.space_to_depth,
    "Split": reshaping.split,
    "Squeeze": reshaping.squeeze,
    "Transpose": reshaping.transpose,
    "Unsqueeze": reshaping.unsqueeze,
    # attention
    "Attention": fused.standard_attention,
    "IsNaN": attention.is_nan,
    "RotaryEmbedding": fused.rotary_embedding,
    "Softmax": attention.softmax,
    "Where": attention.where,
    # how many there are
    "Shape": shape_values.shape,
}

# what a rule runs into where a file contradicts itself; onnxruntime refuses most such files
_CONTRADICTIONS = (ValueError, LookupError, TypeError, ZeroDivisionError)

CONTRIB: Mapping[str, Callable[[Flow, NodeProto], None]] = {
    "Attention": fused.packed_attention,
    "GroupQueryAttention": fused.group_query_attention,
    "MultiHeadAttention": fused.multi_head_attention,
    "RotaryEmbedding": fused.rotary_embedding,
    **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu", "QuickGelu"), fused.activation),
}
"""Operators of com.microsoft, which onnxruntime's own optimizer writes."""

_FOLDED = ("Reshape", "Transpose")
"""Operators through which channels that are counted anew for each example are followed."""

OLDEST = 7
"""The first operator set in which arithmetic broadcasts as in numpy."""


def trace(model: ModelProto, may_add: bool = True) -> Flow:
    """Follows the channels of a model through its main graph.

    Args:
        model: the flow keeps it; not changed here.
        may_add: whether a new bias may be added to absorb a constant.
    """
    flow = Flow(model, may_add)
    for node in model.graph.node:
        before = [len(found) for found in flow.found]
        try:
            with np.errstate(all="ignore"):  # what is not finite counts as unknown
                _rule(flow, node)(flow, node)
        except (Opaque, *_CONTRADICTIONS) as why:
            if not isinstance(why, Opaque):
                why = Opaque("whose inputs, axes or stated shapes do not fit each other")
            for found, count in zip(flow.found, before, strict=True):
                del found[count:]
            flow.seal(node, str(why))
        if not shape_values.follows(flow, node):
            for name in flow.extents.keys() & set(node.input):
                flow.pin_all(name, f"counted by {label(node)}")
    for value in model.graph.output:
        flow.pin_all(value.name, "an output of the graph")
    _join_claims(flow)
    return flow


def _rule(flow: Flow, node: NodeProto) -> Callable[[Flow, NodeProto], None]:
    known = flow.is_standard(node)
    known &= flow.opset >= OLDEST and not flow.model.training_info
    if known and shape_values.moved(flow, node):
        return shape_values.move
    if node.op_type not in _FOLDED and any(name in flow.folded for name in node.input):
        return _unknown
    if known and node.op_type == "MatMul" and node.input[1] not in flow.stored:
        return attention.product
    if flow.is_contrib(node) and node.op_type in CONTRIB:
        return CONTRIB[node.op_type]
    if known and node.op_type in RULES:
        return RULES[node.op_type]
    return _unknown


def _unknown(flow: Flow, node: NodeProto) -> None:
    raise Opaque("")


def _join_claims(flow: Flow) -> None:
    """A weight that several nodes read is cut for all of them, or for none."""
    claims: dict[str, list[Claim]] = {}
    for claim in flow.claims:
        claims.setdefault(claim.name, []).append(claim)
    for name, found in claims.items():
        first = found[0]
        for claim in found[1:]:
            alike = claim.axes.keys() == first.axes.keys() and claim.groups == first.groups
            if not alike or any(len(claim.axes[a]) != len(first.axes[a]) for a in first.axes):
                _pin(flow, found, f"along {name!r}, which other nodes read in another way")
                break
            for axis, ids in claim.axes.items():
                flow.couple(ids, first.axes[axis])
        if flow.uses[name] != len(found):
            _pin(flow, found, f"along {name!r}, which other nodes read whole")


def _pin(flow: Flow, claims: list[Claim], reason: str) -> None:
    for claim in claims:
        for ids in claim.axes.values():
            flow.pin(ids, reason)
