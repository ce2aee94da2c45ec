"""Which channels, neurons and units of a network can go, by examples, and what is left to refit.

A channel group (`shrinking.structure`) goes as a whole. What that costs is what the layers that
read it cannot make up for: with inputs S of a layer gone and the others refit, the error of its
outputs grows by w_S' ((H^-1)_SS)^-1 w_S, with H the second moments of the inputs that are left
(Optimal Brain Surgeon for groups; Hassibi and Stork, NIPS 1992). It is compared for each element
of all weights that goes with the group, and computed again whenever a group is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.calibration.layers import Layer
from prune2onnx.packing.calibration.moments import PRUNING, Moments
from prune2onnx.shrinking.structure import BLOCK, LayerCost, Structure

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Read:
    """A layer that reads channel groups.

    Attributes:
        layer: the same.
        found: the moments of its inputs.
        columns: [groups, inputs] the channel group of each input.
        rows: [groups, outputs] the channel group of each output.
        importance: of its relative error, for the network.
    """

    layer: Layer
    found: Moments
    columns: NDArray[np.int64]
    rows: NDArray[np.int64]
    importance: float


def read_by(layer: Layer, found: Moments, cost: LayerCost, importance: float) -> Read | None:
    """A layer as it reads channel groups; None where it reads none that could go."""
    if cost.columns is None or not len(cost.columns) or not len(cost.rows) or layer.is_table:
        return None
    groups, inputs, outputs = layer.shape
    places, rest = divmod(groups * inputs, len(cost.columns))
    taps, more = divmod(groups * outputs, len(cost.rows))  # of a transposed convolution
    if rest or more or layer.scale is not None:
        return None
    columns = np.repeat(cost.columns, places).reshape(groups, inputs)
    rows = np.repeat(cost.rows, taps).reshape(groups, outputs)
    return Read(layer, found, columns, rows, importance)


def channels_in(structure: Structure, reads: Mapping[str, Read], fraction: float) -> Mask:
    """The channel groups that go: one after the other, the one that costs least.

    Args:
        structure: of the network.
        reads: the layers that can be refit, by the names of their weights.
        fraction: of the elements of all weights, about which goes if enough groups may;
            convolutions keep multiples of `BLOCK` channels.

    Returns:
        bool [groups].
    """
    sizes = _Sizes(structure)
    may = ~structure.fixed
    for cost in structure.layers:  # what reads a group has to be refit
        if cost.columns is not None and cost.weight not in reads:
            may[cost.columns] = False
    read = np.zeros(len(may), bool)
    for each in reads.values():
        read[each.columns] = True
    may &= read
    gone = np.zeros(len(may), bool)
    blocks = _blocks(structure, reads)
    free = np.ones(len(may), bool)
    free[np.concatenate([np.zeros(0, np.int64), *blocks])] = False
    sets = [(own, BLOCK) for own in blocks] + [(np.flatnonzero(free), 1)]
    states = [one for each in reads.values() for one in _states(each, len(may))]
    while sizes.gone(gone) < fraction:
        score = sum((one.effects for one in states), np.zeros(len(may)))
        score = np.where(may & ~gone, score / np.maximum(sizes.saved(gone), 1), np.inf)
        going = []
        for own, multiple in sets:
            left = own[may[own] & ~gone[own]]
            count = len(left) % multiple or multiple
            if len(left) > count:
                going.append((float(score[left].min()), left, count))
        for _, left, count in sorted(going, key=lambda one: one[0]):
            if sizes.leaves_some(gone, left[np.argsort(score[left])[:count]]):
                break
        else:
            break
        for number in range(count):
            if number:
                score = sum((one.effects for one in states), np.zeros(len(may)))
            group = int(left[np.where(gone[left], np.inf, score[left]).argmin()])
            gone[group] = True
            for state in states:
                state.remove(group)
    return gone


def _blocks(structure: Structure, reads: Mapping[str, Read]) -> list[NDArray[np.int64]]:
    """Channel groups of which a multiple stays: those of the outputs of each convolution."""
    found = {}
    for cost in structure.layers:
        if cost.weight in reads and reads[cost.weight].layer.weight.array.ndim > 2:
            own = np.unique(cost.rows)
            found[own.tobytes()] = own
    return list(found.values())


class _Sizes:
    """How many elements of all weights go with each channel group."""

    def __init__(self, structure: Structure) -> None:
        self._layers = structure.layers
        count = len(structure.fixed)
        self._rows = [np.bincount(each.rows, minlength=count) for each in self._layers]
        self._columns = [
            None if each.columns is None else np.bincount(each.columns, minlength=count)
            for each in self._layers
        ]

    def gone(self, gone: Mask) -> float:
        """The fraction of all elements that goes with some groups."""
        left = sum(each.size * self._left(number, gone) for number, each in enumerate(self._layers))
        return 1 - left / max(sum(each.size for each in self._layers), 1)

    def _left(self, number: int, gone: Mask) -> float:
        rows, columns = self._rows[number], self._columns[number]
        part = rows[~gone].sum() / rows.sum()
        return float(part if columns is None else part * columns[~gone].sum() / columns.sum())

    def saved(self, gone: Mask) -> NDArray[np.float64]:
        """[groups] elements that go with each one more."""
        found = np.zeros(len(gone))
        for each, rows, columns in zip(self._layers, self._rows, self._columns, strict=True):
            part = rows / rows.sum()
            if columns is None:
                found += each.size * part
                continue
            other = columns / columns.sum()
            found += each.size * (part * other[~gone].sum() + other * part[~gone].sum())
        return found

    def leaves_some(self, gone: Mask, some: NDArray[np.int64]) -> bool:
        """Whether each layer still has an output without some more groups."""
        after = gone.copy()
        after[some] = True
        return all(rows[~after].any() for rows in self._rows)


class _State:
    """A matrix of a layer, from which inputs go; those that are left are refit.

    Attributes:
        effects: [groups] what each channel group costs, relative to the outputs' power.
    """

    def __init__(
        self,
        inverse: NDArray[np.float64],
        weights: NDArray[np.float64],
        columns: NDArray[np.int64],
        rows: NDArray[np.int64],
        price: float,
        count: int,
    ) -> None:
        self._inverse, self._weights, self._price = inverse, weights, price
        self._columns, self._rows = columns, rows
        self.effects = np.zeros(count)
        self._measure()

    def remove(self, group: int) -> None:
        """A channel group goes, as inputs and as outputs."""
        outputs = self._rows != group
        if not outputs.all():
            self._weights, self._rows = self._weights[:, outputs], self._rows[outputs]
        at, stay = self._columns == group, self._columns != group
        if at.any():
            across = self._inverse[np.ix_(stay, at)]
            shift = across @ np.linalg.inv(self._inverse[np.ix_(at, at)])
            self._weights = self._weights[stay] - shift @ self._weights[at]
            self._inverse = self._inverse[np.ix_(stay, stay)] - shift @ across.T
            self._columns = self._columns[stay]
        elif outputs.all():
            return
        self._measure()

    def _measure(self) -> None:
        self.effects[:] = 0
        groups, counts = np.unique(self._columns, return_counts=True)
        order = np.argsort(self._columns, kind="stable")
        ends = np.cumsum(counts)
        for size in np.unique(counts):  # those of one size together
            some = counts == size
            at = order[ends[some, None] - size + np.arange(size)]
            blocks = np.linalg.inv(self._inverse[at[:, :, None], at[:, None, :]])
            weights = self._weights[at]
            self.effects[groups[some]] = self._price * (weights * (blocks @ weights)).sum((1, 2))


def _states(each: Read, count: int) -> list[_State]:
    first = each.layer.values()
    power = float((first * (each.found.own @ first)).sum())
    if not power > 0:
        return []
    inverse = np.linalg.inv(each.found.damped(PRUNING))
    matrices = zip(inverse, first, each.columns, each.rows, strict=True)
    return [_State(*one, each.importance / power, count) for one in matrices]


def refit_inputs(
    first: NDArray[np.float64], hessian: NDArray[np.float64], stay: Mask
) -> NDArray[np.float64]:
    """The weights of the inputs that stay, for the least error of the outputs.

    Args:
        first: [groups, inputs, outputs], the weights without any error.
        hessian: [groups, inputs, inputs], second moments of the inputs.
        stay: [groups, inputs].
    """
    found = np.zeros_like(first)
    for number, inside in enumerate(stay):
        at = np.flatnonzero(inside)
        wanted = hessian[number][at] @ first[number]
        found[number][at] = np.linalg.solve(hessian[number][np.ix_(at, at)], wanted)
    return found
