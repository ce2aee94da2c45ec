"""Large weights, cut into pieces, and pieces put into stages of about equal peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.staged.choice import is_large_matrix
from prune2onnx.packing.codecs.staged.functions import MOST_GATES
from prune2onnx.packing.codecs.staged.large import Large

STAGE_SIZE = 1 << 19
"""Least elements of a stage; memory of fewer is not worth a gate."""

LEAST_PIECE = 1 << 16
"""Elements for which a weight is cut; half of them may be too many or too few in a stage."""

PIECE_SIZE = 1 << 24
"""Most elements of a piece, unless one row has more: so much is in memory at once."""

_HALVINGS = 40


@dataclass(frozen=True)
class Piece:
    """Some rows of a weight, in a stage."""

    weight: Large
    begin: int
    end: int
    stage: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return (self.end - self.begin, *self.weight.shape[1:])

    @property
    def rows(self) -> NDArray[Any]:
        """Its values."""
        return self.weight.rows(self.begin, self.end)

    @property
    def coded(self) -> NDArray[Any]:
        """What is coded of it, flat."""
        return self.weight.coded(self.begin, self.end)

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements in memory."""
        return self.weight.nbytes * self.size // self.weight.size

    @property
    def is_matrix(self) -> bool:
        """Whether it may be made in its shape at once: it is large, and its rows are long."""
        if not is_large_matrix(self.shape):
            return False
        factors = self.factors
        return factors is None or factors.shape in ((1,), (1, 1), (self.shape[0], 1))

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the weight."""
        return self.end - self.begin == self.weight.shape[0]

    @property
    def factors(self) -> NDArray[np.float32] | None:
        """Its part of the weight's scale."""
        scale = self.weight.scale
        if scale is not None and scale.ndim == len(self.weight.shape) and scale.shape[0] > 1:
            return scale[self.begin : self.end]
        return scale


def pieces_of(
    weights: Sequence[Large],
    made: Sequence[float],
    left: Sequence[float],
    least: int = STAGE_SIZE,
) -> list[Piece]:
    """Cuts weights into pieces, in stages of at least so many elements and about equal peaks.

    Args:
        weights: in the order of the file.
        made: for each weight, bytes that decoding it makes; all are held until a stage ends.
        left: for each weight, bytes that stay: its own, less those of its streams.
        least: elements of a stage.
    """
    total = sum(weight.size for weight in weights)
    count = max(1, min(MOST_GATES, total // least))
    ends = _ends([weight.size for weight in weights], made, left, count)
    found: list[Piece] = []
    done, stage = 0, 0
    for weight in weights:
        rows = weight.shape[0]
        each = weight.size // rows
        most = max(1, PIECE_SIZE // each)
        begin = 0
        while begin < rows:
            while stage < count - 1 and ends[stage] - done < LEAST_PIECE / 2:
                stage += 1
            room = round((ends[stage] - done) / each)
            end = rows if stage == count - 1 else min(rows, begin + max(room, 1))
            if (rows - end) * each < LEAST_PIECE / 2:
                end = rows
            end = min(end, begin + most)
            found.append(Piece(weight, begin, end, stage))
            done += (end - begin) * each
            begin = end
    return found


def _ends(
    sizes: Sequence[int], made: Sequence[float], left: Sequence[float], count: int
) -> list[float]:
    """The elements at which stages end.

    While a stage is decoded, a runtime holds all that it makes, and what earlier stages have left.
    So a later stage may make less. The least peak with which `count` stages are enough is found by
    bisection.
    """
    edges, held, kept = (
        np.concatenate([[0.0], np.cumsum(np.asarray(each, float))]) for each in (sizes, made, left)
    )
    low, high = 0.0, held[-1] + kept[-1]
    ends = [edges[-1]]
    for _ in range(_HALVINGS):
        peak = (low + high) / 2
        at, found = 0.0, list[float]()
        for _ in range(count):
            free = max(0.0, peak - np.interp(at, edges, kept))
            at = float(np.interp(np.interp(at, edges, held) + free, held, edges))
            found.append(at)
        if at < edges[-1]:
            low = peak
        else:
            high, ends = peak, found
    return ends


def together(pieces: Sequence[Piece], *, matrices: bool) -> list[list[Piece]]:
    """Runs of pieces that are written as one vector, of as many elements as a piece may have.

    Args:
        pieces: in a row.
        matrices: whether one that `is_matrix` stands alone.
    """
    found: list[list[Piece]] = [[piece] for piece in pieces if matrices and piece.is_matrix]
    size = PIECE_SIZE
    for piece in pieces:
        if matrices and piece.is_matrix:
            continue
        if not found or size + piece.size > PIECE_SIZE:
            found.append([])
            size = 0
        found[-1].append(piece)
        size += piece.size
    return found
