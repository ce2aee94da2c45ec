"""ONNX's own sparse tensors: weights written as SparseTensorProto, measured, and made dense again.

`--format sparse-initializer` writes them for consumers that want the standard's own form; they are
also the baseline for the codecs. Nothing here knows the codecs or decode functions.

The form: values [nnz] in the weight's element type and with its name; indices [nnz] into its
row-major order, ascending, as packed varints (`int64_data`: ONNX's checker takes INT64 only, and
raw ones are eight bytes each); dims, the weight's shape. An element is an entry unless all its bits
are zero, so -0.0 and NaN are kept.

What reads it: onnxruntime 1.17.3 to 1.32.0 makes it dense when a session is created, whatever the
rank, also inside subgraphs and as a graph input's default. `onnx.checker.check_model` accepts it;
with `full_check=True` it does not, since no operator's schema takes a sparse tensor. onnx-ir, and
with it onnxscript's optimizer, drops `sparse_initializer`, so nothing may rewrite the model after
`to_sparse`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
)
from scipy.sparse import coo_array

from prune2onnx.graph.normalize import drop_inputs
from prune2onnx.graph.protobuf import MAX_NBYTES, framed, tensor_nbytes
from prune2onnx.graph.rewritten import Changes
from prune2onnx.graph.tensors import array_of, fill_dense, within
from prune2onnx.graph.walk import bodies
from prune2onnx.packing.codecs import bits_of
from prune2onnx.packing.rows import WeightRow

CODEC = "sparse-initializer"
"""The codec's name in a row, for a weight in this form."""

WRITTEN = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.UINT16,
    TensorProto.UINT32,
    TensorProto.UINT64,
    TensorProto.BOOL,
)
"""Element types that onnxruntime makes dense; it rejects 4-bit, complex and string ones."""

_IR = 6  # the first IR version with sparse initializers
_OPTIONAL_IR = 4  # from here on a caller may replace an initializer that is a graph input, too


def to_sparse(model: ModelProto) -> tuple[ModelProto, tuple[WeightRow, ...]]:
    """Writes every initializer as a sparse one where that takes fewer bytes.

    Lossless: `from_sparse` gives the same bits, though the sparse ones then follow the others.

    Args:
        model: a dense model, not modified; external data must be loaded.

    Returns:
        The model, an equal copy where nothing gets smaller, and one row per initializer: of the
        graph in its order, then of its subgraphs.

    Raises:
        Prune2OnnxError: external data is not loaded, or an initializer is damaged.
    """
    result = ModelProto()
    result.CopyFrom(model)
    rows: list[WeightRow] = []
    for graph in _graphs(result):
        tensors = list(graph.initializer)
        graph.ClearField("initializer")
        for tensor in tensors:
            sparse, row = _written(tensor)
            rows.append(row)
            if sparse is None:
                graph.initializer.append(tensor)
            else:
                graph.sparse_initializer.append(sparse)
    if any(row.codec == CODEC for row in rows) and result.ir_version < _IR:
        if result.ir_version < _OPTIONAL_IR:
            drop_inputs(result, Changes())
        result.ir_version = _IR
    return result, tuple(rows)


