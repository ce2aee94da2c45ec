"""Rules for operators that merge channels with axes beside them, or cut them into blocks.

Reshape, Flatten, DepthToSpace and SpaceToDepth; Expand, which repeats them. Merged axes count each
channel several times; blocks of channels, such as the heads of attention, stay or go together.

Several extents may be unknown, such as those of the batch and of the sequence. They are compared by
their names, as primes. An axis that counts channels within each example of an unknown number, as of
the keys that exporters transpose in three axes, is followed until another Reshape (`Flow.folded`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import NodeProto

from prune2onnx.graph.walk import attribute
from prune2onnx.shrinking.flow import (
    Array,
    Channels,
    Extent,
    Flow,
    Ids,
    Kept,
    Opaque,
    followed,
    numbers,
    product,
)
from prune2onnx.shrinking.operators.shape_values import counts, part_of

_PRIMES = tuple(2**power - 1 for power in (61, 89, 107, 127, 521, 607, 1279, 2203))
"""In place of unknown extents: so large that no product of known ones is equal."""


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
    flow.carry(node, axis, ids, constants)


def reshape(flow: Flow, node: NodeProto) -> None:
    """Merges channels with the axes beside them, or cuts them into blocks of coupled channels."""
    folded = flow.folded.get(node.input[0])
    channels = folded or flow.channels.get(node.input[0])
    if channels is None:
        return
    if len(node.input) < 2:
        raise Opaque("in the form of an old opset")
    wanted = flow.elements(node.input[1])
    if wanted is None:
        raise Opaque("to a shape that is computed")
    old, new = _comparable(flow, node, wanted)
    first, last, outer = _block(old, new, channels.axis)
    wide = [axis for axis in outer if new[axis] != 1] or outer[:1]
    axis, alone = wide[0], all(old[a] == 1 for a in range(first, last) if a != channels.axis)
    before, after = _known(old[first : channels.axis]), _known(old[channels.axis + 1 : last])
    if folded is not None:
        axis = wide[-1]
        if not alone or new[axis] != len(folded.ids):
            raise Opaque("that splits an axis of channels of each example in another way")
        flow.carry(node, axis, folded.ids, folded.constants)
    elif before is None and after == 1 and len(wide) < 3:
        each = 1 if len(wide) == 1 else new[wide[1]]
        if len(channels.ids) % each:
            raise Opaque("that splits channels and merges them in another way")
        _join_blocks(flow, node, axis, channels, lambda values: values.reshape(-1, each))
        flow.folded[node.output[0]] = flow.channels.pop(node.output[0])
    elif len(wide) == 1:
        _merge(flow, node, channels, axis, before, after)
    elif alone:
        selected = _selected(flow, node.output[0], {axis: axis for axis in wide})
        axis = next((axis for axis in wide if axis not in selected), axis)
        extents, at = [new[axis] for axis in wide], wide.index(axis)

        def blocks(values: Array) -> Array:
            return np.moveaxis(values.reshape(extents), at, 0).reshape(extents[at], -1)

        _join_blocks(flow, node, axis, channels, blocks)
    else:
        raise Opaque("that splits channels and merges them in another way")
    _reshaped(flow, node, wanted, axis, channels)


def _known(extents: Sequence[int]) -> int | None:
    """A product of extents; None where one is unknown."""
    found = product(extents)
    return None if found is None or found >= _PRIMES[0] else found


def _comparable(
    flow: Flow, node: NodeProto, wanted: Sequence[Extent]
) -> tuple[list[int], list[int]]:
    """The shapes before and after a Reshape, primes in place of unknown extents.

    Names that both have are equal. What is left of one follows from the others, since the number
    of elements stays: for all extents, as they are primes.
    """
    old: list[int | str] = [
        extent or f"{node.input[0]}[{axis}]"
        for axis, extent in enumerate(flow.symbols(node.input[0]))
    ]
    stated = flow.symbols(node.output[0])
    if len(stated) != len(wanted):
        raise Opaque("to a shape that does not fit")
    names = {name for name in old if isinstance(name, str)}
    repeats = not attribute(node, "allowzero", 0)
    new: list[int | str] = []
    for axis, pair in enumerate(zip(stated, wanted, strict=True)):
        copied = old[axis] if repeats and isinstance(pair[1], int) and pair[1] == 0 else None
        new.append(f"{node.output[0]}[{axis}]" if copied is None else copied)
        if copied is None and (extent := _extent(names, *pair)) is not None:
            new[-1] = extent
    if 0 in (*old, *new):
        raise Opaque("with axes whose extent is unknown")
    return _solved(old, new)


def _solved(old: list[int | str], new: list[int | str]) -> tuple[list[int], list[int]]:
    """Numbers for extents with names, so that both shapes have the same product."""
    names = dict.fromkeys(one for one in (*old, *new) if isinstance(one, str))
    if len(names) > len(_PRIMES):
        raise Opaque("with axes whose extent is unknown")
    value = dict(zip(names, _PRIMES, strict=False))
    before = [name for name in old if isinstance(name, str) and name not in new]
    after = [name for name in new if isinstance(name, str) and name not in old]

    def filled(shape: list[int | str]) -> list[int]:
        return [value[one] if isinstance(one, str) else one for one in shape]

    for own, shape, other in ((after, new, old), (before, old, new)):
        whole, rest = product(filled(other)), product(filled(shape))
        assert whole is not None and rest is not None
        if whole == rest:
            break
        if len(own) == 1:
            each = rest // value[own[0]]
            if whole % each == 0:
                value[own[0]] = whole // each
                break
    else:
        raise Opaque("to a shape that does not fit")
    return filled(old), filled(new)


def _extent(names: set[str], stated: int | str, wanted: Extent) -> int | str | None:
    """An extent after a Reshape, by what the graph states and what is computed for it."""
    if isinstance(stated, int):
        return stated
    for name in (stated, wanted):
        if isinstance(name, str) and name in names:
            return name
    if isinstance(wanted, np.ndarray):
        return len(wanted)
    return wanted if isinstance(wanted, int) and wanted > 0 else None


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


def _selected(flow: Flow, name: str, axes: dict[int, int]) -> set[int]:
    """Those of a value's axes along which parts of it are read, such as query, key and value.

    Args:
        flow: with the readers.
        name: the value.
        axes: its axes -> what they are called in the result.
    """
    found: set[int] = set()
    for reader in flow.readers.get(name, ()):
        op = reader.op_type
        if op == "Transpose" and (order := attribute(reader, "perm")) is not None:
            moved = {at: axes[old] for at, old in enumerate(order) if old in axes}
            found |= _selected(flow, reader.output[0], moved)
        elif op in ("Squeeze", "Unsqueeze"):
            changed = flow.whole_numbers(reader, "axes", 1) or []
            rank = len(flow.shape(name if op == "Squeeze" else reader.output[0]))
            places = [at for at in range(rank) if at not in {axis % rank for axis in changed}]
            pairs = enumerate(places) if op == "Squeeze" else ((p, i) for i, p in enumerate(places))
            moved = {new: axes[old] for new, old in pairs if old in axes}
            found |= _selected(flow, reader.output[0], moved)
        elif op in ("Gather", "Split", "Slice"):
            rank = len(flow.shape(name))
            if op == "Slice":
                read = flow.whole_numbers(reader, "axes", 3) or []
            else:
                read = [int(attribute(reader, "axis", 0))]
            found |= {axes[axis % rank] for axis in read if axis % rank in axes}
    return found


def _reshaped(
    flow: Flow, node: NodeProto, wanted: list[Extent], axis: int, source: Channels
) -> None:
    """Rewrites the shape that a Reshape reads, where it does not follow by itself."""
    made = flow.channels.get(node.output[0]) or flow.folded[node.output[0]]
    extent = wanted[axis]
    zeros = [place for place, one in enumerate(wanted) if isinstance(one, int) and one == 0]
    if not attribute(node, "allowzero", 0) and source.axis in zeros and source.axis != axis:
        raise Opaque("that repeats the number of channels elsewhere")
    if any(isinstance(one, np.ndarray) for place, one in enumerate(wanted) if place != axis):
        raise Opaque("that repeats a number of channels elsewhere")
    if node.output[0] in flow.folded:
        if extent != -1:
            recount(flow, node, 1, wanted, axis, made.ids, folded=True)
        return
    if counts(extent, made.ids):
        return
    if isinstance(extent, int) and (extent == -1 or (extent == 0 and axis == source.axis)):
        return
    recount(flow, node, 1, wanted, axis, made.ids)


def recount(
    flow: Flow,
    node: NodeProto,
    index: int,
    wanted: Sequence[Extent],
    axis: int,
    ids: Ids,
    *,
    folded: bool = False,
) -> None:
    """Rewrites the extents that a node reads, where channels are removed from an axis.

    Args:
        flow: changed when channels are cut.
        node: that reads a shape.
        index: of the input with the shape.
        wanted: its elements.
        axis: of the element that counts channels.
        ids: the channels.
        folded: whether it counts those of all examples; then it becomes -1.

    Raises:
        Opaque: that element is computed.
    """
    extent = wanted[axis]
    if not folded and not isinstance(extent, int):
        raise Opaque("to a shape that is computed")
    fixed = [one if isinstance(one, int) else -1 for one in wanted]
    if folded and -1 in (*fixed[:axis], *fixed[axis + 1 :]) and -1 in wanted:
        raise Opaque("to a shape that is computed")
    may_state = node.op_type == "Reshape" or all(isinstance(one, int) for one in wanted)
    stated = may_state and fixed.count(-1) < 2
    part = -1 if stated else _part(flow, node.input[index], axis)

    def edit(kept: Kept) -> None:
        alive = kept(ids)
        if alive.all():
            return
        count = -1 if folded else int(alive.sum())
        if stated:
            flow.write(node, index, numbers([*fixed[:axis], count, *fixed[axis + 1 :]]))
        else:
            _write_part(flow, node, index, part, count)

    flow.edits.append(edit)


def _part(flow: Flow, name: str, axis: int) -> int:
    """Which input of the Concat that makes a shape is the element of an axis.

    Raises:
        Opaque: none is, alone.
    """
    concat = flow.makers.get(name)
    if concat is not None and concat.op_type == "Concat":
        begin = 0
        for at, part in enumerate(concat.input):
            count = len(part_of(flow, part))
            if begin == axis and count == 1:
                return at
            begin += count
    raise Opaque("to a shape that is computed")


def _write_part(flow: Flow, node: NodeProto, index: int, part: int, count: int) -> None:
    """Lets a node read a shape like the one that a Concat makes, with another element in it."""
    old = node.input[index]
    key = old, part, count
    nodes = flow.model.graph.node
    if key not in flow.shapes_made:
        concat = NodeProto()
        concat.CopyFrom(flow.makers[old])
        concat.output[0] = flow.shapes_made[key] = flow.names.fresh(old)
        concat.name = ""
        flow.uses.update(concat.input)
        flow.write(concat, part, numbers([count]), stem=f"{old}_count")
        at = next(place for place, one in enumerate(nodes) if one.output[:1] == node.output[:1])
        nodes.insert(at, concat)
    node.input[index] = flow.shapes_made[key]
    flow.uses[old] -= 1
    flow.uses[node.input[index]] += 1
    if not flow.uses[old]:
        nodes.remove(flow.makers[old])


def expand(flow: Flow, node: NodeProto) -> None:
    """Repeats a value along axes of extent 1; other axes stay."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    wanted = flow.elements(node.input[1])
    if wanted is None:
        raise Opaque("to a shape that is computed")
    rank = len(flow.shape(node.input[0]))
    place = channels.axis - rank + len(wanted)
    if place < 0:
        flow.carry(node, channels.axis, channels.ids, channels.constants)
        return
    extent = wanted[place]
    if len(channels.ids) == 1 and extent != 1 and not counts(extent, channels.ids):
        raise Opaque("that repeats its channel")
    axis = max(place, channels.axis)
    flow.carry(node, axis, channels.ids, channels.constants)
    if extent != 1 and not counts(extent, channels.ids):
        recount(flow, node, 1, wanted, place, channels.ids)


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
    flow.carry(node, axis, ids[:, 0], constants)
