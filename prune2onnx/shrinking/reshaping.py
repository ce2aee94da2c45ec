"""Rules for operators that move channels: transpose, concatenate, split, slice, reshape, resize.

Computed shapes, such as that of a Reshape: see `shape_values`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from onnx import NodeProto

from prune2onnx.graph.walk import attribute, set_attribute
from prune2onnx.shrinking.flow import (
    Array,
    Channels,
    Extent,
    Flow,
    Ids,
    Kept,
    Opaque,
    followed,
    label,
    numbers,
    product,
    unknown,
)
from prune2onnx.shrinking.shape_values import counts


def transpose(flow: Flow, node: NodeProto) -> None:
    """Channels move with their axis."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    rank = len(flow.shape(node.input[0]))
    axes = list(attribute(node, "perm", range(rank)[::-1]))
    _set(flow, node, axes.index(channels.axis), channels.ids, channels.constants)


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
    _set(flow, node, axis, channels.ids, channels.constants)


def unsqueeze(flow: Flow, node: NodeProto) -> None:
    """Axes of extent 1 are added."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    new = flow.whole_numbers(node, "axes", 1) or []
    rank = len(flow.shape(node.input[0])) + len(new)
    old = [axis for axis in range(rank) if axis not in {a % rank for a in new}]
    _set(flow, node, old[channels.axis], channels.ids, channels.constants)


def flatten(flow: Flow, node: NodeProto) -> None:
    """All axes before `axis` are merged, and all from it on."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    shape = flow.shape(node.input[0])
    given = int(attribute(node, "axis", 1))
    at = given + len(shape) if given < 0 else given
    if channels.axis < at:
        before, after, axis = shape[: channels.axis], shape[channels.axis + 1 : at], 0
    else:
        before, after, axis = shape[at : channels.axis], shape[channels.axis + 1 :], 1
    _merge(flow, node, channels, axis, product(before), product(after))


def _merge(
    flow: Flow,
    node: NodeProto,
    channels: Channels,
    axis: int,
    before: int | None,
    after: int | None,
) -> None:
    """Each channel becomes `after` rows side by side, and all of them `before` times."""
    if before is None or after is None:
        raise Opaque("with axes whose extent is unknown")
    followed(len(channels.ids) * before * after)
    ids = np.tile(np.repeat(channels.ids, after), before)
    constants = np.tile(np.repeat(channels.constants, after), before)
    _set(flow, node, axis, ids, constants)


def _set(flow: Flow, node: NodeProto, axis: int, ids: Ids, constants: Array) -> None:
    flow.channels[node.output[0]] = Channels(axis, ids, constants)


