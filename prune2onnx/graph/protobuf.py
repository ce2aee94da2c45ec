"""Protobuf messages: their sizes, copies without heavy fields, repeated fields filtered.

What a message means for a model is the other modules' task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import EncodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.outside import is_outside, nbytes_outside, pieces, prefix

MAX_NBYTES = 2**31 - 1
"""Largest message that protobuf writes or reads, and so the largest tensor inside a model."""

_GRAPH = ModelProto.GRAPH_FIELD_NUMBER
_TENSORS = GraphProto.INITIALIZER_FIELD_NUMBER
_DATA = TensorProto.RAW_DATA_FIELD_NUMBER
_LARGE = 1 << 20  # elements
_FEW_AXES = 64

_PLACE = ("external_data", "data_location")  # of a tensor whose data are outside

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
    """Copies all set fields of a message, but those named, into an empty one.

    The fields that are left out are not touched: to read bytes copies them.
    """
    for field in source.DESCRIPTOR.fields:
        if field.name in fields:
            continue
        value = getattr(source, field.name)
        if hasattr(value, "MergeFrom") and not isinstance(value, Message):  # a repeated field
            if len(value):
                getattr(target, field.name).MergeFrom(value)
        elif source.HasField(field.name):
            if isinstance(value, Message):
                getattr(target, field.name).MergeFrom(value)
            else:
                _set(target, field, value)


def _set(target: Any, field: FieldDescriptor, value: Any) -> None:
    try:
        setattr(target, field.name, value)
    except UnicodeDecodeError:  # text that is not UTF-8 is read as bytes
        target.MergeFromString(prefix(field.number, len(value)) + value)


def serialized(model: ModelProto) -> Iterator[bytes | memoryview]:
    """The bytes of `model.SerializeToString()` in pieces, so that weights are not in memory twice.

    Args:
        model: at most `MAX_NBYTES` bytes.
    """
    # what a newer onnx wrote has no name here, and would not be copied
    if any(len(UnknownFieldSet(part)) for part in (model, model.graph)):
        yield model.SerializeToString()
        return
    graph = model.graph
    yield _part(model, ModelProto(), _GRAPH, above=False)
    if model.HasField("graph"):
        before, after = (_part(graph, GraphProto(), _TENSORS, above=a) for a in (False, True))
        inside = sum(framed(tensor_nbytes(tensor)) for tensor in graph.initializer)
        yield prefix(_GRAPH, len(before) + inside + len(after))
        yield before
        for tensor in graph.initializer:
            yield prefix(_TENSORS, tensor_nbytes(tensor))
            yield from _tensor_pieces(tensor)
        yield after
    yield _part(model, ModelProto(), _GRAPH, above=True)


def _tensor_pieces(tensor: TensorProto) -> Iterator[bytes | memoryview]:
    if is_outside(tensor):
        yield _part(tensor, TensorProto(), _DATA, above=False)
        yield prefix(_DATA, nbytes_outside(tensor))
        yield from pieces(tensor)
        yield _part(tensor, TensorProto(), _DATA, above=True, but=_PLACE)
        return
    if not _is_large(tensor) or len(UnknownFieldSet(tensor)):
        yield tensor.SerializeToString()
        return
    yield _part(tensor, TensorProto(), _DATA, above=False)
    data = tensor.raw_data
    yield prefix(_DATA, len(data))
    yield data
    yield _part(tensor, TensorProto(), _DATA, above=True)


def _is_large(tensor: TensorProto) -> bool:
    few_axes = len(tensor.dims) <= _FEW_AXES  # a damaged file may have a million
    return few_axes and math.prod(tensor.dims) >= _LARGE and tensor.HasField("raw_data")


def _part(source: Any, empty: Any, number: int, *, above: bool, but: tuple[str, ...] = ()) -> bytes:
    """A message's fields with lower or higher numbers than one has; they are written in order."""
    fields = source.DESCRIPTOR.fields
    others = [f.name for f in fields if f.number == number or (f.number > number) != above]
    copy_but(empty, source, *others, *but)
    return bytes(empty.SerializeToString())


def tensor_nbytes(tensor: TensorProto) -> int:
    """`tensor.ByteSize()`; to answer that, protobuf serializes the message, which is large here.

    Data outside of the message count as if they were inside.
    """
    if is_outside(tensor):
        inside = TensorProto()
        copy_but(inside, tensor, *_PLACE)
        return int(inside.ByteSize()) + framed(nbytes_outside(tensor))
    if not _is_large(tensor) or len(UnknownFieldSet(tensor)):
        return int(tensor.ByteSize())
    rest = TensorProto()
    copy_but(rest, tensor, "raw_data")
    return int(rest.ByteSize()) + framed(len(tensor.raw_data))


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
        inside += sum(framed(tensor_nbytes(tensor)) for tensor in model.graph.initializer)
        inside += sum(framed(node.ByteSize()) for node in model.graph.node)
        return rest.ByteSize() + (framed(inside) if model.HasField("graph") else 0)
    except EncodeError as error:
        raise Prune2OnnxError(
            f"more than {MAX_NBYTES:,} bytes in one part of the model: {one_line(error)}; "
            "keep its weights as initializers of the main graph"
        ) from error
