"""Augmentation: training images moved and mirrored at random, so that a network sees more of them.

The usual crop and flip (He et al., arXiv 1512.03385): an image is padded with zeros and a window of
its own size cut out at random; half of them are mirrored. Drawn anew in every epoch, by its seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prune2onnx.errors import RecipeError
from prune2onnx.recipe import Augment


def check_images(settings: Augment, shape: Sequence[int]) -> None:
    """Sees to it that what is to be augmented are images.

    Raises:
        RecipeError: examples have another shape than [channels, height, width].
    """
    if (settings.shift or settings.flip) and len(shape) != 3:
        raise RecipeError(
            f"augment moves images [channels, height, width], not examples of shape "
            f"{list(shape)}; leave augment.shift and augment.flip out"
        )


def augment(x: Tensor, settings: Augment, generator: torch.Generator) -> Tensor:
    """Moves and mirrors a batch of images (`check_images`).

    Args:
        x: [n, channels, height, width], on the CPU.
        settings: how far, and whether to mirror.
        generator: draws.
    """
    if not settings.shift and not settings.flip:
        return x
    n, _, height, width = x.shape
    rows = torch.arange(height).expand(n, height)
    columns = torch.arange(width).expand(n, width)
    if settings.flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if settings.shift:
        edge = settings.shift
        x = torch.nn.functional.pad(x, (edge,) * 4)
        moves = torch.randint(0, 2 * edge + 1, (2, n, 1), generator=generator)
        rows, columns = rows + moves[0], columns + moves[1]
    picked: Tensor = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
