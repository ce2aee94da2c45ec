"""Which channels are dead, and which of them can be removed, by what the rules recorded.

How the graph is changed: see `cut`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.shrinking.flow import Flow, Ids

Mask = NDArray[np.bool_]

LAST = "a layer keeps at least one channel"
FULL = "kernels compute several channels at a time, so it costs nothing"
UNEVEN = "the groups of a convolution must keep one size"


@dataclass(frozen=True, eq=False)
class Liveness:
    """What becomes of each channel, by its number.

    Attributes:
        dead: no output depends on it: all weights that read it are zero, or it is constant and
            every reader can absorb the constant into its bias.
        removed: the dead channels that can be removed.
        kept: (what, reason): dead or constant channels of weights, and why they stay.
    """

    dead: Mask
    removed: Mask
    kept: tuple[tuple[str, str], ...]


def liveness_of(flow: Flow, multiple: int = 1) -> Liveness:
    """Finds dead channels; a group is alive as a whole, with all groups that it depends on.

    Args:
        flow: what the rules recorded.
        multiple: live convolutions keep a number of channels that is a multiple of this.
    """
    group_of = channel_groups(flow)
    pinned = np.zeros(flow.count, bool)
    pinned[group_of[list(flow.pinned)]] = True
    dead = ~_needed(flow, group_of, pinned)
    removed, left = _removable(flow, group_of, dead, multiple)
    return Liveness(dead[group_of], removed[group_of], _kept(flow, group_of, removed, left))


def channel_groups(flow: Flow) -> Ids:
    """[channels] the group of each, from 0: all that are coupled, directly or not."""
    from scipy.sparse import coo_array  # late: it takes as long as all other imports together
    from scipy.sparse.csgraph import connected_components

    if not flow.coupled:
        return np.arange(flow.count)
    one, other = (np.concatenate(ids) for ids in zip(*flow.coupled, strict=True))
    joined = coo_array((np.ones(len(one), bool), (one, other)), (flow.count, flow.count))
    return np.asarray(connected_components(joined, directed=False)[1], np.int64)


def _needed(flow: Flow, group_of: Ids, pinned: Mask) -> Mask:
    """Bool, by group: those on which a pinned one depends."""
    needed = pinned.copy()
    before = -1
    while before < (before := int(needed.sum())):
        for link in reversed(flow.links):
            read = link.needs[needed[group_of[link.rows]]].any(axis=0)
            needed[group_of[link.columns[read]]] = True
    return needed


def _removable(flow: Flow, group_of: Ids, dead: Mask, multiple: int) -> tuple[Mask, dict[int, str]]:
    """All dead groups but those that would leave an axis empty or sizes uneven, with the reason."""
    removed = dead.copy()
    left: dict[int, str] = {}

    def leave(ids: Ids, reason: str) -> None:
        for number in group_of[ids]:
            left.setdefault(int(number), reason)
        removed[group_of[ids]] = False

    blocked = [
        layer.channels.ids
        for layer in flow.layers
        if multiple > 1 and layer.node.op_type in ("Conv", "ConvTranspose")
    ]
    before = removed.sum() + 1
    while before > (before := removed.sum()):
        for channels in flow.channels.values():
            if removed[group_of[channels.ids]].all():
                leave(channels.ids[:1], LAST)
        for ids in blocked:
            going = removed[group_of[ids]]
            if not dead[group_of[ids]].all():
                surplus = going & (going.cumsum() <= -int((~going).sum()) % multiple)
                leave(ids[surplus], FULL)
        for rows, columns, groups in flow.grouped:
            sides = [ids.reshape(groups, -1) for ids in (rows, columns)]
            whole = np.logical_and.reduce([removed[group_of[side]].all(axis=1) for side in sides])
            for side in sides:
                parts = side[~whole]
                going = removed[group_of[parts]]
                count = min(int(going.sum(axis=1).min(initial=parts.shape[1])), parts.shape[1] - 1)
                surplus = going & (going.cumsum(axis=1) > count)
                leave(parts[surplus], UNEVEN)
    return removed, left


def _kept(
    flow: Flow, group_of: Ids, removed: Mask, left: dict[int, str]
) -> tuple[tuple[str, str], ...]:
    reasons = {int(group_of[number]): reason for number, reason in flow.notes.items()}
    reasons.update((int(group_of[number]), reason) for number, reason in flow.pinned.items())
    reasons.update(left)
    kept: dict[tuple[str, str], list[int]] = {}
    for layer in flow.layers:
        groups = group_of[layer.channels.ids]
        candidates = ~np.isnan(layer.channels.constants) | np.isin(groups, list(left))
        for place in np.flatnonzero(candidates & ~removed[groups]):
            reason = reasons.get(int(groups[place]), "a coupled channel is alive elsewhere")
            kept.setdefault((layer.weight, reason), []).append(int(place))
    return tuple((f"{weight}{places}", reason) for (weight, reason), places in kept.items())
