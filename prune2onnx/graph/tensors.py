"""What a tensor of a model declares, and whether its data agree; sparse tensors made dense.

Sizes are computed from the declared shape before anything is allocated. Where tensors stand in a
model: see `walk` and `lift`. How they are coded: see `packing.codecs`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
    numpy_helper,
)

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.outside import is_outside, nbytes_outside, read
from prune2onnx.graph.protobuf import MAX_NBYTES, TYPED_FIELDS

WEIGHT_NBYTES = 64
"""A tensor of fewer bytes is not worth coding, so it may stand anywhere."""

MORE_BYTES = "if the file is to be trusted, `prune2onnx unpack --max-bytes` allows more"
"""Advice for a file that would expand to more than is allowed, in any verb."""

MAX_RANK = 64
"""Most axes of a tensor: numpy's."""

# By number, so that types newer than the installed onnx are known, too.
_BITS = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16,
    **dict.fromkeys((17, 18, 19, 20, 24), 8),  # all float8 types
    **dict.fromkeys((21, 22, 23), 4),  # uint4, int4, float4
    **dict.fromkeys((25, 26), 2),  # uint2, int2
    **dict.fromkeys((27, 28), 6),  # float6
}


def external(tensor: TensorProto) -> bool:
    """Whether the data lie in a file beside the model, and nobody has looked for them yet."""
    return tensor.data_location == TensorProto.EXTERNAL and not is_outside(tensor)


def check_loaded(tensor: TensorProto) -> None:
    """Checks that the data are in the model.

    Raises:
        Prune2OnnxError: they lie in a file beside it.
    """
    if external(tensor):
        raise Prune2OnnxError(
            f"{tensor.name}: its external data is not loaded; read the model with load()"
        )


def element_type(tensor: TensorProto) -> str:
    """The name of the element type, such as `float16`."""
    try:
        return str(TensorProto.DataType.Name(tensor.data_type)).lower()
    except ValueError:
        return f"element type {tensor.data_type}"


def name_of(tensor: TensorProto) -> str:
    """The name, for an error.

    Raises:
        Prune2OnnxError: it is not UTF-8; protobuf then returns bytes.
    """
    name: str | bytes = tensor.name or "a tensor without a name"
    if not isinstance(name, str):
        raise Prune2OnnxError(f"{name[:40]!r}: a name that is not UTF-8; the file is damaged")
    return name


