"""The multiples of steps that a layer's weights may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.calibration.layers import Layer
from prune2onnx.packing.quantized import MOST_STEPS

_WIDEST = 64  # largest step of integers


@dataclass(frozen=True, eq=False)
class Grid:
    """The multiples that a weight's values may be.

    Attributes:
        steps: of each output, [groups, outputs]; of a table, of each row, [1, rows].
        low: smallest code, [groups, inputs, outputs], or one for all: [groups, 1, 1].
        high: largest code, the same.
        parameter: of integers, the step among them.
    """

    steps: NDArray[np.float32]
    low: NDArray[np.int16]
    high: NDArray[np.int16]
    parameter: int = 1

    @staticmethod
    def of(
        layer: Layer, step: float, most: NDArray[np.floating[Any]], *, table: bool = False
    ) -> Grid:
        """About a step; larger where a weight would need it, and whole for integers.

        Args:
            layer: whose.
            step: that is wanted.
            most: the largest weight of each output or row, [groups, outputs].
            table: whether rows are looked up.
        """
        if layer.scale is None:
            bound = np.full((len(most), 1, 1), MOST_STEPS, np.int16)
            return Grid(_steps(layer, step, most), -bound, bound)
        scales = layer.scale.reshape(most.shape)
        parameter = min(max(round(step / float(np.sqrt(np.square(scales).mean()))), 1), _WIDEST)
        bounds = (
            layer.matrices(np.broadcast_to(bound, layer.weight.rows.shape).astype(np.int16))
            for bound in layer.weight.code_bounds(parameter)
        )
        low, high = (one.transpose(0, 2, 1) if table else one for one in bounds)
        return Grid((scales * parameter).astype(np.float32), low, high, parameter)

    def nearest(self, values: NDArray[np.floating[Any]]) -> NDArray[np.int16]:
        """Codes of values [groups, inputs, outputs]; of a table, [1, places, rows]."""
        codes = np.rint(values / self.steps[:, None])
        clipped: NDArray[np.int16] = np.clip(codes, self.low, self.high).astype(np.int16)
        return clipped


def _steps(layer: Layer, step: float, most: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The step of each output, or of each row of a table: larger where a weight would need it.

    Args:
        layer: whose.
        step: that is wanted.
        most: the largest weight of each, [groups, outputs].
    """
    needed = most / MOST_STEPS
    if (needed <= step).all():
        return np.full(most.shape, step, np.float32)
    if not layer.has_channel_steps:
        return np.full(most.shape, max(step, float(needed.max())), np.float32)
    # two bytes each, where they are not too small for that
    half = np.float16(step) if step > 2.0**-12 else step
    larger = needed.astype(np.float16) if needed.min() > 2.0**-12 else needed
    return np.where(needed <= half, half, np.nextafter(larger, larger.dtype.type(np.inf))).astype(
        np.float32
    )
