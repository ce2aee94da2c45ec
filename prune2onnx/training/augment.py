"""Augmentation: random crop and flip of training images (He et al., arXiv 1512.03385).

An image is padded with zeros and a window of its own size cut out at random; half of the images are
mirrored. Every epoch draws again, with its own seed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prune2onnx.data import Data
from prune2onnx.errors import RecipeError
from prune2onnx.runs.sections import Augment


def check_images(settings: Augment, data: Data) -> None:
    """Checks that the examples to augment are images, whose targets stay true when they move.

    Raises:
        RecipeError: inputs have another shape than [channels, height, width], or so do targets.
    """
    if not settings.shift and not settings.flip:
        return
    shape = data.input_shape
    if data.input_dtype != "float32" or len(shape) != 3:
        shown = list(shape) if isinstance(shape, tuple) else shape
        raise RecipeError(
            f"augment moves images [channels, height, width], not examples of shape "
            f"{shown}; leave augment.shift and augment.flip out"
        )
    if np.ndim(targets := data.train[0][1]) > 1:
        raise RecipeError(
            f"augment moves images, but not their targets of shape {list(np.shape(targets))}; "
            "leave augment.shift and augment.flip out, or augment in a Dataset of your own"
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