def declared_nbytes(tensor: TensorProto) -> int | None:
    """Bytes of the data by declared shape and type; None for strings and unknown types.

    Raises:
        Prune2OnnxError: the shape has more axes or elements than any tensor has.
    """
    name = name_of(tensor)
    if len(tensor.dims) > MAX_RANK:  # before the product, which takes hours for a long shape
        raise Prune2OnnxError(
            f"{name}: its shape has {len(tensor.dims):,} axes, at most {MAX_RANK} are known; "
            "the file is damaged, export or copy it again"
        )
    if abs(math.prod(tensor.dims)) >= 1 << 128:
        raise Prune2OnnxError(
            f"{name}: its shape has 2^128 elements or more; the file is damaged, export or copy it "
            "again"
        )
    bits = _BITS.get(tensor.data_type)
    return None if bits is None else -(-math.prod(tensor.dims) * bits // 8)


def is_weight(tensor: TensorProto) -> bool:
    """Whether the tensor is large enough to be coded, by its declared shape."""
    return (declared_nbytes(tensor) or 0) >= WEIGHT_NBYTES


def check(tensor: TensorProto) -> None:
    """Checks the declared shape against the data; for external data, only the shape itself.

    Raises:
        Prune2OnnxError: an extent is negative, or the data are of another size; the message names
            the tensor.
    """
    declared_nbytes(tensor)
    shape = list(tensor.dims)
    name = name_of(tensor)
    if any(extent < 0 for extent in shape):
        raise Prune2OnnxError(f"{name}: its shape {shape} has a negative extent; export it again")
    if external(tensor) or tensor.HasField("segment"):
        return
    nbytes = declared_nbytes(tensor)
    size = math.prod(shape)
    if tensor.data_type == TensorProto.STRING:
        got, wanted = len(tensor.string_data), {size}
        unit = "strings"
    elif nbytes is None:
        return  # a type of a newer onnx: left to its checker and to onnxruntime
    elif is_outside(tensor):
        got, wanted, unit = nbytes_outside(tensor), {nbytes}, "bytes"
    elif tensor.HasField("raw_data"):
        got, wanted, unit = len(tensor.raw_data), {nbytes}, "bytes"
    else:
        got = sum(len(getattr(tensor, field)) for field in TYPED_FIELDS)
        unit = "values"
        bits = _BITS[tensor.data_type]
        if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            wanted = {2 * size}
        else:  # types below a byte are packed in int32_data since onnx 1.17, unpacked before
            wanted = {size, nbytes} if bits < 8 else {size}
    if got not in wanted:
        raise Prune2OnnxError(
            f"{name}: {element_type(tensor)} of shape {shape} takes {min(wanted):,} {unit}, it has "
            f"{got:,}; the file is damaged, export or copy it again"
        )


def array_of(tensor: TensorProto) -> NDArray[Any]:
    """The values of a tensor; strings as objects of bytes, which need not be UTF-8.

    Raises:
        Prune2OnnxError: its data are not loaded, of another size than its shape says, or damaged.
    """
    check_loaded(tensor)
    check(tensor)
    if tensor.data_type == TensorProto.STRING:
        strings = np.empty(len(tensor.string_data), object)
        strings[:] = list(tensor.string_data)
        return strings.reshape(tuple(tensor.dims))
    try:
        return rows_of(tensor) if is_outside(tensor) else np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise Prune2OnnxError(
            f"{tensor.name}: a damaged initializer: {one_line(error)[:300]}"
        ) from error


def rows_of(tensor: TensorProto, begin: int = 0, end: int | None = None) -> NDArray[Any]:
    """Some rows of a tensor whose data are outside, as of `array_of`.

    Args:
        tensor: of one axis at least, unless all of it is wanted.
        begin: the first row.
        end: behind the last one; default: all.

    Raises:
        Prune2OnnxError: the data cannot be read.
    """
    shape = tuple(tensor.dims)
    if end is not None:
        shape = (end - begin, *shape[1:])
    row = math.prod(tensor.dims[1:])
    part = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=shape)
    bits = _BITS[tensor.data_type]
    if begin * row * bits % 8 or (end is not None and math.prod(shape) * bits % 8):
        return rows_of(tensor)[begin:end]  # rows that share a byte
    first = begin * row * bits // 8
    data = read(tensor, first, first + (declared_nbytes(part) or 0))
    if bits >= 8:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return data.view(dtype).reshape(shape)
    part.raw_data = data.tobytes()
    return np.asarray(numpy_helper.to_array(part))


def fingerprint(tensor: TensorProto) -> bytes:
    """A digest of element type, shape and stored data; names and notes do not count."""
    digest = hashlib.sha256(repr((tensor.data_type, list(tensor.dims))).encode())
    if is_outside(tensor):
        digest.update(read(tensor).data)
    elif tensor.HasField("raw_data"):
        digest.update(tensor.raw_data)
    else:
        for field in TYPED_FIELDS:
            digest.update(np.asarray(getattr(tensor, field)).tobytes())
    return digest.digest()


def fill_dense(dense: TensorProto, sparse: SparseTensorProto) -> None:
    """Fills an empty tensor with a sparse one's values; their name and notes are kept.

    Raises:
        Prune2OnnxError: as for `dense_array`.
    """
    array = dense_array(sparse)
    dense.name = sparse.values.name
    dense.data_type = sparse.values.data_type
    dense.dims.extend(sparse.dims)
    if sparse.values.doc_string:
        dense.doc_string = sparse.values.doc_string
    dense.metadata_props.extend(sparse.values.metadata_props)
    data = raw_of(array)
    del array  # memory: it, the bytes and their copy in the message would be there at once
    dense.raw_data = data


