"""Large weights, cut into pieces, and pieces put into stages of about as many elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.staged.functions import MOST_GATES
from prune2onnx.packing.codecs.weight import Weight

LEAST_SIZE = 1 << 16
"""Elements from which on a weight is decoded in stages."""

STAGE_SIZE = 1 << 19
"""Least elements of a stage; memory of fewer is not worth a gate."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a weight, in a stage."""

    weight: Weight
    begin: int
    end: int
    stage: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return (self.end - self.begin, *self.weight.shape[1:])

    @property
    def elements(self) -> slice:
        """Its elements among those of the weight."""
        each = math.prod(self.weight.shape[1:])
        return slice(self.begin * each, self.end * each)

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the weight."""
        return self.end - self.begin == self.weight.shape[0]

    @property
    def factors(self) -> NDArray[np.float32] | None:
        """Its part of the weight's scale."""
        scale = self.weight.scale
        if scale is not None and scale.ndim == self.weight.array.ndim and scale.shape[0] > 1:
            return scale[self.begin : self.end]
        return scale


def pieces_of(weights: Sequence[Weight], least: int = STAGE_SIZE) -> list[Piece]:
    """Cuts weights into pieces, in stages of about as many elements, and at least so many."""
    total = sum(weight.array.size for weight in weights)
    count = max(1, min(MOST_GATES, total // least))
    ends = [total * (stage + 1) / count for stage in range(count)]
    found: list[Piece] = []
    done, stage = 0, 0
    for weight in weights:
        rows = weight.shape[0]
        each = weight.array.size // rows
        begin = 0
        while begin < rows:
            while stage < count - 1 and ends[stage] - done < LEAST_SIZE / 2:
                stage += 1
            room = round((ends[stage] - done) / each)
            end = rows if stage == count - 1 else min(rows, begin + max(room, 1))
            if (rows - end) * each < LEAST_SIZE / 2:
                end = rows
            found.append(Piece(weight, begin, end, stage))
            done += (end - begin) * each
            begin = end
    return found
