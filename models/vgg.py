"""VGG-16 for small images: the convolutions of Simonyan and Zisserman (arXiv 1409.1556, table 1 D).

With BatchNorm after each of them and one linear layer in place of three, as is usual for 32 x 32
pixels. Names are those of torchvision's `vgg16_bn` up to the classifier.
"""

import torch
from torch import nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each stage halved in size, then the mean and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in STAGES:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, height, width]` to logits `[batch, classes]`."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def vgg16(input_shape: tuple[int, ...] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """VGG-16 with BatchNorm: 14,724,042 parameters at 3 channels and 10 classes."""
    if len(input_shape) != 3 or min(input_shape[1:]) < 32:
        raise ValueError(
            "vgg16 takes images [channels, height, width] of at least 32x32 pixels, not inputs of "
            f"shape {list(input_shape)}"
        )
    return VGG(input_shape[0], classes)