def dense_array(sparse: SparseTensorProto) -> NDArray[Any]:
    """The values of a sparse tensor, dense.

    Indices are [nnz] (row-major positions) or [nnz, rank] (coordinates), int64, each at most once.

    Raises:
        Prune2OnnxError: shapes or indices do not fit; the message names the tensor.
    """
    values, indices, shape = sparse.values, sparse.indices, list(sparse.dims)
    name = name_of(values)

    def refused(what: str) -> Prune2OnnxError:
        return Prune2OnnxError(f"{name}: {what}; the sparse tensor is damaged, export it again")

    if any(extent < 0 for extent in shape):
        raise refused(f"its shape {shape} has a negative extent")
    nbytes = declared_nbytes(TensorProto(name=name, dims=shape, data_type=values.data_type))
    if nbytes is None:
        raise Prune2OnnxError(
            f"{name}: a sparse tensor of {element_type(values)} cannot be made dense"
        )
    if nbytes > MAX_NBYTES:
        raise refused(f"its shape {shape} takes {nbytes:,} bytes, at most {MAX_NBYTES:,} fit")
    check(values)
    check(indices)
    count = math.prod(values.dims)
    if len(values.dims) != 1 or indices.data_type != TensorProto.INT64:
        raise refused("its values must be [nnz] and its indices int64")
    if list(indices.dims) not in ([count], [count, len(shape)]):
        raise refused(
            f"its indices have shape {list(indices.dims)}, expected [{count}] or "
            f"[{count}, {len(shape)}]"
        )
    size = math.prod(shape)
    data, where = array_of(values), array_of(indices)
    extents = [size] if where.ndim == 1 else shape
    for axis, extent in enumerate(extents):
        at = where if where.ndim == 1 else where[:, axis]
        if count and (at.min() < 0 or at.max() >= extent):
            raise refused(f"an index lies outside of its shape {shape}")
    if where.ndim == 2:
        where = where @ np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1][: len(shape)]
    if np.unique(where).size != count:
        raise refused("an index occurs twice")
    flat = np.zeros(size, data.dtype)
    flat[where] = data
    try:
        return flat.reshape(shape)
    except ValueError as error:  # no elements, and yet too large
        raise refused(f"its shape {shape} is none that an array has") from error


def within(left: int, sparse: SparseTensorProto) -> int:
    """Bytes that are still allowed once a tensor is dense; to be called before it is made dense.

    Args:
        left: bytes that are still allowed before.
        sparse: the tensor.

    Raises:
        Prune2OnnxError: it takes more than are left.
    """
    shape, dtype = list(sparse.dims), sparse.values.data_type
    name = name_of(sparse.values)
    nbytes = declared_nbytes(TensorProto(name=name, dims=shape, data_type=dtype)) or 0
    if nbytes > left:
        raise Prune2OnnxError(
            f"{name}: a sparse tensor of shape {shape} takes {nbytes:,} bytes dense, {left:,} are "
            f"still allowed; {MORE_BYTES}"
        )
    return left - nbytes


def raw_of(array: NDArray[Any]) -> bytes:
    """The data of a tensor with these values: little-endian, row-major, two of 4 bits to a byte."""
    number = helper.np_dtype_to_tensor_dtype(array.dtype)
    if _BITS[number] < 8 or array.dtype.byteorder == ">":
        return bytes(numpy_helper.from_array(np.ascontiguousarray(array)).raw_data)
    return array.tobytes()


def replace(tensor: TensorProto, values: NDArray[Any]) -> None:
    """Replaces shape and values of a tensor, of the same element type; name and notes stay."""
    new = numpy_helper.from_array(np.ascontiguousarray(values))
    for name in (*TYPED_FIELDS, "external_data", "data_location"):
        tensor.ClearField(name)
    tensor.raw_data = new.raw_data
    tensor.dims[:] = new.dims


def evaluated(
    nodes: Sequence[NodeProto], given: Mapping[str, NDArray[Any]], output: str, version: int
) -> NDArray[Any]:
    """What nodes make of arrays, by onnx's reference evaluator; it raises errors of any type.

    Args:
        nodes: sorted, of the operators of ONNX.
        given: all that they read, by name.
        output: the value that is wanted.
        version: of the operator set.
    """
    from onnx.reference import ReferenceEvaluator

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in given.items()
    ]
    graph = helper.make_graph(
        nodes, "evaluated", inputs, [helper.make_empty_tensor_value_info(output)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    (made,) = ReferenceEvaluator(model).run([output], dict(given))
    return np.asarray(made)
