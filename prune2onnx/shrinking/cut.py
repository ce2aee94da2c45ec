"""Removes channels from a model: dead ones become zero, then weights lose them.

Which channels these are: see `liveness`.
"""

from __future__ import annotations

import numpy as np

from prune2onnx.graph.protobuf import keep
from prune2onnx.graph.tensors import replace
from prune2onnx.shrinking.branches import remove_unread
from prune2onnx.shrinking.flow import Array, Claim, Flow, Link
from prune2onnx.shrinking.liveness import Liveness, Mask


def with_constants_propagated(flow: Flow, dead: Mask) -> dict[str, Array]:
    """Zeroes the weights of dead channels and adds their constants to the biases that follow.

    Returns:
        New values, in the same shape, of the weights that change. Where the flow may add
        initializers, new biases are in its model already.
    """
    values: dict[str, Array] = {}
    whole = {claim.name for claim in flow.claims if not claim.zeroed}
    for claim in flow.claims:
        if claim.name not in whole:
            old = values.get(claim.name, flow.values(claim.name))
            dead_elements = ~_alive(claim, old, dead) & (old != 0)
            if dead_elements.any():
                values[claim.name] = np.where(dead_elements, old.dtype.type(0), old)
    for link in flow.links:
        _propagate(flow, link, dead, values)
    return values


def _propagate(flow: Flow, link: Link, dead: Mask, values: dict[str, Array]) -> None:
    """Adds the constants of dead channels to the bias of a sum."""
    amounts = link.amounts[:, dead[link.columns[link.known]]].sum(axis=1)
    amounts[dead[link.rows]] = 0
    if link.bias is None or not amounts.any():
        return
    node, index = link.bias.node, link.bias.index
    name = node.input[index] if len(node.input) > index else ""
    weight = link.node.input[1]
    zeros = np.zeros(len(link.rows), flow.values(weight).dtype)
    old = values.get(name, flow.values(name)) if name else zeros
    new = (old.astype(np.float64) + amounts / link.bias.factor).astype(old.dtype)
    if flow.uses[name] == 1 and new.shape == old.shape:
        values[name] = new
        return
    stem = weight.removesuffix(".weight")
    name = flow.write(node, index, new, f"{stem}.bias")
    flow.claims.append(Claim(name, {new.ndim - 1: link.rows}, zeroed=True))


def cut(flow: Flow, liveness: Liveness) -> None:
    """Removes channels from weights, attributes and declared shapes."""
    values = with_constants_propagated(flow, liveness.dead)
    for claim in {claim.name: claim for claim in flow.claims}.values():
        old = values.get(claim.name, flow.values(claim.name))
        if any(liveness.removed[ids].any() for ids in claim.axes.values()):
            values[claim.name] = _without(claim, old, liveness.removed)
    for name, array in values.items():
        replace(flow.stored[name], array)
    for edit in flow.edits:
        edit(lambda ids: ~liveness.removed[ids])
    if flow.shapes_made:
        remove_unread(flow.model)
    keep(flow.model.graph.value_info, lambda value: value.name not in flow.folded)
    for value in flow.model.graph.value_info:
        channels = flow.channels.get(value.name)
        if channels is not None and liveness.removed[channels.ids].any():
            extents = value.type.tensor_type.shape.dim
            if channels.axis >= len(extents):
                continue  # its shape, or even its type, is not stated
            extents[channels.axis].dim_value = int((~liveness.removed[channels.ids]).sum())


def _channels_of_groups(claim: Claim, array: Array) -> tuple[Array, Array]:
    """Channels of a grouped weight: along axis 0, and those that each row reads."""
    each = array.shape[0] // claim.groups
    return claim.axes[0], claim.axes[1].reshape(claim.groups, -1).repeat(each, axis=0)


def _alive(claim: Claim, array: Array, dead: Mask) -> Mask:
    """Elements that belong to no dead channel, broadcastable to the weight."""
    alive = np.ones((1,) * array.ndim, bool)
    if claim.groups > 1:
        rows, columns = _channels_of_groups(claim, array)
        both = ~dead[rows][:, None] & ~dead[columns]
        return both.reshape(*both.shape, *(1,) * (array.ndim - 2))
    for axis, ids in claim.axes.items():
        shape = [1] * array.ndim
        shape[axis] = -1
        alive = alive & ~dead[ids].reshape(shape)
    return alive


def _without(claim: Claim, array: Array, removed: Mask) -> Array:
    """The weight without the channels removed."""
    if claim.groups > 1:
        rows, columns = (~removed[ids] for ids in _channels_of_groups(claim, array))
        return array[rows][columns[rows]].reshape(int(rows.sum()), -1, *array.shape[2:])
    for axis, ids in claim.axes.items():
        array = array.compress(~removed[ids], axis)
    return array
