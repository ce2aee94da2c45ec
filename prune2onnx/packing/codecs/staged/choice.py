"""Which weights are decoded in stages, and by which method: bytes, and time of a load."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs.book import MAX_VALUES, by_count
from prune2onnx.packing.codecs.methods import Method, method
from prune2onnx.packing.codecs.staged import words
from prune2onnx.packing.codecs.staged.floats import MOST_PATCHES
from prune2onnx.packing.codecs.staged.large import Large, Survey
from prune2onnx.packing.codecs.values.levels import level_codes
from prune2onnx.packing.codecs.weight import numpy_type
from prune2onnx.packing.codecs.work import (
    DENSE_NS,
    FILE_NS,
    LAID_OUT_NS,
    MADE_NS,
    READ_NS,
    SCATTERED_NS,
)

SIMPLE_BELOW = 18
"""The operator set that has BitwiseOr."""

LEAST_SIZE = 1 << 12
"""Elements from which on a weight is decoded in stages."""

LEAST_TOTAL = 1 << 19
"""Elements of large weights from which on stages are worth their functions: about 7 kB."""


@dataclass(frozen=True)
class Bounds:
    """Which weights are large.

    Attributes:
        size: least elements of one.
        own: least elements of one that has a codebook, and so nodes, of its own.
        total: least elements of all together.
    """

    size: int
    own: int
    total: int


GATED = Bounds(LEAST_SIZE, 1 << 14, LEAST_TOTAL)
"""Those that are decoded in stages behind gates."""

MOST_LOW = 8
"""Most bits of a gap that are stored as they are."""

_TOUCHED = {
    "codes": (25.0, 27.0, 2.2),
    "planes": (51.0, 56.0, 2.3),
    "halves": (32.0, 36.0, 2.3),
    "entries": (84.0, 101.0, 9.4),
    "zeros": (16.0, 16.0, 4.0),
    "plain": (14.0, 16.0, 0.0),
    "raw": (14.0, 14.0, 0.0),
}
"""Bytes that decoding makes besides the weight itself, reads, and puts in places or sums up: for
each element of a weight in codes, in planes, in half precision; for each nonzero behind gaps, and
besides for each element there; in codes without an entropy code, and in bfloat16 as it is."""
_IN_SHAPE = (6.0, 6.0)
"""Bytes of these that it makes and reads less for a float of a large matrix."""

_MATRIX_SIZE = 1 << 19  # calls of its own cost as much as copies
_MATRIX_ROW = 512  # each row has a table

_FAST = 1.6
"""What a load may take without an entropy code, relative to that of a dense weight."""

_TENTH = 0.1

_SAVED_NS = 80.0  # of a byte that is saved: fetching it at 100 Mbit/s


@dataclass(frozen=True, eq=False)
class Known:
    """A large weight, and what is known of it."""

    weight: Large
    survey: Survey

    @property
    def is_float(self) -> bool:
        """Whether it can be cut into an exponent and other bits."""
        one = self.survey
        if one.exponents is None:
            return False
        if self.weight.working == TensorProto.FLOAT16:
            return one.finite
        return one.patches <= MOST_PATCHES * self.weight.size

    @property
    def is_on_levels(self) -> bool:
        """Whether its values are small integers, as other weights' are."""
        if self.weight.working in (TensorProto.INT8, TensorProto.UINT8):
            return True
        book = self.survey.book
        scaled = self.weight.scale is not None and book is not None
        return bool(scaled and book and level_codes(book.values, False) is not None)

    @property
    def rest_bits(self) -> int:
        """Bits of a float besides its symbol."""
        return 24 if self.survey.lower else 8

    @property
    def low_bits(self) -> int:
        """Bits of gaps that are stored as they are, for the fewest bits if gaps are random."""
        gap = self.weight.size / max(self.survey.entries, 1)
        return min(max(0, int(np.log2(max(1.0, 0.35 * gap)))), MOST_LOW)

    def steps(self, low: int) -> NDArray[np.int64]:
        """How often gaps have each symbol, their bits but the `low` ones; int64 [256]."""
        assert self.survey.gaps is not None
        symbols = np.minimum(self.survey.gaps.values >> low, 255)
        return np.bincount(symbols, self.survey.gaps.counts, 256).astype(np.int64)


def chosen(
    weights: Sequence[Known],
    dense: Mapping[str, int],
    opset: int,
    bounds: Bounds = GATED,
    *,
    fast: bool = False,
    few_bytes: Collection[str] = (),
) -> tuple[dict[str, Method], dict[str, str]]:
    """The large weights that are decoded in stages.

    What costs more CPU time at a load than its dense form, and than fetching what it saves at
    100 Mbit/s, stays dense.

    Args:
        weights: all large ones that may be coded.
        dense: name -> bytes it takes.
        opset: of the model.
        bounds: which weights are large.
        fast: whether there is no entropy code, and a load may take about one and a half times that
            of the dense weight, whatever is saved.
        few_bytes: weights that are coded wherever that saves a tenth, since they have lost
            precision for the sake of bytes.

    Returns:
        Name -> method; and name -> why it stays dense. Those that no method fits are in neither.
    """
    found: dict[str, Method] = {}
    stay: dict[str, str] = {}
    for one in weights:
        every = fitting_fast(one) if fast else fitting(one, bounds)
        ways = {how: estimate(one, how, opset, fast=fast) for how in every}
        if not ways:
            continue
        name = one.weight.name
        best = min(ways, key=lambda how: ways[how])
        saved = dense[name] - ways[best]
        spent, allowed = decoding_ns(one, best, fast=fast), DENSE_NS * one.weight.nbytes
        if fast:
            spent += FILE_NS * ways[best] + LAID_OUT_NS * one.weight.nbytes
            allowed *= _FAST
        else:
            allowed += _SAVED_NS * saved
        wanted = not fast and name in few_bytes and saved > _TENTH * dense[name]
        if saved > 0 and (wanted or spent <= allowed):
            found[name] = best
        else:
            stay[name] = (
                f"{best.name} would save {max(saved, 0) / dense[name]:.0%}, and take longer "
                "at each load than that is worth; --load small codes it"
            )
    return found, stay


