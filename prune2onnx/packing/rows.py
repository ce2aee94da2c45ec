"""How one weight is stored in a file: a row of a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.codecs.staged import Large
from prune2onnx.packing.codecs.weight import numpy_type


@dataclass(frozen=True)
class WeightRow:
    """How one weight is stored in a file.

    Attributes:
        name: the initializer's name, the same as in the state_dict.
        shape: its dense shape.
        dtype: its dense dtype, as numpy names it.
        nnz: elements that are not zero (-0.0 counts as zero).
        codec: the codec's name; "dense" where none made the file smaller.
        nbytes: its bytes in the file: a dense tensor whole; of a coded weight its part of the
            streams, to the byte, without the decoder, which all weights share.
        reason: why it stays dense; "" for a coded weight.
        entropy_nbytes: the zero-order entropies of its positions and values, in bytes; None where
            it was not measured, as for the next two.
        sparse_nbytes: bytes as ONNX's own sparse initializer.
        zipped_nbytes: bytes of the dense data after zlib.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    codec: str
    nbytes: int
    reason: str = ""
    entropy_nbytes: float | None = None
    sparse_nbytes: int | None = None
    zipped_nbytes: int | None = None

    @classmethod
    def of(
        cls, name: str, array: NDArray[Any], codec: str, nbytes: int, reason: str = ""
    ) -> WeightRow:
        """The row of a weight with these values; strings all count as nonzeros."""
        nnz = array.size if array.dtype.kind == "O" else int(np.count_nonzero(array))
        return cls(name, tuple(array.shape), str(array.dtype), nnz, codec, nbytes, reason)

    @classmethod
    def of_large(
        cls, name: str, weight: Large, nnz: int, codec: str, nbytes: int, reason: str = ""
    ) -> WeightRow:
        """The row of a weight that is not in memory, with so many nonzeros."""
        dtype = str(numpy_type(weight.element_type))
        return cls(name, weight.shape, dtype, nnz, codec, nbytes, reason)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Nonzeros over elements, 0-1; 0 for an empty weight."""
        return self.nnz / self.size if self.size else 0.0

    @property
    def bits_per_nonzero(self) -> float | None:
        """8 * nbytes / nnz; None for a weight without a nonzero."""
        return 8 * self.nbytes / self.nnz if self.nnz else None

    @property
    def bits_per_weight(self) -> float | None:
        """8 * nbytes / size; None for an empty weight."""
        return 8 * self.nbytes / self.size if self.size else None

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in report.json; what was not measured is left out."""
        known = {
            "entropy_nbytes": self.entropy_nbytes,
            "sparse_nbytes": self.sparse_nbytes,
            "zipped_nbytes": self.zipped_nbytes,
        }
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "nnz": self.nnz,
            "density": self.density,
            "codec": self.codec,
            "nbytes": self.nbytes,
            "bits_per_nonzero": self.bits_per_nonzero,
            "bits_per_weight": self.bits_per_weight,
            "reason": self.reason,
            **{key: value for key, value in known.items() if value is not None},
        }
