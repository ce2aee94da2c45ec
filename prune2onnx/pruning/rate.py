"""What a surviving weight takes in the file, in bits: its position and its value.

A position costs the more, the rarer its neighbours: in a row and a column that are full already it
costs next to nothing, and in one that is empty otherwise, all of it. A penalty in bits therefore
empties channels and inputs that a penalty on counts would leave thinly spread.
"""

from __future__ import annotations

import math

from torch import Tensor

VALUE_BITS = 3.0
"""What the value of a survivor takes, about: sign and one of a few magnitudes."""

_PRIOR = 0.2
"""Weight of the whole layer's density in that of each row and column: an empty one may revive."""

_MOST_BITS = 14.0


def density_of_bits(bits: float) -> float:
    """The density at which positions and values, drawn independently, take so many bits an element.

    H(d) + d * `VALUE_BITS` = bits, H the binary entropy; 1 where there are bits enough for all.

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
    """Bits each element of a weight takes in a file, or would take if it survived.

    Positions are taken for independent draws with probability r c / p: r the density of the
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
        share = alive.float().mean().clamp(2**-_MOST_BITS, 1).expand(alive.shape)
        return VALUE_BITS - share.log2()
    blocks = alive.float().flatten(2).mean(2) if alive.ndim > 2 else alive.float()
    every = blocks.mean() + 2**-_MOST_BITS
    rows = blocks.mean(1, keepdim=True) + _PRIOR * every
    columns = blocks.mean(0, keepdim=True) + _PRIOR * every
    share = (rows * columns / every).clamp(2**-_MOST_BITS, 1)
    bits = VALUE_BITS - share.log2()
    return bits.view(*bits.shape, *[1] * (alive.ndim - 2))
