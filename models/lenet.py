"""The two networks on which pruning papers have compared themselves since Han et al. (2015).

`lenet_300_100` is LeCun's multilayer perceptron, `lenet5` the LeNet of Caffe's MNIST example: wider
than LeNet-5 as published in 1998, and without a nonlinearity after the convolutions.
"""

import math

import torch
from torch import nn
from torch.nn import functional


class LeNet300100(nn.Module):
    """Fully connected, 300 and 100 hidden units: 266,610 parameters at 28x28 and 10 classes."""

    def __init__(self, inputs: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, *input_shape]` to logits `[batch, classes]`."""
        x = torch.flatten(x, 1)
        x = self.dropout(functional.relu(self.fc1(x)))
        x = self.dropout(functional.relu(self.fc2(x)))
        return self.fc3(x)


class LeNet5(nn.Module):
    """Caffe's LeNet: 431,080 parameters at 28x28 and 10 classes."""

    def __init__(
        self, channels: int, height: int, width: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        # Each stage is a 5x5 convolution (-4) and a pooling (half, rounded down).
        height, width = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * height * width, 500)
        self.fc2 = nn.Linear(500, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, height, width]` to logits `[batch, classes]`."""
        x = functional.max_pool2d(self.conv1(x), 2)
        x = functional.max_pool2d(self.conv2(x), 2)
        x = torch.flatten(x, 1)
        x = self.dropout(functional.relu(self.fc1(x)))
        return self.fc2(x)


def lenet_300_100(
    input_shape: tuple[int, ...] = (1, 28, 28), classes: int = 10, dropout: float = 0.2
) -> nn.Module:
    """LeNet-300-100 for inputs of any shape, without the batch."""
    return LeNet300100(math.prod(input_shape), classes, dropout)


def lenet5(
    input_shape: tuple[int, ...] = (1, 28, 28), classes: int = 10, dropout: float = 0.3
) -> nn.Module:
    """Caffe's LeNet for images `[channels, height, width]` of at least 16x16."""
    if len(input_shape) != 3:
        raise ValueError(
            f"lenet5 takes images [channels, height, width], not inputs of shape "
            f"{list(input_shape)}; use lenet_300_100"
        )
    channels, height, width = input_shape
    if min(height, width) < 16:
        raise ValueError(
            f"lenet5 needs images of at least 16x16, not {height}x{width}, for its two 5x5 "
            "convolutions with pooling; use lenet_300_100 or enlarge the images"
        )
    return LeNet5(channels, height, width, classes, dropout)
