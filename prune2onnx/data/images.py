"""How images are prepared: resized and cropped as they are read, normalised on access.

Resizing is that of torchvision and timm: the shorter side becomes `resize` pixels (or both, given
as two numbers), then a window of `crop` pixels is cut out of the middle. Normalisation is
(x - mean) / std of each channel, x from 0 to 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prune2onnx.data.examples import Data
from prune2onnx.errors import RecipeError


class Normalized:
    """Examples whose images are normalised on access.

    Attributes:
        examples: the others.
        mean: float32 `[channels, 1, 1]`.
        std: the same.
    """

    def __init__(self, examples: Any, mean: NDArray[np.float32], std: NDArray[np.float32]) -> None:
        self.examples, self.mean, self.std = examples, mean, std

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = self.examples[index]
        made = self._of(x)
        return made, made if y is x else y

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch, as that of the examples."""
        if not hasattr(self.examples, "__getitems__"):
            return [self[index] for index in indices]
        x, y = self.examples.__getitems__(indices)
        made = self._of(x)
        return made, made if y is x else y

    def _of(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return (x - self.mean) / self.std


@dataclass(frozen=True)
class Images:
    """How images are prepared.

    Attributes:
        resize: of the shorter side, or (height, width); None leaves sizes.
        crop: pixels of the middle, each side, or (height, width); None takes all.
        mean: of each channel, or one for all; () subtracts nothing.
        std: the same, as divisor.
    """

    resize: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def resizes(self) -> bool:
        """Whether sizes change."""
        return self.resize is not None or self.crop is not None

    @property
    def normalizes(self) -> bool:
        """Whether values change."""
        return bool(self.mean or self.std)

    def sized(self, image: Image.Image, *, smooth: bool = True) -> Image.Image:
        """An image resized and cropped; without smoothing, values stay those that were there.

        Raises:
            RecipeError: the window is larger than the image.
        """
        if self.resize is not None:
            size = _pair(self.resize)
            if len(self.resize) == 1:  # the shorter side, and the other in proportion
                factor = self.resize[0] / min(image.size)
                size = round(image.height * factor), round(image.width * factor)
            way = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
            image = image.resize((size[1], size[0]), way)
        if self.crop is not None:
            height, width = _pair(self.crop)
            if height > image.height or width > image.width:
                raise RecipeError(
                    f"crop {width}x{height} of an image of {image.width}x{image.height} pixels; "
                    "crop less, or resize to more before"
                )
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return image

    def normalized(self, data: Data) -> Data:
        """Data with the mean subtracted and divided by std.

        Raises:
            RecipeError: examples are no images, or have another number of channels.
        """
        shape = data.input_shape
        if data.input_dtype != "float32" or len(shape) != 3:
            raise RecipeError(
                f"mean and std are for images [channels, height, width], examples of {data.name} "
                f"have shape {shape}; leave them out"
            )
        mean = _of_channels("mean", self.mean or (0.0,), shape[0])
        std = _of_channels("std", self.std or (1.0,), shape[0])
        splits: dict[str, Any] = {
            name: Normalized(getattr(data, name), mean, std)
            for name in ("train", "validation", "test")
        }
        return dataclasses.replace(data, **splits)


AS_THEY_ARE = Images()


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return (size[0], size[-1])


def _of_channels(what: str, values: tuple[float, ...], channels: int) -> NDArray[np.float32]:
    if len(values) not in (1, channels):
        raise RecipeError(
            f"{what} has {len(values)} values, the images have {channels} channels; give one value "
            "for each, or one for all"
        )
    return np.array(values * (channels // len(values)), np.float32).reshape(-1, 1, 1)
