"""Augmentation: random crop and flip of training images (He et al., arXiv 1512.03385).

An image is padded with zeros and a window of its own size cut out at random; half of the images are
mirrored. Every epoch draws again, with its own seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prune2onnx.errors import RecipeError
from prune2onnx.runs.recipe import Augment


def check_images(settings: Augment, shape: Sequence[int]) -> None:
    """Checks that the examples to augment are images.

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
        generator: source of randomness.
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
