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
from prune2onnx.packing.quantized import Quantized, multiples, scaled

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
    """Looks once at each large weight, and again at one of which something is known.

    Args:
        tensors: weights that may be coded.
        bounds: which of them are large.
        quantized: name -> codes, codebook and scale, where they are known.
        done: is told what has been read.

    Raises:
        Prune2OnnxError: `quantized` does not fit a weight.
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
        if known := scaled(tensor, quantized.get(tensor.name)):
            weight = replace(weight, scale=known.scale, levels=known.levels)
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


def few_values(one: Known) -> NDArray[np.float32] | None:
    """The different values but +0 of a float32 weight, if they are few."""
    others = one.survey.others
    is_float32 = one.weight.element_type == TensorProto.FLOAT
    return others.values if is_float32 and others is not None else None


def with_step(one: Known, step: np.float32) -> Known:
    """A weight with a codebook, with a step of it as its scale."""
    weight, book = one.weight, one.survey.book
    assert book is not None  # it has a step, or is all zero

    def levels(begin: int, end: int) -> NDArray[Any]:
        return multiples(weight.rows(begin, end), step)

    survey = replace(one.survey, book=Counted(multiples(book.values, step), book.counts))
    return Known(replace(weight, scale=np.full(1, step), levels=levels), survey)
