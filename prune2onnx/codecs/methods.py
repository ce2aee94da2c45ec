"""Methods, the choices how a weight is written, and groups, the weights with the same choices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from prune2onnx.codecs.weight import Weight

Positions = Literal["all", "gap", "mask"]
Values = Literal["raw", "planes", "codebook", "levels"]


@dataclass(frozen=True)
class Method:
    """How a weight is written.

    Attributes:
        positions: "all" elements; "gap", the steps from one nonzero to the next; "mask", a bit an
            element, eight of them a symbol (n:m sparsity is a mask of few symbols).
        values: "raw", as they are, in the narrowest type that holds them exactly; "planes", the
            exponents coded, the other bits as they are; "codebook", codes into one codebook a
            weight; "levels", the same with one codebook of small integers for all.
    """

    positions: Positions
    values: Values

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return self.values if self.positions == "all" else f"{self.positions}-{self.values}"


METHODS = tuple(
    Method(positions, values)
    for positions in ("all", "gap", "mask")
    for values in ("raw", "planes", "codebook", "levels")
)
"""Every method, the numbers by which a file names them. Append only."""


@dataclass(frozen=True)
class Group:
    """Weights written by one method, families together.

    Attributes:
        method: the method.
        weights: members, of one working type; all have a scale or none has.
        storage: the type raw values and planes are stored in.
    """

    method: Method
    weights: tuple[Weight, ...]
    storage: int

    @property
    def working(self) -> int:
        """The type in which the graph rebuilds it."""
        return self.weights[0].working

    @cached_property
    def scale(self) -> np.float32 | None:
        """The only factor of all scales, if there is one and a table of levels can take it."""
        scales = [weight.scale for weight in self.weights if weight.scale is not None]
        factors = {scale.item() if scale.size == 1 else None for scale in scales}
        if self.method.values != "levels" or len(factors) != 1 or None in factors:
            return None
        return np.float32(factors.pop())

    @property
    def size(self) -> int:
        """Elements of all weights."""
        return sum(weight.array.size for weight in self.weights)

    @property
    def is_single(self) -> bool:
        """Whether it has one member."""
        return len(self.weights) == 1
