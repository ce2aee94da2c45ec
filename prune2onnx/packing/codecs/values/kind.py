"""`ValueKind`, the contract of a kind of stored values, and the arguments of its functions.

A new kind is a module beside this one that ends in a `ValueKind`, and an entry in `methods.VALUES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.streams import Coder, Streams
from prune2onnx.packing.codecs.weight import Weight

Positions = Literal["all", "gap", "mask"]
"""Where the values stand: "all", at every element; "gap", at the nonzeros, by the gaps between
them; "mask", at the nonzeros, by one bit per element, eight of them a symbol (n:m sparsity gives a
mask of few symbols)."""

Written = tuple[str, list[float]]
"""The name of a vector in the decode function, and the bits that each weight takes."""


@dataclass(frozen=True)
class Vector:
    """A group's vector in the decode function.

    Attributes:
        name: of the value, [leading + elements of the group].
        bits: that each weight takes.
        leading: elements before the first weight's, which mean nothing.
        scaled: whether the weights' scales are in it.
    """

    name: str
    bits: list[float]
    leading: int = 0
    scaled: bool = False


@dataclass(frozen=True)
class ValueKind:
    """A kind of stored values.

    Attributes:
        name: in reports and in the names of methods.
        estimate: about how many bytes the values of a weight take; None where this kind cannot
            store them.
        write: adds the values of a group's entries, [n] for each weight, to the streams, and the
            nodes that make one vector of them.
        write_rising: adds positions and values in one sequence with a Rice code, where that is
            smaller, and the nodes that make the group's vector; else None.
        keeps_storage: whether values are stored in `Weight.storage`, so that a group has one such
            type; otherwise codes are stored.
        is_looked_up: whether a table gives the values: looking them up can give the weight's shape,
            too.
        takes_scale: whether a scale that all weights of the group share can be multiplied into the
            table.
        is_alone: whether each weight is a group of its own.
    """

    name: str
    estimate: Callable[[Entries], float | None]
    write: Callable[[Group, Streams, list[NDArray[Any]]], Written]
    write_rising: Callable[[Group, Streams, RisingEntries], Vector | None] = (
        lambda group, streams, entries: None
    )
    keeps_storage: bool = False
    is_looked_up: bool = False
    takes_scale: bool = False
    is_alone: bool = False


@dataclass(frozen=True, eq=False)
class Entries:
    """The values of one weight that are to be stored.

    Attributes:
        weight: the weight.
        coder: the entropy code.
        every: whether they are those of all elements, or of the nonzero ones.
        fillers: entries of +0 that bridge long gaps between nonzeros.
        rising: whether positions are gaps with a Rice code, which values may be written with.
    """

    weight: Weight
    coder: Coder
    every: bool
    fillers: int
    rising: bool = False

    @cached_property
    def values(self) -> NDArray[Any]:
        """[n] in the working type, without fillers."""
        values = self.weight.values
        return values if self.every else values[self.weight.nonzero]

    @property
    def indexed(self) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
        """Codes and codebook of the values; None above 256 distinct ones."""
        return self.weight.indexed if self.every else self.weight.indexed_nonzero


@dataclass(frozen=True, eq=False)
class RisingEntries:
    """The nonzeros of a group, in the order of its vector.

    Attributes:
        places: their indices in the vector, ascending, int64 [n].
        entries: their values, [n] for each weight.
    """

    places: NDArray[np.int64]
    entries: Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Group:
    """Weights that are written by one method, families together (`groups`).

    Attributes:
        positions: where their values stand.
        values: how the values are stored.
        weights: members, of one working type; all have a scale or none has.
        storage: the type in which values are stored; 0 where codes are.
    """

    positions: Positions
    values: ValueKind
    weights: tuple[Weight, ...]
    storage: int

    @property
    def working(self) -> int:
        """The type in which the graph rebuilds the weights."""
        return self.weights[0].working

    @cached_property
    def scale(self) -> np.float32 | None:
        """The factor that all scales consist of, if there is one and a table can take it."""
        scales = [weight.scale for weight in self.weights if weight.scale is not None]
        factors = {scale.item() if scale.size == 1 else None for scale in scales}
        if not self.values.takes_scale or len(factors) != 1 or None in factors:
            return None
        return np.float32(factors.pop())

    @property
    def size(self) -> int:
        """Number of elements of all weights."""
        return sum(weight.array.size for weight in self.weights)

    @property
    def is_single(self) -> bool:
        """Whether it has one member."""
        return len(self.weights) == 1
