"""What each operator does with channels.

A rule reads a node and tells the flow; an operator that is not in the table, or a node for which
its rule raises Opaque, is taken as one that reads everything.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import numpy as np
from onnx import ModelProto, NodeProto

from prune2onnx.graphs import DEFAULT_DOMAINS
from prune2onnx.shrink import channelwise, extents, moves, sums
from prune2onnx.shrink.flow import Claim, Flow, Opaque, label

RULES: Mapping[str, Callable[[Flow, NodeProto], None]] = {
    # sums over channels
    "Conv": sums.conv,
    "ConvTranspose": sums.conv_transpose,
    "Gemm": sums.gemm,
    "MatMul": sums.matmul,
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
    "Concat": moves.concat,
    "DepthToSpace": moves.depth_to_space,
    "Flatten": moves.flatten,
    "Gather": moves.gather,
    "Pad": moves.pad,
    "Reshape": moves.reshape,
    **dict.fromkeys(("Resize", "Upsample"), moves.resize),
    "Slice": moves.slice_,
    "SpaceToDepth": moves.space_to_depth,
    "Split": moves.split,
    "Squeeze": moves.squeeze,
    "Transpose": moves.transpose,
    "Unsqueeze": moves.unsqueeze,
    # how many there are
    "Shape": extents.shape,
}

OLDEST = 7
"""The first operator set in which arithmetic broadcasts as numpy does."""


def trace(model: ModelProto, may_add: bool = True) -> Flow:
    """Follows the channels of a model through its main graph.

    Args:
        model: of which the flow will know; not changed here.
        may_add: whether a new initializer may take a constant where there is no bias.
    """
    flow = Flow(model, may_add)
    functions = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        before = [len(found) for found in flow.found]
        try:
            with np.errstate(all="ignore"):  # what is not finite is not known
                _rule(flow, node, functions)(flow, node)
        except Opaque as why:
            for found, count in zip(flow.found, before, strict=True):
                del found[count:]
            flow.seal(node, str(why))
        if not extents.follows(flow, node):
            for name in flow.extents.keys() & set(node.input):
                flow.pin_all(name, f"counted by {label(node)}")
    for value in model.graph.output:
        flow.pin_all(value.name, "an output of the graph")
    _join_claims(flow)
    return flow


def _rule(
    flow: Flow, node: NodeProto, functions: Container[tuple[str, str]]
) -> Callable[[Flow, NodeProto], None]:
    own = node.domain in DEFAULT_DOMAINS and (node.domain, node.op_type) not in functions
    own &= flow.opset >= OLDEST and not flow.model.training_info
    if own and extents.moved(flow, node):
        return extents.move
    if own and node.op_type in RULES:
        return RULES[node.op_type]
    return _unknown


def _unknown(flow: Flow, node: NodeProto) -> None:
    raise Opaque("")


def _join_claims(flow: Flow) -> None:
    """What several nodes read is cut for all of them, or for none."""
    claims: dict[str, list[Claim]] = {}
    for claim in flow.claims:
        claims.setdefault(claim.name, []).append(claim)
    for name, found in claims.items():
        first = found[0]
        for claim in found[1:]:
            if claim.axes.keys() != first.axes.keys() or claim.groups != first.groups:
                _pin(flow, found, f"along {name!r}, which other nodes read in another way")
                break
            for axis, ids in claim.axes.items():
                flow.unite(ids, first.axes[axis])
        if flow.uses[name] != len(found):
            _pin(flow, found, f"along {name!r}, which other nodes read whole")


def _pin(flow: Flow, claims: list[Claim], reason: str) -> None:
    for claim in claims:
        for ids in claim.axes.values():
            flow.pin(ids, reason)
