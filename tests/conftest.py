"""What many tests share: a data set and networks so small that training them takes a moment."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from prune2onnx.data import Arrays, Data
from prune2onnx.recipe import Recipe, resolve

torch.set_num_threads(1)  # the networks are tiny


@pytest.fixture(autouse=True)
def one_precision_per_test() -> None:
    """accelerate keeps one precision per process; every test is a process of its own to it."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where there is none."""
    folder = os.environ.get("PRUNE2ONNX_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PRUNE2ONNX_DATA names no folder with the real data sets")
    return Path(folder)


def blobs(examples: int, seed: int, shape: tuple[int, ...] = (1, 6, 6)) -> Arrays:
    """Three classes of noisy patterns that any network can learn."""
    generator = np.random.default_rng(seed)
    y = np.arange(examples) % 3
    pattern = np.random.default_rng(7).standard_normal((3, *shape))
    x = pattern[y] + 0.7 * generator.standard_normal((examples, *shape))
    return Arrays(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y))


@pytest.fixture
def tiny_data() -> Data:
    """Three classes of [1, 6, 6] examples."""
    return Data("blobs", blobs(240, 1), blobs(60, 2), blobs(90, 3), (1, 6, 6), 3)


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
    epochs = {"dense.epochs": 3, "prune.epochs": 3, "tune.epochs": 2, "share.epochs": 2}
    settings = {
        "model": "unused:unused",
        "batch_size": 40,
        "target_density": 0.2,
        "share.levels": 8,
    }
    return resolve({}, {**settings, **epochs, "prune.threshold_lr": 0.3, **overrides})
