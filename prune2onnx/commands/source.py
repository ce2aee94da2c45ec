"""The ONNX file that a verb starts from: read, unpacked and normalized once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onnx import ModelProto

from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.protobuf import nbytes
from prune2onnx.graph.rewritten import Rewritten
from prune2onnx.graph.walk import opset
from prune2onnx.packing.decoding import MAX_BYTES
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.session import load_runnable


@dataclass(frozen=True, eq=False)
class Source:
    """A file that was read, and its unpacked and normalized forms.

    Attributes:
        path: the file.
        model: the model in it, external data loaded.
    """

    path: Path
    model: ModelProto

    @property
    def nbytes(self) -> int:
        """Size of the file, external data included."""
        return nbytes(self.model)

    @property
    def is_packed(self) -> bool:
        """Whether its weights are coded."""
        return is_packed(self.model)

    @cached_property
    def unpacked(self) -> ModelProto:
        """The model with dense weights, as before packing."""
        return unpack(self.model)

    @cached_property
    def normal(self) -> Rewritten:
        """The normalized model, and what normalizing changed."""
        return normalize(self.unpacked, MAX_BYTES)

    @property
    def is_upgraded(self) -> bool:
        """Whether normalizing upgraded the operator set."""
        return opset(self.model.opset_import) != opset(self.normal.model.opset_import)


def read(path: Path, *, lazily: bool = False) -> Source:
    """Reads a file.

    Args:
        path: the file.
        lazily: whether large weights stay in the file, which must then stay as it is.

    Raises:
        Prune2OnnxError: it cannot be read, or is damaged.
    """
    return Source(path, load_runnable(path, lazily=lazily))
