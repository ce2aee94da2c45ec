"""Other tasks on scikit-learn's digits: labels, reconstruction, two inputs, sequences."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn


def _pairs(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two images `[n, 1, 8, 8]`, 0 to 1, and their digits."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    left, right = np.random.default_rng(7).integers(0, len(images), (2, count))
    return images[left], images[right], labels[left], labels[right]


def pairs_with_labels() -> tuple[np.ndarray, np.ndarray]:
    """Two digits side by side `[n, 1, 8, 16]`, and which are there, 0 or 1, `[n, 10]`."""
    left, right, a, b = _pairs(4000)
    there = np.zeros((len(a), 10), np.float32)
    there[np.arange(len(a)), a] = there[np.arange(len(b)), b] = 1
    return np.concatenate([left, right], 3), there


def pairs_to_compare() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two images, `left` and `right`, and whether the left one's digit is larger (1) or not (0)."""
    left, right, a, b = _pairs(4000)
    return {"left": left, "right": right}, (a > b).astype(np.int64)


def labels_net(input_shape: tuple[int, ...], classes: int, width: int = 256) -> nn.Module:
    """Three linear layers to a score for each label."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(int(np.prod(input_shape)), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


class Autoencoder(nn.Module):
    """Through a bottleneck, and back to the input's shape."""

    def __init__(self, shape: tuple[int, ...], width: int, code: int) -> None:
        super().__init__()
        self.shape, pixels = shape, int(np.prod(shape))
        self.encode = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, code)
        )
        self.decode = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, *shape]` to the same shape."""
        return self.decode(self.encode(x)).unflatten(1, self.shape)


def autoencoder(
    input_shape: tuple[int, ...] = (1, 8, 8), width: int = 384, code: int = 32
) -> nn.Module:
    """An autoencoder for images with values from 0 to 1."""
    return Autoencoder(input_shape, width, code)


class Comparison(nn.Module):
    """Which of two images shows the larger digit: one network for both, and one on top."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.compare = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Two images `[batch, 1, 8, 8]` to scores `[batch, 2]`."""
        return self.compare(torch.cat([self.look(left), self.look(right)], 1))


def comparison(width: int = 192) -> nn.Module:
    """For `pairs_to_compare`."""
    return Comparison(64, width)


class RowReader(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self, features: int, classes: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, 1, rows, features]` to scores `[batch, classes]`."""
        states, _ = self.gru(x.squeeze(1))
        return self.head(states[:, -1])


def row_reader(
    input_shape: tuple[int, ...] = (1, 8, 8), classes: int = 10, width: int = 128
) -> nn.Module:
    """For images with one channel."""
    return RowReader(input_shape[2], classes, width)
