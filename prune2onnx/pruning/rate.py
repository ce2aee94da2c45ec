"""Estimates the bits that a surviving weight takes in the file: its position and its value.

The sparser a row and a column are, the more bits a position in them takes: next to none where both
are full. A penalty in bits therefore empties channels and inputs in which a penalty on counts would
leave a few weights. How weights are really coded: see `packing.codecs`.
"""

from __future__ import annotations

import math

from torch import Tensor

VALUE_BITS = 3.0
"""Approximate bits of a survivor's value: its sign and one of a few magnitudes."""

_PRIOR = 0.2
"""Weight of the layer's density in that of each row and column, so that an empty one can revive."""

_MOST_BITS = 14.0


def density_of_bits(bits: float) -> float:
    """The density at which an element takes so many bits on average.

    H(d) + d * `VALUE_BITS` = bits, H the binary entropy, for positions and values drawn
    independently; 1 where the bits are enough for all elements.

    >>> round(density_of_bits(1.0), 2), density_of_bits(4.0)
    (0.14, 1.0)
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        d = (low + high) / 2
        taken = d * VALUE_BITS - d * math.log2(d) - (1 - d) * math.log2(1 - d)
        low, high = (d, high) if taken < bits else (low, d)
    return 1.0 if bits >= VALUE_BITS else high


def survivor_bits(alive: Tensor) -> Tensor:
    """Bits that each element of a weight takes in a file, or would take if it survived.

    Positions are modelled as independent draws with probability r c / p: r the density of the
    element's output channel, c that of its input channel, p that of the weight.

    Args:
        alive: bool, [a, b, ...], a and b the channels; a weight of one axis has no channels.

    Returns:
        float32, broadcastable to `alive`.

    >>> import torch
    >>> bits = survivor_bits(torch.tensor([[True, True], [True, False]]))
    >>> bool(bits[0, 0] < bits[0, 1] < bits[1, 1])
    True
    """
    if alive.ndim < 2:
        probability = alive.float().mean().clamp(2**-_MOST_BITS, 1).expand(alive.shape)
        return VALUE_BITS - probability.log2()
    blocks = alive.float().flatten(2).mean(2) if alive.ndim > 2 else alive.float()
    every = blocks.mean() + 2**-_MOST_BITS
    rows = blocks.mean(1, keepdim=True) + _PRIOR * every
    columns = blocks.mean(0, keepdim=True) + _PRIOR * every
    probability = (rows * columns / every).clamp(2**-_MOST_BITS, 1)
    bits = VALUE_BITS - probability.log2()
    return bits.view(*bits.shape, *[1] * (alive.ndim - 2))
