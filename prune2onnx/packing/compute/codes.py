"""Weights as integers with a scale for each output, or for each block of its inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prune2onnx.packing.quantized import MOST_STEPS, Quantized

BLOCK = 32
"""Inputs that share a scale in 4 bits."""

_WIDE = (128, 64, 32)  # inputs of a block in 8 bits, where all blocks of an output have one scale
_LEAST_SCALE = np.float32(1e-30)
_SHRUNK = np.linspace(0.75, 1.05, 13, dtype=np.float32)
"""Scales of a block that are tried, relative to one that clips nothing."""

_SCALE_BITS = 5  # of a block's scale: fewer distinct ones take fewer bytes in a packed file


def in_bytes(
    rows: NDArray[np.float32], known: Quantized | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A weight in int8, with a scale for each output.

    Args:
        rows: [outputs, inputs], finite.
        known: of the same shape: its codes are kept where they fit.

    Returns:
        Codes [outputs, inputs] from -127 to 127; scales [outputs, 1], or [1, 1] for all.
    """
    if known is not None and known.scale is not None:
        levels, scale = known.levels(), known.scale
        fits = bool((np.abs(levels) <= MOST_STEPS).all() and (np.rint(levels) == levels).all())
        if fits and scale.size in (1, len(rows)):
            return levels.astype(np.int8), scale.reshape(-1, 1)
    most = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    scales = np.maximum(most / np.float32(MOST_STEPS), _LEAST_SCALE).astype(np.float32)
    codes = np.clip(np.rint(rows / scales), -MOST_STEPS, MOST_STEPS)
    return codes.astype(np.int8), scales


def in_blocks(
    rows: NDArray[np.float32], known: Quantized | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A weight in 4 bits, with a scale for each block of inputs.

    The element of the largest magnitude becomes about -8, so that all sixteen codes are used; the
    scale is the one of a few with the least squared error.

    Args:
        rows: [outputs, inputs], finite.
        known: of the same shape: its codes are kept if it has a scale for each element, or one for
            all with levels that fit.

    Returns:
        Codes [outputs, inputs] from -8 to 7; scales [outputs, blocks], of either sign.
    """
    if known is not None and known.scale is not None and known.scale.shape == rows.shape:
        return known.levels().astype(np.int8), np.ascontiguousarray(known.scale[:, ::BLOCK])
    outputs, inputs = rows.shape
    blocks = -(-inputs // BLOCK)
    if known is not None and known.scale is not None and known.scale.size == 1:
        levels = known.levels()
        if (np.rint(levels) == levels).all() and levels.min() >= -8 and levels.max() <= 7:
            return levels.astype(np.int8), np.full(
                (outputs, blocks), known.scale.item(), np.float32
            )
    padded = np.pad(rows, ((0, 0), (0, blocks * BLOCK - inputs))).reshape(-1, BLOCK)
    place = np.abs(padded).argmax(axis=1)[:, None]
    most = np.take_along_axis(padded, place, 1)
    best = np.full(len(padded), np.inf, np.float32)
    codes, scales = np.zeros(padded.shape, np.int8), np.ones((len(padded), 1), np.float32)
    for factor in _SHRUNK:
        scale = _coarse(most / np.float32(-8) * factor)
        code = np.clip(np.rint(padded / scale), -8, 7)
        error = np.square(padded - code * scale).sum(axis=1)
        better = error < best
        best[better], codes[better], scales[better] = error[better], code[better], scale[better]
    return codes.reshape(outputs, -1)[:, :inputs], scales.reshape(outputs, blocks)


def each_input(scales: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
    """The scale of each weight, [outputs, inputs], of the scales of blocks."""
    return np.repeat(scales, BLOCK, axis=1)[:, :inputs]


def _coarse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales with few bits of significand, none of them zero."""
    fraction, exponent = np.frexp(scales)
    found = np.ldexp(np.rint(np.ldexp(fraction, _SCALE_BITS)), exponent - _SCALE_BITS)
    return np.where(np.abs(found) < _LEAST_SCALE, _LEAST_SCALE, found).astype(np.float32)


def blobs(codes: NDArray[np.int8], bits: int, block: int) -> NDArray[np.uint8]:
    """Codes as MatMulNBits reads them: unsigned, in blocks, two to a byte in 4 bits.

    Args:
        codes: [outputs, inputs].
        bits: 4 or 8.
        block: inputs of a block; the last one is filled up with zeros.

    Returns:
        [outputs, blocks, block * bits / 8]; the first of two codes in the low bits.
    """
    outputs, inputs = codes.shape
    blocks = -(-inputs // block)
    padded = np.pad(codes, ((0, 0), (0, blocks * block - inputs)))
    unsigned = (padded.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << np.uint8(4)
    return unsigned.reshape(outputs, blocks, -1)


def wide_block(inputs: int) -> int:
    """Inputs of a block in 8 bits: a power of two with the least to fill up."""
    return min(_WIDE, key=lambda block: -(-inputs // block) * block - inputs)
