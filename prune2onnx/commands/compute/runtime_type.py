"""What most weights of a file are while a session runs: the type that names of files tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from onnx import ModelProto

from prune2onnx.commands.source import read
from prune2onnx.graph.tensors import element_type
from prune2onnx.graph.walk import attribute, nodes_in
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.rows import WeightRow

_BLOCKS = "MatMulNBits"
_TABLE = 1 << 20
"""How much more an element of a matrix counts than one of a table, of which few rows are read."""


def runtime_type(path: Path, rows: Iterable[WeightRow] | None = None) -> str:
    """The element type that most elements of matrices have: "float32", "float16", "int8", "int4".

    Args:
        path: the file, packed or not.
        rows: its weights, if they are known.
    """
    given = read(path, lazily=True)
    counts = Counter[str]()
    blobs = False
    for node in nodes_in(given.model.graph.node):
        if node.op_type == _BLOCKS:
            blobs = True
            kind = "int4" if int(attribute(node, "bits", 4)) <= 4 else "int8"
            counts[kind] += _TABLE * int(attribute(node, "K")) * int(attribute(node, "N"))
    tables = _tables(given.model)
    if rows is None and given.is_packed:
        rows = inspect(given.model).rows
    for name, shape, kind in _stored(given.model) if rows is None else map(_of, rows):
        if len(shape) > 1 and not (blobs and kind == "uint8"):
            counts[kind.removeprefix("u")] += math.prod(shape) * (1 if name in tables else _TABLE)
    return counts.most_common(1)[0][0] if counts else "float32"


def _of(row: WeightRow) -> tuple[str, tuple[int, ...], str]:
    return row.name, row.shape, row.dtype


def _stored(model: ModelProto) -> Iterable[tuple[str, tuple[int, ...], str]]:
    for tensor in model.graph.initializer:
        kind = element_type(tensor).lower()
        yield tensor.name, tuple(tensor.dims), {"float": "float32"}.get(kind, kind)


def _tables(model: ModelProto) -> set[str]:
    """Weights that only Gather reads."""
    readers: dict[str, set[str]] = {}
    for node in nodes_in(model.graph.node):
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    return {name for name, ops in readers.items() if ops <= {"Gather", "GatherBlockQuantized"}}