def from_sparse(model: ModelProto, max_bytes: int = MAX_NBYTES) -> ModelProto:
    """Makes every sparse initializer and every `sparse_value` of a Constant node dense.

    Args:
        model: not modified; external data must be loaded. Subgraphs and functions are entered.
        max_bytes: the most bytes that the dense tensors may take together.

    Returns:
        A model without sparse tensors, an equal copy where there were none. What was a sparse
        initializer follows the graph's other initializers.

    Raises:
        Prune2OnnxError: a sparse tensor is damaged or too large; the message names it.
    """
    result = ModelProto()
    result.CopyFrom(model)
    left = max_bytes
    graphs = list(_graphs(result))
    for graph in graphs:
        for sparse in graph.sparse_initializer:
            left = within(left, sparse)
            fill_dense(graph.initializer.add(), sparse)
        graph.ClearField("sparse_initializer")
    if model.graph.sparse_initializer and result.ir_version < _OPTIONAL_IR:
        result.ir_version = _OPTIONAL_IR  # older ones want each initializer among the inputs
    for nodes in (*(graph.node for graph in graphs), *(f.node for f in result.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                    sparse = attribute.sparse_tensor
                    sparse.values.name = sparse.values.name or node.output[0]
                    left = within(left, sparse)
                    made = AttributeProto(name="value", type=AttributeProto.TENSOR)
                    fill_dense(made.t, sparse)
                    attribute.CopyFrom(made)
    return result


def sparse_nbytes(array: NDArray[Any], name: str = "") -> int | None:
    """Bytes of a weight as a sparse initializer, exactly, without making one.

    Args:
        array: the dense values.
        name: of the weight; it is part of the form.

    Returns:
        Bytes that it adds to the file, more than dense where few elements are zero; None where
        onnxruntime reads no sparse form of its shape or element type.

    >>> sparse_nbytes(np.eye(4, dtype=np.float32))  # 4 values of 4 bytes, 4 indices of 1
    44
    """
    if _refusal(array):
        return None
    bits = bits_of(array.reshape(-1))
    nnz = int(np.count_nonzero(bits))
    # A varint takes a byte for each 7 bits: one, and one more for each such bound that it reaches.
    indices, bound = nnz, 1 << 7
    while bound < bits.size:
        indices += int(np.count_nonzero(bits[bound:]))
        bound <<= 7
    frame = _frame(array, nnz, name)
    inside = framed(frame.values.ByteSize() + framed(nnz * array.itemsize))
    inside += framed(frame.indices.ByteSize() + (framed(indices) if nnz else 0))
    frame.ClearField("values")
    frame.ClearField("indices")
    return framed(frame.ByteSize() + inside)


def _written(tensor: TensorProto) -> tuple[SparseTensorProto | None, WeightRow]:
    """An initializer as a sparse one, or None where it stays dense, and its row."""
    array = array_of(tensor)
    dense_nbytes = framed(tensor_nbytes(tensor))
    reason = _refusal(array)
    if not reason:
        frame = _frame(array, 0, tensor.name)
        # Of the bits, not the values: a sparse matrix of values would drop -0.0.
        entries = coo_array(bits_of(array.reshape(-1)).reshape(1, -1))
        frame.values.dims[:] = frame.indices.dims[:] = [entries.nnz]
        frame.values.raw_data = entries.data.tobytes()
        frame.indices.int64_data.extend(entries.col.tolist())
        if tensor.HasField("doc_string"):
            frame.values.doc_string = tensor.doc_string
        frame.values.metadata_props.extend(tensor.metadata_props)
        nbytes = framed(frame.ByteSize())
        if nbytes < dense_nbytes:
            return frame, WeightRow.of(tensor.name, array, CODEC, nbytes)
        reason = f"{CODEC} takes {nbytes:,} bytes, dense {dense_nbytes:,}"
    return None, WeightRow.of(tensor.name, array, "dense", dense_nbytes, reason)


def _refusal(array: NDArray[Any]) -> str:
    """Why an array has no sparse form that onnxruntime reads; "" where it has one."""
    if not array.ndim:
        return "a scalar; a sparse tensor has at least one axis"
    if not array.size:
        return "empty; a sparse tensor has no axis of length 0"
    if helper.np_dtype_to_tensor_dtype(array.dtype) not in WRITTEN:
        return f"onnxruntime reads no sparse tensor of {array.dtype}"
    return ""


def _frame(array: NDArray[Any], nnz: int, name: str) -> SparseTensorProto:
    """A sparse tensor without its values and indices."""
    element_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    return SparseTensorProto(
        values=TensorProto(name=name, data_type=element_type, dims=[nnz]),
        indices=TensorProto(data_type=TensorProto.INT64, dims=[nnz]),
        dims=array.shape,
    )


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The model's graph and every subgraph in it and in its functions."""
    yield model.graph
    yield from _inner(model.graph.node)
    for function in model.functions:
        yield from _inner(function.node)


def _inner(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    for node in nodes:
        for graph in bodies(node):
            yield graph
            yield from _inner(graph.node)
