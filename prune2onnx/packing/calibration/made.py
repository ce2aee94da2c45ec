"""A layer's weight as calibration has made it, also as arrays that can be kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.approximation.candidates import Written
from prune2onnx.packing.quantized import Quantized


@dataclass(frozen=True, eq=False)
class Made:
    """A weight as it is written, by which encoding, and the layer's relative squared error.

    Attributes:
        written: the same.
        how: as of `candidates.Candidate`, or "calibrated grid" or "pruned".
        error: None where no example says.
    """

    written: Written
    how: str
    error: float | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it; codes are a byte each, and arrays of other types than numpy's their bytes."""
        found: dict[str, NDArray[Any]] = {
            "how": np.array(self.how),
            "bits": np.array(self.written.bits),
        }
        if self.error is not None:
            found["error"] = np.array(self.error)
        known = self.written.quantized
        if known is None:
            return found | _stored("array", self.written.array)
        narrow = np.uint8 if known.codebook.size < 256 else known.codes.dtype
        found["codes"] = known.codes.astype(narrow)
        if known.scale is not None:
            found["scale"] = known.scale
        return found | _stored("codebook", known.codebook)

    @staticmethod
    def of(arrays: dict[str, NDArray[Any]]) -> Made:
        """The way back."""
        error = float(arrays["error"]) if "error" in arrays else None
        if "codes" in arrays:
            codebook = _restored("codebook", arrays)
            known = Quantized(arrays["codes"].astype(np.int64), codebook, arrays.get("scale"))
            written = Written(known.dense(), known, float(arrays["bits"]))
        else:
            written = Written(_restored("array", arrays), None, float(arrays["bits"]))
        return Made(written, str(arrays["how"]), error)


def _stored(name: str, array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if array.dtype.name != "bfloat16":
        return {name: array}
    return {f"{name} of bfloat16": array.view(np.uint16)}


def _restored(name: str, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    if name in arrays:
        return arrays[name]
    return arrays[f"{name} of bfloat16"].view(ml_dtypes.bfloat16)
