"""Rules for operators that move channels: transpose, concatenate, split, slice, pad, resize.

Those that merge them with other axes: see `regroup`. Computed shapes: see `shape_values`.
"""

from __future__ import annotations

import itertools

import numpy as np
from onnx import NodeProto

from prune2onnx.graph.walk import attribute, set_attribute
from prune2onnx.shrinking.flow import (
    Channels,
    Flow,
    Ids,
    Kept,
    Opaque,
    label,
    numbers,
    unknown,
)
from prune2onnx.shrinking.operators.regroup import recount
from prune2onnx.shrinking.operators.shape_values import counts


def transpose(flow: Flow, node: NodeProto) -> None:
    """Channels move with their axis."""
    for known in (flow.channels, flow.folded):
        if (channels := known.get(node.input[0])) is not None:
            rank = len(flow.shape(node.input[0]))
            axes = list(attribute(node, "perm", range(rank)[::-1]))
            moved = Channels(axes.index(channels.axis), channels.ids, channels.constants)
            known[node.output[0]] = moved


def squeeze(flow: Flow, node: NodeProto) -> None:
    """Axes of extent 1 are removed."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    axes = flow.whole_numbers(node, "axes", 1)
    if axes is None:
        raise Opaque("of all axes of extent 1")
    gone = {axis % rank for axis in axes}
    if channels.axis in gone:
        raise Opaque("along its channels")
    axis = channels.axis - sum(a < channels.axis for a in gone)
    flow.carry(node, axis, channels.ids, channels.constants)


def unsqueeze(flow: Flow, node: NodeProto) -> None:
    """Axes of extent 1 are added."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    new = flow.whole_numbers(node, "axes", 1) or []
    rank = len(flow.shape(node.input[0])) + len(new)
    old = [axis for axis in range(rank) if axis not in {a % rank for a in new}]
    flow.carry(node, old[channels.axis], channels.ids, channels.constants)


def concat(flow: Flow, node: NodeProto) -> None:
    """Along the axis of the channels, concatenated; along another one, coupled pair by pair."""
    followed = [name for name in node.input if name in flow.channels]
    if not followed:
        return
    first = flow.channels[followed[0]]
    rank = len(flow.shape(followed[0]))
    axis = int(attribute(node, "axis", 1)) % rank
    parts = []
    for name in node.input:
        channels = flow.channels.get(name)
        if channels is None:
            extent = flow.shape(name)[first.axis]
            if extent is None:
                raise Opaque("with values whose number of channels is unknown")
            channels = Channels(first.axis, flow.fresh(extent), unknown(extent))
            flow.pin(channels.ids, f"joined by {label(node)} with a value whose channels stay")
        elif channels.axis != first.axis:
            raise Opaque("with channels on different axes")
        parts.append(channels)
    if axis == first.axis:
        ids = np.concatenate([part.ids for part in parts])
        constants = np.concatenate([part.constants for part in parts])
    else:
        ids, constants = first.ids, first.constants
        for part in parts[1:]:
            flow.couple(part.ids, ids)
            constants = np.where(part.constants == constants, constants, np.nan)
    flow.carry(node, first.axis, ids, constants)


def split(flow: Flow, node: NodeProto) -> None:
    """Along the axis of the channels, split; along another one, the same in each part."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    if int(attribute(node, "axis", 0)) % rank != channels.axis:
        for name in node.output:
            flow.channels[name] = channels
        return
    sizes = flow.whole_numbers(node, "split", 1)
    if sizes is None:
        each = -(-len(channels.ids) // len(node.output))
        sizes = [each] * (len(node.output) - 1)
        sizes.append(len(channels.ids) - sum(sizes))
    if sum(sizes) != len(channels.ids) or min(sizes) < 1:
        raise Opaque("into parts that do not fit")
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    for name, part in zip(node.output, parts, strict=True):
        held = Channels(channels.axis, channels.ids[part], channels.constants[part])
        flow.channels[name] = held

    def edit(kept: Kept) -> None:
        left = [int(kept(channels.ids[part]).sum()) for part in parts]
        if left == sizes:
            return
        if flow.opset < 13:
            set_attribute(node, "split", left)
        else:
            set_attribute(node, "num_outputs", None)
            flow.write(node, 1, numbers(left))

    flow.edits.append(edit)


def slice_(flow: Flow, node: NodeProto) -> None:
    """Consecutive channels, or all of them at some positions."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    shape = flow.shape(node.input[0])
    starts, ends = (flow.whole_numbers(node, name, at) for name, at in (("starts", 1), ("ends", 2)))
    if starts is None or ends is None:
        raise Opaque("in the form of an old opset")
    axes = flow.whole_numbers(node, "axes", 3) or list(range(len(starts)))
    steps = flow.whole_numbers(node, "steps", 4) or [1] * len(starts)
    places = [place for place, axis in enumerate(axes) if axis % len(shape) == channels.axis]
    if not places:
        flow.channels[node.output[0]] = channels
        return
    place, extent = places[0], len(channels.ids)
    begin, end, step = slice(starts[place], ends[place], steps[place]).indices(extent)
    if step != 1 or begin >= end:
        raise Opaque("with a step other than 1 over channels")
    held = channels.constants[begin:end]
    flow.carry(node, channels.axis, channels.ids[begin:end], held)

    def edit(kept: Kept) -> None:
        alive = kept(channels.ids)
        if not alive.all():
            for index, name, values, last in (
                (1, "starts", starts, begin), (2, "ends", ends, end)
            ):  # fmt: skip
                if last == extent and values[place] >= extent:
                    continue  # to the end, at any extent
                places = [*values[:place], int(alive[:last].sum()), *values[place + 1 :]]
                flow.set_numbers(node, name, index, places)

    flow.edits.append(edit)


