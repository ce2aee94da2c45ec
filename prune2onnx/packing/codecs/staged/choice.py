"""Which weights are decoded in stages, and by which method: bytes, and time of a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

SIMPLE_BELOW = 18
"""The operator set that has BitwiseOr."""


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


LEAST_TOTAL = 1 << 20
"""Elements of large weights from which on stages are worth their functions: about 7 kB."""

GATED = Bounds(LEAST_SIZE, LEAST_SIZE, LEAST_TOTAL)

MOST_LOW = 8
"""Most bits of a gap that are stored as they are."""

_NS = {"gap": 55.0, "planes": 26.0, "few": 13.0, "many": 20.0}
"""CPU time of an entry, in nanoseconds, by onnxruntime 1.32 on a server's core: of one that is not
zero, a float, one of few or of many values. Besides, a zero takes 4, and a byte of a result 1."""
_FEW = 64
_DENSE_NS = 2.4  # of a byte of a dense weight
_SAVED_NS = 80.0  # of a byte that is saved: fetching it at 100 Mbit/s


def chosen(
    weights: Sequence[Weight], dense: Mapping[str, int], opset: int, bounds: Bounds = GATED
) -> tuple[dict[str, Method], dict[str, str]]:
    """The large weights that are decoded in stages.

    What costs more CPU time at a load than its dense form, and than fetching what it saves at
    100 Mbit/s, stays dense.

    Args:
        weights: all that may be coded.
        dense: name -> bytes it takes.
        opset: of the model.
        bounds: which weights are large.

    Returns:
        Name -> method; and name -> why it stays dense. Nothing in a model that is small.
    """
    found: dict[str, Method] = {}
    stay: dict[str, str] = {}
    if sum(n for one in weights if (n := one.array.size) >= bounds.size) < bounds.total:
        return found, stay
    for weight in weights:
        ways = {how: estimate(weight, how, opset) for how in fitting(weight, bounds)}
        if not ways:
            continue
        best = min(ways, key=lambda how: ways[how])
        saved = dense[weight.name] - ways[best]
        allowed = _DENSE_NS * weight.array.nbytes + _SAVED_NS * saved
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
        own = _NS["gap"] * weight.nonzero.size + 4.0 * weight.array.size
    elif how.values.name == "planes":
        own = _NS["planes"] * weight.array.size
    else:
        assert weight.indexed is not None
        own = _NS["few" if weight.indexed[1].size <= _FEW else "many"] * weight.array.size
    return float(own + weight.values.nbytes)


def fitting(weight: Weight, bounds: Bounds = GATED) -> list[Method]:
    """The methods by which a weight can be decoded in stages."""
    if weight.array.size < bounds.size or not weight.shape[0]:
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
    if weight.array.size < bounds.own:
        found = [one for one in found if one.values.name != "codebook"]
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
