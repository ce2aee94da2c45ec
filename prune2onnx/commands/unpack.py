"""`unpack`: read, decode, write; weights of gigabytes go by way of a file."""

from __future__ import annotations

from pathlib import Path

from prune2onnx.files import scratch
from prune2onnx.graph.file import file_nbytes, save
from prune2onnx.graph.outside import Spill
from prune2onnx.packing.decoding import MAX_BYTES
from prune2onnx.packing.sparse import from_sparse
from prune2onnx.packing.unpack import read, unpack

FREE_NBYTES = 1 << 28
"""Bytes of decoded weights that stay in memory."""


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
    with scratch(target, file_nbytes(source)) as (stream, path):
        model = unpack(given, max_bytes, spill=Spill(stream, path, FREE_NBYTES))
        if model.graph.sparse_initializer:
            model = from_sparse(model, max_bytes)
        return save(model, target, external, source=source)
