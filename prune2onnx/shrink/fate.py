"""Which channels are dead, and which of them can go: conclusions from what the rules found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.shrink.flow import Flow, Ids

Mask = NDArray[np.bool_]

LAST = "something has to be left of it"
FULL = "kernels compute several channels at a time, so it costs nothing"
UNEVEN = "groups of one convolution must stay of one size"


@dataclass(frozen=True, eq=False)
class Fate:
    """What becomes of each channel, by its number.

    Attributes:
        dead: nobody needs it: read with weights of zero alone, or constant, and every reader can
            take that constant into its bias.
        gone: of these, those that are taken away.
        kept: (what, reason): dead or constant channels of weights, and why they stay.
    """

    dead: Mask
    gone: Mask
    kept: tuple[tuple[str, str], ...]


def decide(flow: Flow, multiple: int = 1) -> Fate:
    """Channels that are one share their fate; what must stay needs all that it is made from.

    Args:
        flow: what the rules found.
        multiple: of which convolutions keep their channels, where any is alive.
    """
    family = families(flow)
    pinned = np.zeros(flow.count, bool)
    pinned[family[list(flow.pinned)]] = True
    dead = ~_needed(flow, family, pinned)
    gone, left = _can_go(flow, family, dead, multiple)
    return Fate(dead[family], gone[family], _kept(flow, family, gone, left))


def families(flow: Flow) -> Ids:
    """[count] one number, from 0, for all channels that are one."""
    from scipy.sparse import coo_array  # late: it takes as long as all other imports together
    from scipy.sparse.csgraph import connected_components

    if not flow.same:
        return np.arange(flow.count)
    one, other = (np.concatenate(ids) for ids in zip(*flow.same, strict=True))
    joined = coo_array((np.ones(len(one), bool), (one, other)), (flow.count, flow.count))
    return np.asarray(connected_components(joined, directed=False)[1], np.int64)


def _needed(flow: Flow, family: Ids, pinned: Mask) -> Mask:
    needed = pinned.copy()
    before = -1
    while before < (before := int(needed.sum())):
        for link in reversed(flow.links):
            read = link.needs[needed[family[link.rows]]].any(axis=0)
            needed[family[link.columns[read]]] = True
    return needed


def _can_go(flow: Flow, family: Ids, dead: Mask, multiple: int) -> tuple[Mask, dict[int, str]]:
    """All that are dead, but for those that would leave an axis empty, or a size uneven."""
    gone = dead.copy()
    left: dict[int, str] = {}

    def leave(ids: Ids, reason: str) -> None:
        for number in family[ids]:
            left.setdefault(int(number), reason)
        gone[family[ids]] = False

    blocked = [
        layer.channels.ids
        for layer in flow.layers
        if multiple > 1 and layer.node.op_type in ("Conv", "ConvTranspose")
    ]
    before = gone.sum() + 1
    while before > (before := gone.sum()):
        for channels in flow.channels.values():
            if gone[family[channels.ids]].all():
                leave(channels.ids[:1], LAST)
        for ids in blocked:
            going = gone[family[ids]]
            if not dead[family[ids]].all():
                surplus = going & (going.cumsum() <= -int((~going).sum()) % multiple)
                leave(ids[surplus], FULL)
        for rows, columns, groups in flow.grouped:
            sides = [ids.reshape(groups, -1) for ids in (rows, columns)]
            whole = np.logical_and.reduce([gone[family[side]].all(axis=1) for side in sides])
            for side in sides:
                parts = side[~whole]
                going = gone[family[parts]]
                count = min(int(going.sum(axis=1).min(initial=parts.shape[1])), parts.shape[1] - 1)
                surplus = going & (going.cumsum(axis=1) > count)
                leave(parts[surplus], UNEVEN)
    return gone, left


def _kept(flow: Flow, family: Ids, gone: Mask, left: dict[int, str]) -> tuple[tuple[str, str], ...]:
    reasons = {int(family[number]): reason for number, reason in flow.notes.items()}
    reasons.update((int(family[number]), reason) for number, reason in flow.pinned.items())
    reasons.update(left)
    kept: dict[tuple[str, str], list[int]] = {}
    for layer in flow.layers:
        families = family[layer.channels.ids]
        candidates = ~np.isnan(layer.channels.constants) | np.isin(families, list(left))
        for place in np.flatnonzero(candidates & ~gone[families]):
            reason = reasons.get(int(families[place]), "the same channel is alive elsewhere")
            kept.setdefault((layer.weight, reason), []).append(int(place))
    return tuple((f"{weight}{places}", reason) for (weight, reason), places in kept.items())