def decoding_ns(one: Known, how: Method, *, fast: bool = False) -> float:
    """About how much CPU time decoding takes; `fast` as of `chosen`."""
    made, read, scattered = _touched(one, how, fast=fast)
    return MADE_NS * made + READ_NS * read + SCATTERED_NS * scattered


def decoding_nbytes(one: Known, how: Method, *, fast: bool = False) -> float:
    """About how many bytes decoding makes, all held until a stage ends; `fast` as of `chosen`."""
    return _touched(one, how, fast=fast)[0]


def _touched(one: Known, how: Method, *, fast: bool) -> tuple[float, float, float]:
    """Bytes that decoding makes, the weight's own among them; reads; puts in places or sums up."""
    size = one.weight.size
    counts: dict[str, int]
    if fast:
        counts = {"raw" if how.values.name == "raw" else "plain": size}
    elif how.positions == "gap":
        counts = {"entries": one.survey.entries, "zeros": size}
    elif how.values.name == "planes":
        half = one.weight.working == TensorProto.FLOAT16
        counts = {"halves" if half else "planes": size}
    else:
        counts = {"codes": size}
    itemsize = numpy_type(one.weight.working).itemsize
    made, read, scattered = float(size * itemsize), 0.0, 0.0
    if how.positions == "all" and is_large_matrix(one.weight.shape) and itemsize == 4:
        made -= size * _IN_SHAPE[0]
        read -= size * _IN_SHAPE[1]
    for what, count in counts.items():
        made += count * _TOUCHED[what][0]
        read += count * _TOUCHED[what][1]
        scattered += count * _TOUCHED[what][2]
    return made, read, scattered


def is_large_matrix(shape: Sequence[int]) -> bool:
    """Whether a weight, or a part of one, is worth a call that makes it in its shape."""
    return len(shape) == 2 and shape[1] >= _MATRIX_ROW and math.prod(shape) >= _MATRIX_SIZE


def fitting(one: Known, bounds: Bounds = GATED) -> list[Method]:
    """The methods by which a weight can be decoded in stages."""
    found: list[Method] = []
    if one.weight.element_type == TensorProto.BFLOAT16 and not one.survey.finite:
        return found  # a NaN may lose its payload when it is converted
    if one.survey.book is not None:
        found.append(method("levels" if one.is_on_levels else "codebook"))
    elif one.is_float:
        found.append(method("planes"))
    others = one.survey.others
    sparse = one.survey.entries < one.weight.size / 2
    if sparse and others is not None and others.values.size < MAX_VALUES:  # and zero
        found.append(method("gap-levels" if one.is_on_levels else "gap-codebook"))
    if one.weight.size < bounds.own:
        found = [how for how in found if how.values.name != "codebook"]
    return found


def fitting_fast(one: Known) -> list[Method]:
    """The methods without an entropy code by which a weight can be decoded in stages."""
    fit = [how for how in fitting(one) if how.positions == "all" and how.values.name != "planes"]
    short = one.is_float and not one.survey.lower and one.survey.finite
    if short and one.weight.element_type == TensorProto.FLOAT:
        fit.append(method("raw"))
    return fit


def estimate(one: Known, how: Method, opset: int, *, fast: bool = False) -> float:
    """About how many bytes a weight takes by one of its methods; `fast` as of `chosen`."""
    simple = opset < SIMPLE_BELOW
    if how.values.name == "raw":
        return 2.0 * one.weight.size
    if fast:
        assert one.survey.book is not None
        return one.weight.size * words.single(one.survey.book.values.size).bits / 8

    def coded(counts: NDArray[np.integer[Any]]) -> float:
        ordered = counts[by_count(counts)[: np.count_nonzero(counts)]]
        return float(words.bits_of(ordered, simple=simple) / 8) if ordered.size else 0.0

    if how.positions == "gap":
        low, others = one.low_bits, one.survey.others
        assert others is not None
        steps = coded(one.steps(low)) + one.survey.entries * low / 8
        return float(steps + coded(others.counts) + 4 * others.values.size)
    if how.values.name == "planes":
        assert one.survey.exponents is not None
        return coded(one.survey.exponents) + one.rest_bits * one.weight.size / 8
    assert one.survey.book is not None
    return coded(one.survey.book.counts) + 4 * one.survey.book.values.size
