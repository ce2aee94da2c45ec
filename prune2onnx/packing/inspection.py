"""Reads how the weights of a file are stored, and what other forms of them would take.

Runs nothing in onnxruntime: what a load takes is predicted here; `runtime.validate` measures it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.graph.domain import DOMAIN, MARK
from prune2onnx.graph.protobuf import framed, tensor_nbytes
from prune2onnx.graph.protobuf import nbytes as nbytes_of
from prune2onnx.graph.tensors import array_of, dense_array, within
from prune2onnx.packing.codecs import entropy_nbytes, huffman
from prune2onnx.packing.codecs.work import Work
from prune2onnx.packing.decoding import MAX_BYTES, Coded, Decoder, Extent
from prune2onnx.packing.inline import is_packed, outlined
from prune2onnx.packing.load_cost import UNPACK, Prediction, lighter, predict, sizes
from prune2onnx.packing.rows import WeightRow
from prune2onnx.packing.sparse import CODEC as SPARSE
from prune2onnx.packing.sparse import sparse_nbytes

# Other forms are measured for this many dense bytes only, at 10 to 100 MB/s: a small file may
# decode to gigabytes, and its reader should not wait for minutes.
_FREE_NBYTES = 1 << 26
_NBYTES_PER_BYTE = 32
_MOST_NBYTES = 1 << 28


@dataclass(frozen=True)
class Inspection:
    """How the weights of a model are stored.

    Attributes:
        rows: one per weight: the coded ones, then initializers in the file's order.
        load: what loads of the file and of the unpacked one take; both are one where nothing is
            packed.
        warning: what another tool did to a packed file; "" where none did.
        load_warning: that a load takes far more than the dense file's, and what to do; "" where it
            does not.
    """

    rows: tuple[WeightRow, ...]
    load: Prediction
    warning: str
    load_warning: str


def inspect(
    model: ModelProto, max_bytes: int = MAX_BYTES, known: Coded | None = None
) -> Inspection:
    """Reads how each weight of a model is stored: packed, dense, or as a sparse initializer.

    Other forms are measured until the weights decode to more than 256 MiB, or to more than 64 MiB
    and 32 times the size of the file; the rows from there on leave them out.

    Args:
        model: any; external data must be loaded.
        max_bytes: the largest array that decoding may make, and the most bytes that all sparse
            initializers together may take when they are dense.
        known: its decoded weights (`coded`), if they are at hand.

    Raises:
        Prune2OnnxError: the decode call is damaged, or takes more than is allowed.
    """
    left_over = inflated(model)
    weights = Decoder(model, max_bytes) if known is None else known
    model = outlined(model)
    streams = {name for node in model.graph.node if node.domain == DOMAIN for name in node.input}
    given = sum(tensor_nbytes(tensor) for tensor in model.graph.initializer)
    left = min(_FREE_NBYTES + _NBYTES_PER_BYTE * given, _MOST_NBYTES)
    rows = []

    def add(name: str, array: NDArray[Any], codec: str, nbytes: int, reason: str = "") -> None:
        nonlocal left
        left -= array.nbytes
        rows.append(_row(name, array, codec, nbytes, reason, measured=left >= 0))

    extents: dict[str, Extent] = {}
    for name, array, codec, nbytes in weights:
        extents[name] = Extent(array.shape, array.dtype)
        add(name, array, codec, nbytes)
    for tensor in model.graph.initializer:
        if tensor.name not in streams:
            nbytes = framed(tensor_nbytes(tensor))
            add(tensor.name, array_of(tensor), "dense", nbytes, "stored dense in the file")
    allowed = max_bytes
    for sparse in model.graph.sparse_initializer:
        allowed = within(allowed, sparse)
        array = dense_array(sparse)
        add(sparse.values.name, array, SPARSE, framed(sparse.ByteSize()))
    load = load_of(model, extents, weights.work)
    is_entropy_coded = load.stages > 0 or _entropy_coded(model, weights.work)
    other = lighter(load, rows, entropy_coded=is_entropy_coded)
    advice = f"prune2onnx pack with --load {other} makes one that takes less" if other else UNPACK
    return Inspection(tuple(rows), load, left_over, load.warning(advice))


def _entropy_coded(model: ModelProto, work: Work) -> bool:
    """Whether a file without stages has an entropy code: Huffman's functions, or Rice's TopK."""
    names = {function.name for function in model.functions if function.domain == DOMAIN}
    return bool(names & huffman.LANES.keys()) or "TopK" in work.made


def load_of(model: ModelProto, weights: Mapping[str, Extent], work: Work) -> Prediction:
    """What loads take: of the file, and of the one with these weights in place of their streams."""
    packed = dense = nbytes_of(model)
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    streams = {name for node in calls for name in node.input}
    if calls:
        dense -= sum(framed(node.ByteSize()) for node in calls)
        dense -= sum(framed(f.ByteSize(), tag=2) for f in model.functions if f.domain == DOMAIN)
        stored = (tensor for tensor in model.graph.initializer if tensor.name in streams)
        dense -= sum(framed(tensor_nbytes(tensor)) for tensor in stored)
        dense += sum(weight.nbytes for weight in weights.values())
    return predict(model.graph, sizes(weights), work, packed, dense)


def inflated(model: ModelProto) -> str:
    """What another tool did to a packed file; "" for a file that is packed or never was.

    A file was packed once if it imports the decode call's operator set or has a metadata entry of
    ours (onnxscript's optimizer removes imports without a call).
    """
    ours = any(entry.domain == DOMAIN for entry in model.opset_import)
    ours |= any(str(entry.key).split(".")[0] == MARK for entry in model.metadata_props)
    if not ours or is_packed(model):
        return ""
    left = constant_nodes(model)
    if left:
        what = f"another tool took its decoder apart, {left} nodes of it are left"
    else:
        what = "another tool made its weights dense again"
    return f"this file was packed once, and {what}; unpack, treat, and pack again as the last step"


def constant_nodes(model: ModelProto) -> int:
    """Nodes that depend on no input of the graph, except those that dense files have, too."""
    constant = {""} | {tensor.name for tensor in model.graph.initializer}
    constant |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    count = 0
    for node in model.graph.node:
        if all(name in constant for name in node.input):
            constant.update(node.output)
            count += node.op_type not in ("Constant", "DequantizeLinear", "Identity", "Transpose")
    return count


def _row(
    name: str, array: NDArray[Any], codec: str, nbytes: int, reason: str, *, measured: bool
) -> WeightRow:
    row = WeightRow.of(name, array, codec, nbytes, reason)
    if not measured or array.dtype.kind in "Oc":
        return row
    return replace(
        row,
        entropy_nbytes=entropy_nbytes(array),
        sparse_nbytes=sparse_nbytes(array, name),
        zipped_nbytes=len(zlib.compress(np.ascontiguousarray(array).tobytes())),
    )
