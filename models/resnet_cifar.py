"""The residual networks for CIFAR-10 of He et al. (arXiv 1512.03385, section 4.2), 6n + 2 layers.

Three stages of n blocks with 16, 32 and 64 channels; the shortcuts have no parameters (option A):
every second pixel, and zeros for the channels that a stage adds. Parameter names are those of
github.com/akamaster/pytorch_resnet_cifar10, so its trained weights load.
"""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, inputs, h, w]` to `[batch, outputs, ceil(h / stride), ceil(w / stride)]`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            before = self.added // 2
            x = functional.pad(x, (0, 0, 0, 0, before, self.added - before))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """A stem of 16 channels, three stages of `blocks` blocks, the mean over the image, a layer."""

    def __init__(self, blocks: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1)
        self.layer2 = self._stage(blocks, 16, 32, 2)
        self.layer3 = self._stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, height, width]` to logits `[batch, classes]`."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _resnet(name: str, blocks: int, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    if len(input_shape) != 3:
        raise ValueError(
            f"{name} takes images [channels, height, width], not inputs of shape "
            f"{list(input_shape)}"
        )
    return ResNet(blocks, input_shape[0], classes)


def resnet20(input_shape: tuple[int, ...] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """ResNet-20: 269,722 parameters at 3 channels and 10 classes."""
    return _resnet("resnet20", 3, input_shape, classes)


def resnet32(input_shape: tuple[int, ...] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """ResNet-32: 464,154 parameters at 3 channels and 10 classes."""
    return _resnet("resnet32", 5, input_shape, classes)


def resnet56(input_shape: tuple[int, ...] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """ResNet-56: 853,018 parameters at 3 channels and 10 classes."""
    return _resnet("resnet56", 9, input_shape, classes)
