"""Segmentation: a U-Net that finds digits in noise, and tells which each pixel belongs to.

Ronneberger, Fischer and Brox, "U-Net" (arXiv 1505.04597), two levels deep.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

SIDE = 16


def noisy_digits(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each of scikit-learn's digits once, at a random place in noise.

    Returns:
        (images float32 `[n, 1, 16, 16]`, classes int64 `[n, 16, 16]`: 0 is noise, 1 + digit the
        strokes of a digit).
    """
    images, labels = load_digits(return_X_y=True)
    drawn = np.random.default_rng(1991)
    x = 0.35 * drawn.random((len(images), 1, SIDE, SIDE)).astype(np.float32)
    y = np.zeros((len(images), SIDE, SIDE), np.int64)
    for row, (image, label) in enumerate(zip(images.reshape(-1, 8, 8) / 16, labels, strict=True)):
        top, left = drawn.integers(0, SIDE - 8, 2)
        here = (slice(top, top + 8), slice(left, left + 8))
        x[row, 0][here] = np.maximum(x[row, 0][here], image)
        y[row][here][image > 0.4] = 1 + label
    return x, y


class UNet(nn.Module):
    """Two levels down and up, with connections across."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.down1 = block(channels, width)
        self.down2 = block(width, 2 * width)
        self.middle = block(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.left2 = block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.left1 = block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, height, width]` to scores `[batch, classes, height, width]`."""
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        x = self.middle(self.pool(coarse))
        x = self.left2(torch.cat([coarse, self.up2(x)], 1))
        x = self.left1(torch.cat([fine, self.up1(x)], 1))
        return self.head(x)


def block(inputs: int, outputs: int) -> nn.Module:
    """Two 3x3 convolutions with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def unet(in_channels: int = 1, num_classes: int = 11, width: int = 16) -> nn.Module:
    """A U-Net for images whose sides are multiples of 4."""
    return UNet(in_channels, num_classes, width)
