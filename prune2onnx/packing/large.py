"""The large weights of a model: read one after the other, and never all in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.graph.outside import is_outside
from prune2onnx.graph.tensors import array_of, rows_of
from prune2onnx.packing.codecs import MAX_NBYTES, WORKING, staged
from prune2onnx.packing.codecs.staged import Bounds, Counted, Done, Known, Large
from prune2onnx.packing.codecs.values.dictionary import regular_nbytes
from prune2onnx.packing.codecs.weight import Weight
from prune2onnx.packing.quantized import Quantized, step_of

_HELD = 4
"""Arrays of tensors in memory: protobuf copies the data whenever they are asked for."""


_MOST_REGULAR = 1 << 22
"""Elements of a weight that is looked at for runs: tables, and no layers."""

_SAMPLE = 1 << 16
_FAR_LESS = 2.0


def are_many(tensors: Sequence[TensorProto], bounds: Bounds) -> bool:
    """Whether there is so much in large weights that stages pay."""
    large = [tensor for tensor in tensors if _is_large(tensor, bounds)]
    return sum(map(_size, large)) >= bounds.total


def surveyed(
    tensors: Sequence[TensorProto],
    bounds: Bounds,
    quantized: Mapping[str, Quantized],
    done: Done,
) -> list[Known]:
    """Looks once at each large weight.

    Args:
        tensors: weights that may be coded.
        bounds: which of them are large.
        quantized: name -> codes, codebook and scale, where they are known.
        done: is told what has been read.
    """

    @lru_cache(maxsize=_HELD)
    def array(index: int) -> NDArray[Any]:
        return array_of(large[index])

    def rows_in_memory(index: int, begin: int, end: int) -> NDArray[Any]:
        return array(index)[begin:end]

    large = [tensor for tensor in tensors if _is_large(tensor, bounds)]
    weights = []
    for index, tensor in enumerate(large):
        inside = partial(rows_in_memory, index)
        rows = partial(rows_of, tensor) if is_outside(tensor) else inside
        weight = Large(tensor.name, tuple(tensor.dims), tensor.data_type, rows)
        known = quantized.get(tensor.name)
        if known is not None and known.scale is not None:
            weight = replace(weight, scale=known.scale, levels=partial(_levels, known))
        weights.append(weight)
    found = []
    for weight, survey in zip(weights, staged.in_order(staged.survey, weights), strict=True):
        found.append(Known(weight, survey))
        done(weight.name, weight.nbytes)
    return found


def _is_large(tensor: TensorProto, bounds: Bounds) -> bool:
    if tensor.data_type not in WORKING or not tensor.dims or _size(tensor) < bounds.size:
        return False
    itemsize = 4 if tensor.data_type == TensorProto.FLOAT else 8
    return _size(tensor) * itemsize <= MAX_NBYTES


def _size(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=object))


def _levels(known: Quantized, begin: int, end: int) -> NDArray[np.float32]:
    values = np.concatenate([np.zeros(1, np.float32), known.codebook.astype(np.float32)])
    return np.asarray(values[known.codes[begin:end]])


def is_regular(one: Known, least: float) -> bool:
    """Whether a weight consists of runs, so that a dictionary takes far less than stages.

    Args:
        one: the weight.
        least: bytes that it takes in stages.
    """
    weight = one.weight
    if weight.size > _MOST_REGULAR or weight.scale is not None:
        return False
    rows = min(weight.shape[0], -(-_SAMPLE * weight.shape[0] // weight.size))
    array = weight.coded(0, rows).reshape(rows, -1)
    nbytes = regular_nbytes(Weight("", array, weight.working))
    return nbytes is not None and _FAR_LESS * nbytes < least * array.size / weight.size


def step_in(one: Known) -> np.float32 | None:
    """The step of which all values are multiples."""
    if one.weight.scale is not None:
        return np.float32(one.weight.scale.item()) if one.weight.scale.size == 1 else None
    others = one.survey.others
    if others is None or one.weight.element_type != TensorProto.FLOAT:
        return None
    return step_of(others.values)


def with_scale(one: Known, step: np.float32 | None, common: np.float32) -> Known:
    """A weight with a step as its scale; an all-zero one gets the `common` step."""
    weight, book = one.weight, one.survey.book
    if weight.scale is not None or book is None:
        return one
    if step is None:
        if one.survey.entries or weight.element_type != TensorProto.FLOAT:
            return one
        step = common
    levels = np.rint(book.values / step) + np.float32(0)  # no -0
    survey = replace(one.survey, book=Counted(levels, book.counts))
    return Known(replace(weight, scale=np.full(1, step)), survey)
