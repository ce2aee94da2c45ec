"""A data set and networks that are small enough to train within a second."""

import numpy as np
import torch
from torch import nn

from prune2onnx.data import Arrays
from prune2onnx.runs.recipe import Recipe, resolve


def blobs(examples: int, seed: int, shape: tuple[int, ...] = (1, 6, 6)) -> Arrays:
    """Three classes of noisy patterns that any network can learn."""
    generator = np.random.default_rng(seed)
    y = np.arange(examples) % 3
    pattern = np.random.default_rng(7).standard_normal((3, *shape))
    x = pattern[y] + 0.7 * generator.standard_normal((examples, *shape))
    return Arrays(x.astype(np.float32), y)


def tiny_mlp() -> nn.Sequential:
    """36 -> 40 -> 3."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 3))


def tiny_conv() -> nn.Sequential:
    """A convolution with BatchNorm and dropout, then a linear layer."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


def tiny_recipe(**overrides: object) -> Recipe:
    """Two or three epochs a phase."""
    epochs = {"dense.epochs": 3, "prune.epochs": 3, "tune.epochs": 2, "quantize.epochs": 2}
    settings = {
        "model": "unused:unused",
        "batch_size": 40,
        "target_density": 0.2,
        "quantize.levels": 8,
    }
    return resolve({}, {**settings, **epochs, "prune.threshold_lr": 0.3, **overrides})


def states(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