def pad(flow: Flow, node: NodeProto) -> None:
    """Adds constant channels before and after; along other axes, only that constant stays one."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    pads = flow.whole_numbers(node, "pads", 1)
    axes = list(range(rank))
    if len(node.input) > 3 and node.input[3]:
        axes = [axis % rank for axis in flow.whole_numbers(node, "axes", 3) or []]
    mode = attribute(node, "mode", "constant")
    filler = _filler(flow, node)
    if pads is None or len(pads) != 2 * len(axes):
        raise Opaque("by an unknown amount")
    constants = channels.constants
    around = {a: (pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    front, back = around.pop(channels.axis, (0, 0))
    if mode == "constant" and any(map(any, around.values())):
        constants = np.where(constants == filler, constants, np.nan)
    if not front and not back:
        flow.carry(node, channels.axis, channels.ids, constants)
        return
    if mode != "constant" or front < 0 or back < 0 or filler is None:
        raise Opaque("along its channels")
    before, after = flow.fresh(front), flow.fresh(back)
    held = np.concatenate([np.full(front, filler), constants, np.full(back, filler)])
    flow.carry(node, channels.axis, np.concatenate([before, channels.ids, after]), held)
    place = axes.index(channels.axis)

    def edit(kept: Kept) -> None:
        left = list(pads)
        left[place], left[place + len(axes)] = (int(kept(ids).sum()) for ids in (before, after))
        flow.set_numbers(node, "pads", 1, left)

    flow.edits.append(edit)


def _filler(flow: Flow, node: NodeProto) -> float | None:
    """The value that a Pad pads with; None where it is computed."""
    if attribute(node, "value") is not None:
        return float(attribute(node, "value"))
    if len(node.input) < 3 or not node.input[2]:
        return 0.0
    array = flow.array(node.input[2])
    return None if array is None or array.size != 1 else float(array.ravel()[0])


def gather(flow: Flow, node: NodeProto) -> None:
    """Selects channels, in any order and any number of times, or positions of each."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    axis = int(attribute(node, "axis", 0)) % rank
    chosen = flow.array(node.input[1])
    if axis != channels.axis:
        added = len(flow.shape(node.input[1])) - 1 if axis < channels.axis else 0
        flow.carry(node, channels.axis + added, channels.ids, channels.constants)
        return
    if chosen is None or chosen.ndim != 1:
        raise Opaque("of channels that are computed")
    chosen = chosen % len(channels.ids)
    flow.carry(node, axis, channels.ids[chosen], channels.constants[chosen])

    def edit(kept: Kept) -> None:
        alive = kept(channels.ids)
        if not alive.all():
            places = np.cumsum(alive) - 1
            flow.write(node, 1, places[chosen[alive[chosen]]].astype(chosen.dtype))

    flow.edits.append(edit)


def resize(flow: Flow, node: NodeProto) -> None:
    """Of positions, not of channels; interpolating equal values changes nothing."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    axes = [axis % rank for axis in attribute(node, "axes", range(rank))]
    if channels.axis in axes:
        _resized(flow, node, axes.index(channels.axis), channels.ids)
    constants = channels.constants
    # Cubic weights add up to about 1 only; a crop may reach beyond the image.
    if attribute(node, "mode", "nearest") == "cubic" or "crop" in attribute(
        node, "coordinate_transformation_mode", ""
    ):
        constants = np.where(constants == 0, constants, np.nan)
    if "crop" in attribute(node, "coordinate_transformation_mode", ""):
        constants = unknown(len(constants))
    flow.carry(node, channels.axis, channels.ids, constants)


def _resized(flow: Flow, node: NodeProto, place: int, ids: Ids) -> None:
    """Checks that the axis of the channels is left alone; sizes follow its extent."""
    at = 1 if node.op_type == "Upsample" or len(node.input) == 2 else 2
    scales = attribute(node, "scales")
    if scales is None and len(node.input) > at and node.input[at]:
        scales = flow.array(node.input[at])
        if scales is None:
            raise Opaque("with scales that are computed")
    if scales is not None and len(scales):
        if scales[place] != 1:
            raise Opaque("along its channels")
        return
    sizes = flow.elements(node.input[3]) if len(node.input) > 3 else None
    if sizes is None or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Opaque("to sizes that are computed")
    extent = sizes[place]
    if counts(extent, ids):
        return
    if extent != len(ids):
        raise Opaque("that may be along its channels")
    recount(flow, node, 3, sizes, place, ids)
