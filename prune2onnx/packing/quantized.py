"""A weight on few levels: integer codes, a codebook and a scale; the step that values share.

Training knows the step of each weight (`on_steps`); for other weights it is searched for
(`step_of`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.tensors import array_of

_LEAST_STEP = np.float32(1e-30)
"""Smaller values get no step: their quotients may be denormal, which some runtimes flush."""

MOST_STEPS = 127
"""Largest multiple of a step: -127 ... 127 are 255 levels, which a byte can count."""


@dataclass(frozen=True)
class Quantized:
    """A weight as integer codes, a codebook and a scale: codebook[code] * scale.

    Attributes:
        codes: int64, the weight's shape; 0 where the weight is zero, else 1 + the level's index.
        codebook: [levels], the weight's dtype, ascending, without the zero.
        scale: float32, positive, broadcastable to the weight, such as [out, 1, 1, 1]; None: 1. Of
            blocks of 4 bits, which stay so at run time, one for each element, of either sign.
            Only float32 weights have one: their product is one IEEE multiplication, the same in
            numpy and in every onnxruntime. For float16 and bfloat16 that does not hold (kernels
            compute in float32, or are missing), so their codebook holds the final values.
    """

    codes: NDArray[np.int64]
    codebook: NDArray[Any]
    scale: NDArray[np.float32] | None = None

    def levels(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """What the scale multiplies, of some rows: the codebook's values; code 0 is +0 exactly."""
        zero = np.zeros(1, self.codebook.dtype)
        values: NDArray[Any] = np.concatenate([zero, self.codebook])[self.codes[begin:end]]
        return values

    def dense(self) -> NDArray[Any]:
        """The weight, of the codes' shape and the codebook's dtype."""
        return self.levels() if self.scale is None else self.levels() * self.scale


def scaled(tensor: TensorProto, known: Quantized | None) -> Quantized | None:
    """What is known of a weight, if it has a scale.

    Raises:
        Prune2OnnxError: it is not what gives the weight.
    """
    if known is None or known.scale is None:
        return None
    array = array_of(tensor)
    if known.codes.shape != array.shape or known.dense().tobytes() != array.tobytes():
        raise Prune2OnnxError(
            f"{tensor.name}: codes, codebook and scale do not give the model's weight; "
            "pass those of the model that is packed"
        )
    return known


def new_steps(
    weights: Sequence[tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]],
) -> list[np.float32 | None]:
    """The step that each weight gets as its scale; None: it has a scale, or gets none.

    Whole numbers need no scale, unless other weights have one: with a scale, like them, they can
    be written in the same group. So can zeros, on any step.

    Args:
        weights: the scale of each, if it has one; its different values but +0, if they are few and
            float32.
    """
    steps = [_step_in(*one) for one in weights]
    if all(step is None or step % 1 == 0 for step in steps):
        return [None] * len(steps)
    common = next(step for step in steps if step is not None)
    for at, (scale, nonzero) in enumerate(weights):
        if scale is not None:
            steps[at] = None
        elif nonzero is not None and not nonzero.size:
            steps[at] = common
    return steps


def _step_in(
    scale: NDArray[np.float32] | None, nonzero: NDArray[np.float32] | None
) -> np.float32 | None:
    """The step of which all values are multiples: the known one, else one that is searched for."""
    if scale is not None:
        return np.float32(scale.item()) if scale.size == 1 else None
    return None if nonzero is None else step_of(nonzero)


def multiples(values: NDArray[np.float32], step: np.float32) -> NDArray[np.float32]:
    """The whole numbers that give values on a step."""
    whole: NDArray[np.float32] = np.rint(values / step)
    return whole + np.float32(0)  # no -0


def step_of(values: NDArray[np.float32]) -> np.float32 | None:
    """The largest step s of which all values are multiples: value = k * s, rounded once.

    Args:
        values: a codebook: few distinct float32 values, none of them zero.

    Returns:
        A step with |k| <= 127; None where there is none, or where there are no values.

    >>> step_of(np.float32([0.75, -0.5])), step_of(np.float32([0.75, 0.001]))
    (np.float32(0.25), None)
    """
    magnitudes = np.unique(np.abs(values))
    if not magnitudes.size or not np.isfinite(magnitudes).all() or magnitudes[0] < _LEAST_STEP:
        return None
    near = magnitudes[-1] / np.arange(1, MOST_STEPS + 1, dtype=np.float32)
    # The largest value and the quotient are both rounded: the step is the quotient or a neighbour.
    steps = np.stack(
        [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))]
    )
    steps = steps.T.reshape(-1, 1)
    with np.errstate(over="ignore"):
        equal = np.rint(magnitudes / steps) * steps == magnitudes
    found = np.flatnonzero(equal.all(axis=1))
    return steps[found[0], 0] if found.size else None


def on_steps(model: ModelProto, steps: Mapping[str, float]) -> dict[str, Quantized]:
    """Weights of a model that are multiples of a step that training knows: name -> codes.

    Args:
        model: its initializers may have lost channels or changed their order since training.
        steps: name of a weight -> its step; one that does not fit (any more) is left out.
    """
    found: dict[str, Quantized] = {}
    for tensor in model.graph.initializer:
        if tensor.name in steps and tensor.data_type == TensorProto.FLOAT:
            made = _multiples(array_of(tensor), np.float32(steps[tensor.name]))
            if made is not None:
                found[tensor.name] = made
    return found


def _multiples(array: NDArray[np.float32], step: np.float32) -> Quantized | None:
    """Codes on a step, or on a multiple of it; None where the values are no multiples of it."""
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.rint(array / step)
    if not np.abs(whole).max(initial=0) <= MOST_STEPS or not whole.any():
        return None
    common = np.gcd.reduce(whole.astype(np.int64), axis=None)
    coarse = np.float32(step * common)
    for factor, scale in ((common, coarse), (1, step)):
        levels, codes = np.unique(whole / factor, return_inverse=True)
        codebook = levels[levels != 0].astype(np.float32)
        place = np.cumsum(levels != 0) * (levels != 0)
        made = Quantized(place[codes.reshape(array.shape)], codebook, np.full(1, scale))
        if made.dense().tobytes() == array.tobytes():
            return made
    return None
