"""Augmentation: images are moved by whole pixels and mirrored, and not changed otherwise."""

import numpy as np
import pytest
import torch

from prune2onnx.data import Arrays, Data
from prune2onnx.errors import RecipeError
from prune2onnx.runs.sections import Augment
from prune2onnx.training.augment import augment, check_images


def images() -> torch.Tensor:
    return torch.arange(64 * 2 * 5 * 6, dtype=torch.float32).reshape(64, 2, 5, 6) + 1


def moved(settings: Augment, seed: int = 0) -> torch.Tensor:
    return augment(images(), settings, torch.Generator().manual_seed(seed))


def test_the_default_changes_nothing():
    assert torch.equal(moved(Augment()), images())


def test_an_image_is_moved_by_whole_pixels_and_padded_with_zeros():
    found = moved(Augment(shift=2))
    padded = torch.nn.functional.pad(images(), (2, 2, 2, 2))
    seen = set()
    for image, whole in zip(found, padded, strict=True):
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(image, whole[:, i : i + 5, j : j + 6])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 15  # of 25


def test_half_of_the_images_are_mirrored():
    found = moved(Augment(flip=True))
    kept = sum(torch.equal(a, b) for a, b in zip(found, images(), strict=True))
    mirrored = sum(torch.equal(a, b.flip(2)) for a, b in zip(found, images(), strict=True))
    assert kept + mirrored == 64 and 16 < mirrored < 48


def test_a_seed_is_reproducible():
    settings = Augment(shift=1, flip=True)
    assert torch.equal(moved(settings, 3), moved(settings, 3))
    assert not torch.equal(moved(settings, 3), moved(settings, 4))


def test_examples_that_are_not_images_are_refused():
    def data(shape: tuple[int, ...], y: np.ndarray) -> Data:
        x = Arrays(np.zeros((4, *shape), np.float32), y)
        return Data("made", x, x, x, shape, 2)

    with pytest.raises(RecipeError, match=r"not examples of shape \[7\]"):
        check_images(Augment(shift=1), data((7,), np.arange(4)))
    check_images(Augment(), data((7,), np.arange(4)))
    check_images(Augment(flip=True), data((1, 7, 7), np.arange(4)))
    with pytest.raises(RecipeError, match=r"but not their targets of shape \[7, 7\]"):
        check_images(Augment(flip=True), data((1, 7, 7), np.zeros((4, 7, 7), np.int64)))
