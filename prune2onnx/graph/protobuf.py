"""Protobuf messages: their sizes, copies without heavy fields, repeated fields filtered.

What a message means for a model is the other modules' task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.message import EncodeError
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto

from prune2onnx.errors import Prune2OnnxError, one_line

MAX_NBYTES = 2**31 - 1
"""Largest message that protobuf writes or reads, and so the largest tensor inside a model."""

TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""Fields in which a tensor may hold its elements, where it has no `raw_data`."""


def tensor(name: str, array: NDArray[Any], data_type: int) -> TensorProto:
    """An initializer in raw little-endian form; `data_type` is ONNX's."""
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":  # pragma: no cover - big-endian input only
        array = array.byteswap()
    return TensorProto(name=name, dims=array.shape, data_type=data_type, raw_data=array.tobytes())


def framed(nbytes: int, tag: int = 1) -> int:
    """Bytes of a message nested in another: its field's tag, its length as a varint, itself."""
    return tag + max(1, -(-nbytes.bit_length() // 7)) + nbytes


def keep(repeated: Any, wanted: Callable[[Any], bool]) -> None:
    """Removes from a repeated field the items that are not wanted."""
    kept = [item for item in repeated if wanted(item)]
    if len(kept) < len(repeated):
        del repeated[:]
        repeated.extend(kept)


def copy_but(target: Any, source: Any, *fields: str) -> None:
    """Copies all set fields of a message, but those named, into an empty one."""
    for field, value in source.ListFields():
        if field.name in fields:
            continue
        if hasattr(value, "MergeFrom"):  # a message, or a repeated field of any type
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)


def nbytes(model: ModelProto) -> int:
    """Bytes of the serialized model, which may be more than protobuf can serialize.

    Raises:
        Prune2OnnxError: one node alone takes more than 2 GB.
    """
    rest, graph = ModelProto(), GraphProto()
    copy_but(rest, model, "graph")
    copy_but(graph, model.graph, "initializer", "node")
    try:
        inside = graph.ByteSize()
        for part in (model.graph.initializer, model.graph.node):
            inside += sum(framed(item.ByteSize()) for item in part)
        return rest.ByteSize() + (framed(inside) if model.HasField("graph") else 0)
    except EncodeError as error:
        raise Prune2OnnxError(
            f"more than {MAX_NBYTES:,} bytes in one part of the model: {one_line(error)}; "
            "keep its weights as initializers of the main graph"
        ) from error