def reshape(flow: Flow, node: NodeProto) -> None:
    """Merges channels with the axes beside them, or cuts them into blocks of coupled channels."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    if len(node.input) < 2:
        raise Opaque("in the form of an old opset")
    wanted = flow.elements(node.input[1])
    if wanted is None:
        raise Opaque("to a shape that is computed")
    old, new = _comparable(flow.shape(node.input[0]), flow.shape(node.output[0]))
    first, last, outer = _block(old, new, channels.axis)
    wide = [axis for axis in outer if new[axis] != 1] or outer[:1]
    axis = wide[0]
    if len(wide) == 1:
        before, after = product(old[first : channels.axis]), product(old[channels.axis + 1 : last])
        _merge(flow, node, channels, axis, before, after)
    elif all(old[a] == 1 for a in range(first, last) if a != channels.axis):
        count = new[axis]
        _join_blocks(flow, node, axis, channels, lambda values: values.reshape(count, -1))
    else:
        raise Opaque("that splits channels and merges them in another way")
    _reshaped(flow, node, wanted, axis, channels)


def _comparable(
    old: Sequence[int | None], new: Sequence[int | None]
) -> tuple[list[int], list[int]]:
    """Shapes that compare: with a prime for the one unknown extent, most often the batch."""
    unknown_old = [axis for axis, extent in enumerate(old) if extent is None]
    unknown_new = [axis for axis, extent in enumerate(new) if extent is None]
    rest = [product([e for e in shape if e is not None]) for shape in (old, new)]
    if (
        0 in (*old, *new)
        or len(unknown_old) > 1
        or len(unknown_old) != len(unknown_new)
        or rest[0] != rest[1]
    ):
        raise Opaque("with axes whose extent is unknown")
    prime = 2**61 - 1
    return [prime if e is None else e for e in old], [prime if e is None else e for e in new]


def _block(old: list[int], new: list[int], axis: int) -> tuple[int, int, list[int]]:
    """(first, last, axes): old axes first:last, `axis` among them, become these new axes."""
    start = end = first = last = 0
    while last <= axis:
        start, first = end, last
        last, end = last + 1, end + 1
        if end > len(new):
            raise Opaque("to a shape that does not fit")
        while (inner := product(old[first:last])) != (outer := product(new[start:end])):
            last, end = (last + 1, end) if inner < outer else (last, end + 1)  # type: ignore[operator]
            if last > len(old) or end > len(new):
                raise Opaque("to a shape that does not fit")
    return first, last, list(range(start, end))


def _reshaped(
    flow: Flow, node: NodeProto, wanted: list[Extent], axis: int, source: Channels
) -> None:
    """Rewrites the shape that a Reshape reads, where it does not follow by itself."""
    ids = flow.channels[node.output[0]].ids
    extent = wanted[axis]
    zeros = [place for place, one in enumerate(wanted) if isinstance(one, int) and one == 0]
    if not attribute(node, "allowzero", 0) and source.axis in zeros and source.axis != axis:
        raise Opaque("that repeats the number of channels elsewhere")
    others = [one for place, one in enumerate(wanted) if place != axis]
    if any(isinstance(one, np.ndarray) for one in others):
        raise Opaque("that repeats a number of channels elsewhere")
    if counts(extent, ids):
        return
    if isinstance(extent, int) and (extent == -1 or (extent == 0 and axis == source.axis)):
        return
    shape = [-1 if one is None else one for one in wanted if not isinstance(one, np.ndarray)]
    if not isinstance(extent, int) or (None in others and shape.count(-1) > 1):
        raise Opaque("to a shape that is computed")
    _recounted(flow, node, 1, shape, axis, ids)


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
    _set(flow, node, first.axis, ids, constants)


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
    _set(flow, node, channels.axis, channels.ids[begin:end], held)

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
        _set(flow, node, channels.axis, channels.ids, constants)
        return
    if mode != "constant" or front < 0 or back < 0 or filler is None:
        raise Opaque("along its channels")
    before, after = flow.fresh(front), flow.fresh(back)
    held = np.concatenate([np.full(front, filler), constants, np.full(back, filler)])
    _set(flow, node, channels.axis, np.concatenate([before, channels.ids, after]), held)
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
        _set(flow, node, channels.axis + added, channels.ids, channels.constants)
        return
    if chosen is None or chosen.ndim != 1:
        raise Opaque("of channels that are computed")
    chosen = chosen % len(channels.ids)
    _set(flow, node, axis, channels.ids[chosen], channels.constants[chosen])

    def edit(kept: Kept) -> None:
        alive = kept(channels.ids)
        if not alive.all():
            places = np.cumsum(alive) - 1
            flow.write(node, 1, places[chosen[alive[chosen]]].astype(chosen.dtype))

    flow.edits.append(edit)


def depth_to_space(flow: Flow, node: NodeProto) -> None:
    """Blocks of channels become the positions of one."""
    channels = flow.at(node.input[0], 1)
    if channels is None:
        return
    square = int(attribute(node, "blocksize")) ** 2
    if attribute(node, "mode", "DCR") == "CRD":
        _join_blocks(flow, node, 1, channels, lambda values: values.reshape(-1, square))
    else:
        _join_blocks(flow, node, 1, channels, lambda values: values.reshape(square, -1).T)


def space_to_depth(flow: Flow, node: NodeProto) -> None:
    """All channels for the first position of each block, then for the second, and so on."""
    channels = flow.at(node.input[0], 1)
    if channels is not None:
        _merge(flow, node, channels, 1, int(attribute(node, "blocksize")) ** 2, 1)


def _join_blocks(
    flow: Flow, node: NodeProto, axis: int, channels: Channels, blocks: Callable[[Array], Array]
) -> None:
    """Each block of channels, a row of `blocks`, becomes one channel."""
    ids, held = blocks(channels.ids), blocks(channels.constants)
    for column in ids.T[1:]:
        flow.couple(ids[:, 0], column)
    constants = np.where((held == held[:, :1]).all(axis=1), held[:, 0], np.nan)
    _set(flow, node, axis, ids[:, 0], constants)


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
    _set(flow, node, channels.axis, channels.ids, constants)


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
    rest = [one for one in sizes if isinstance(one, int)]
    if extent != len(ids) or len(rest) < len(sizes):
        raise Opaque("that may be along its channels")
    _recounted(flow, node, 3, rest, place, ids)


def _recounted(
    flow: Flow, node: NodeProto, index: int, extents: list[int], axis: int, ids: Ids
) -> None:
    """Rewrites the extents that a node reads, where channels are removed from an axis."""

    def edit(kept: Kept) -> None:
        count = int(kept(ids).sum())
        if count != extents[axis]:
            flow.write(node, index, numbers([*extents[:axis], count, *extents[axis + 1 :]]))

    flow.edits.append(edit)
