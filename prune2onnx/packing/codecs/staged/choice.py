"""Which weights are decoded in stages, and by which method: bytes, and time of a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs.methods import Method, method
from prune2onnx.packing.codecs.staged import words
from prune2onnx.packing.codecs.staged.floats import Planes
from prune2onnx.packing.codecs.staged.pieces import LEAST_SIZE
from prune2onnx.packing.codecs.values.levels import level_codes
from prune2onnx.packing.codecs.values.planes import planes_of
from prune2onnx.packing.codecs.weight import MAX_LEVELS, Weight
from prune2onnx.packing.codecs.work import DENSE_NS, MADE_NS, READ_NS, SCATTERED_NS

SIMPLE_BELOW = 18
"""The operator set that has BitwiseOr."""

LEAST_TOTAL = 1 << 20
"""Elements of large weights from which on stages are worth their functions: about 7 kB."""

MOST_LOW = 8
"""Most bits of a gap that are stored as they are."""

_TOUCHED = {
    "codes": (25.0, 27.0, 2.2),
    "planes": (51.0, 56.0, 2.3),
    "halves": (32.0, 36.0, 2.3),
    "entries": (84.0, 101.0, 9.4),
    "zeros": (16.0, 16.0, 4.0),
}
"""Bytes that decoding makes besides the weight itself, reads, and puts in places or sums up: for
each element of a weight in codes, in planes, in half precision; for each nonzero behind gaps, and
besides for each element there."""
_SAVED_NS = 80.0  # of a byte that is saved: fetching it at 100 Mbit/s


def chosen(
    weights: Sequence[Weight], dense: Mapping[str, int], opset: int
) -> tuple[dict[str, Method], dict[str, str]]:
    """The large weights that are decoded in stages.

    What costs more CPU time at a load than its dense form, and than fetching what it saves at
    100 Mbit/s, stays dense.

    Args:
        weights: all that may be coded.
        dense: name -> bytes it takes.
        opset: of the model.

    Returns:
        Name -> method; and name -> why it stays dense. Nothing in a model that is small.
    """
    found: dict[str, Method] = {}
    stay: dict[str, str] = {}
    if sum(one.array.size for one in weights if one.array.size >= LEAST_SIZE) < LEAST_TOTAL:
        return found, stay
    for weight in weights:
        ways = {how: estimate(weight, how, opset) for how in fitting(weight)}
        if not ways:
            continue
        best = min(ways, key=lambda how: ways[how])
        saved = dense[weight.name] - ways[best]
        allowed = DENSE_NS * weight.array.nbytes + _SAVED_NS * saved
        if saved > 0 and decoding_ns(weight, best) <= allowed:
            found[weight.name] = best
        else:
            stay[weight.name] = (
                f"{best.name} would save {max(saved, 0) / dense[weight.name]:.0%}, and take longer "
                "at each load than that is worth; --load small codes it"
            )
    return found, stay


def decoding_ns(weight: Weight, how: Method) -> float:
    """About how much CPU time decoding takes."""
    if how.positions == "gap":
        counts = {"entries": weight.nonzero.size, "zeros": weight.array.size}
    elif how.values.name == "planes":
        half = weight.working == TensorProto.FLOAT16
        counts = {"halves" if half else "planes": weight.array.size}
    else:
        counts = {"codes": weight.array.size}
    spent = MADE_NS * weight.values.nbytes
    for what, count in counts.items():
        made, read, scattered = _TOUCHED[what]
        spent += count * (MADE_NS * made + READ_NS * read + SCATTERED_NS * scattered)
    return spent


def fitting(weight: Weight) -> list[Method]:
    """The methods by which a weight can be decoded in stages."""
    if weight.array.size < LEAST_SIZE or not weight.shape[0]:
        return []
    found = []
    if weight.indexed is not None:
        found.append(method("levels" if _on_levels(weight) else "codebook"))
    elif Planes.fit(weight) or _is_half(weight):
        found.append(method("planes"))
    if weight.indexed_nonzero is not None and weight.nonzero.size < weight.array.size / 2:
        name = "gap-levels" if _on_levels(weight) else "gap-codebook"
        if weight.indexed_nonzero[1].size < MAX_LEVELS:  # and zero
            found.append(method(name))
    return found


def _is_half(weight: Weight) -> bool:
    return weight.working == TensorProto.FLOAT16 and bool(np.isfinite(weight.values).all())


def _on_levels(weight: Weight) -> bool:
    """Whether its values are small integers, as other weights' are."""
    if weight.working in (TensorProto.INT8, TensorProto.UINT8):
        return True
    return weight.levels is not None and level_codes(weight.values, False) is not None


def estimate(weight: Weight, how: Method, opset: int) -> float:
    """About how many bytes a weight takes by one of its `fitting` methods."""
    simple = opset < SIMPLE_BELOW

    def coded(counts: NDArray[np.integer[Any]]) -> float:
        return float(words.bits_of(-np.sort(-counts), simple=simple) / 8)

    if how.positions == "gap":
        low = low_bits(weight)
        gaps = np.minimum(np.diff(weight.nonzero, prepend=-1) - 1, (256 << low) - 1)
        assert weight.indexed_nonzero is not None
        steps = coded(np.bincount(gaps >> low)) + gaps.size * low / 8
        codes, book = weight.indexed_nonzero
        return float(steps + coded(np.bincount(codes)) + 4 * book.size)
    if how.values.name == "planes" and weight.working == TensorProto.FLOAT16:
        symbols, _ = planes_of(weight.values, TensorProto.FLOAT16)
        return coded(np.bincount(symbols)) + weight.array.size
    if how.values.name == "planes":
        planes = Planes.of(weight)
        return coded(np.bincount(planes.exponents)) + planes.rest_bits * weight.array.size / 8
    assert weight.indexed is not None
    codes, book = weight.indexed
    return coded(np.bincount(codes)) + 4 * book.size


def low_bits(weight: Weight) -> int:
    """How many bits of gaps are stored as they are, for the fewest bits if gaps are random."""
    gap = weight.array.size / max(weight.nonzero.size, 1)
    return min(max(0, int(np.log2(max(1.0, 0.35 * gap)))), MOST_LOW)
