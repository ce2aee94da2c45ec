"""`unpack`: read, decode, write; weights of gigabytes go by way of a file."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto

from prune2onnx.files import scratch
from prune2onnx.graph.domain import DOMAIN, decoder
from prune2onnx.graph.file import file_nbytes, save
from prune2onnx.graph.outside import Spill
from prune2onnx.graph.protobuf import tensor_nbytes
from prune2onnx.packing.decoding import MAX_BYTES
from prune2onnx.packing.sparse import from_sparse
from prune2onnx.packing.unpack import read, unpack
from prune2onnx.runtime.memory import BASE_NBYTES, require

FREE_NBYTES = 1 << 28
"""Bytes of decoded weights that stay in memory."""

_DECODING = 12
"""Bytes that decoding holds for each byte of the streams of a call: 8 to 24 were measured."""


def unpack_file(
    source: Path, target: Path, external: str | None = None, max_bytes: int = MAX_BYTES
) -> tuple[Path, ...]:
    """Writes a file with dense weights, equal bit for bit.

    Args:
        source: the file to unpack; one that is not packed is copied.
        target: the file to write.
        external: as for `graph.file.save`.
        max_bytes: the largest array that decoding may make.

    Returns:
        The files written, the model first.

    Raises:
        Prune2OnnxError: the file cannot be read, is damaged, takes more than is allowed, or cannot
            be written.
    """
    given = read(source, max_bytes, lazily=True)
    require_memory(f"unpacking {source.name}", given)
    with scratch(target, file_nbytes(source)) as (stream, path):
        model = unpack(given, max_bytes, spill=Spill(stream, path, FREE_NBYTES))
        if model.graph.sparse_initializer:
            model = from_sparse(model, max_bytes)
        return save(model, target, external, source=source)


def require_memory(doing: str, model: ModelProto) -> None:
    """Makes sure that there is memory to decode a model, one call after the other.

    Args:
        doing: what for, as the subject of a sentence.
        model: as it was read.

    Raises:
        OutOfMemoryError: there is far less.
    """
    streams = {tensor.name: tensor_nbytes(tensor) for tensor in model.graph.initializer}
    calls = [node for node in model.graph.node if node.domain == DOMAIN] or decoder(model)
    if len(calls) > 1 and calls[0].domain:
        most = max(sum(streams.get(name, 0) for name in node.input) for node in calls)
    else:  # all weights are decoded at once
        most = sum(streams.get(name, 0) for node in calls for name in node.input)
    require(doing, BASE_NBYTES + _DECODING * most, "use a machine with more")
