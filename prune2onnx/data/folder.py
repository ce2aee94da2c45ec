"""Folders of images: `folder:DIR`, one folder per class, or images beside masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prune2onnx.data.examples import Arrays, arrays
from prune2onnx.data.idx import existing_folder
from prune2onnx.data.images import Images
from prune2onnx.data.shaped import shaped
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.tasks.metrics import IGNORED
from prune2onnx.tasks.task import Task

FORM = "expected DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/*"
GREY = ("1", "L", "LA")
# Pillow would silently clip 16-bit and float images to 8 bits.
DEEP = ("I", "F")
_VOID = 255  # of a mask: counts nowhere, as in PASCAL VOC


def read_folder(argument: str, task: Task, images: Images) -> tuple[Arrays, Arrays | None]:
    """`folder:DIR`: DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/* with no test set.

    Classes are numbered by name, in order of code points. Every file in a class folder must be an
    image (hidden ones are ignored), all of one size; x is uint8 `[n, 3, h, w]`, or
    `[n, 1, h, w]` if all of them are grey. Transparency is dropped. For segmentation, see
    `read_pairs`.

    Raises:
        Prune2OnnxError: a folder is missing, empty or holds something else; an image cannot be
            read or differs in size; train and test have different classes.
    """
    root = existing_folder(argument, "folder:DIR")
    if task.targets == "class map":
        return read_pairs(root, task, images)
    train, test = _class_folders(root, images)
    if task.targets == "class" and task.batch is None:
        return train, test
    made = shaped(train.x, train.y, task, argument)
    return made, None if test is None else shaped(test.x, test.y, task, argument)


def _class_folders(root: Path, images: Images) -> tuple[Arrays, Arrays | None]:
    """The images of DIR/<class>/*, or of train/ and test/."""
    top = _folders(root)
    # A class may be called "train"; with folders in it, it is the training set.
    if "train" not in top or not _folders(top["train"]):
        if "test" in top and _folders(top["test"]):
            raise Prune2OnnxError(f"{root}: has test/ but no classes in train/; {FORM}")
        if not top:
            raise Prune2OnnxError(f"{root}: no folders in it; {FORM}")
        return _read([top], images)[0], None
    if other := sorted(top.keys() - {"train", "test"}):
        raise Prune2OnnxError(
            f"{root}: has {other[0]}/ beside train/; {FORM}; merge it into train/ (validation "
            "examples are held out of it), rename it to test/, or move it away"
        )
    if "test" not in top:
        return _read([_folders(top["train"])], images)[0], None
    train, test = _folders(top["train"]), _folders(top["test"])
    for name in sorted(train.keys() ^ test.keys()):
        has, lacks = ("train", "test") if name in train else ("test", "train")
        raise Prune2OnnxError(
            f"{root}: class {name!r} is in {has}/ but not in {lacks}/, expected the same classes "
            "in both; add or remove it"
        )
    both = _read([train, test], images)
    return both[0], both[1]


def _folders(folder: Path) -> dict[str, Path]:
    """Folders in a folder, by name, in order."""
    found = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return {p.name: p for p in sorted(found, key=lambda p: p.name)}


def _read(sets: list[dict[str, Path]], images: Images) -> list[Arrays]:
    """Reads sets of class folders; one size and one number of channels for all of them."""
    files = [
        (path, label, n)
        for n, folders in enumerate(sets)
        for label, folder in enumerate(folders.values())
        for path in _files(folder)
    ]
    first, grey, x = None, True, np.empty(0, np.uint8)
    for row, (path, _, _) in enumerate(files):
        pixels, is_grey = pixels_of(path, images)
        grey &= is_grey
        if first is None:
            first = path
            x = _allocated((len(files), *pixels.shape), path)
        if pixels.shape != x.shape[1:]:
            raise Prune2OnnxError(
                f"{path}: {_size(pixels.shape)} pixels, but {first} has {_size(x.shape[1:])}, "
                "expected one size for all (width x height); resize them (--resize)"
            )
        x[row] = pixels
    x = x[:, :1] if grey else x
    y = np.array([label for _, label, _ in files])
    set_of = np.array([n for _, _, n in files])
    return [
        arrays(x[set_of == n], y[set_of == n], str(next(iter(folders.values())).parent))
        for n, folders in enumerate(sets)
    ]


def read_pairs(root: Path, task: Task, images: Images) -> tuple[Arrays, Arrays | None]:
    """`folder:DIR` for segmentation: DIR/images/* and DIR/masks/*, or so in DIR/train and DIR/test.

    A mask has the name of its image, whatever its suffix, and the image's size; its pixels, grey or
    indices of a palette, are classes, and 255 counts nowhere.

    Raises:
        Prune2OnnxError: a folder or a mask is missing, or sizes differ.
    """
    top = _folders(root)
    if {"images", "masks"} <= top.keys():
        return _read_pairs(root, task, images), None
    if "train" in top:
        train = _read_pairs(top["train"], task, images)
        return train, _read_pairs(top["test"], task, images) if "test" in top else None
    raise Prune2OnnxError(
        f"{root}: holds {', '.join(top) or 'no folder'}; for segmentation, expected images/ and "
        "masks/ in it, or in train/ and test/ in it"
    )


def _read_pairs(folder: Path, task: Task, images: Images) -> Arrays:
    """The images of a folder, and their masks."""
    parts = _folders(folder)
    if not {"images", "masks"} <= parts.keys():
        raise Prune2OnnxError(
            f"{folder}: holds {', '.join(parts) or 'no folder'}, expected images/ and masks/"
        )
    masks = {path.stem: path for path in _files(parts["masks"])}
    pictures = _files(parts["images"])
    for path in pictures:
        if path.stem not in masks:
            raise Prune2OnnxError(
                f"{path}: no mask {parts['masks'].name}/{path.stem}.*, expected one of its name; "
                "add it, or move the image away"
            )
    x = _read([{"images": parts["images"]}], images)[0].x
    y = np.empty((len(x), *x.shape[2:]), np.int64)
    for row, path in enumerate(pictures):
        mask = _mask(masks[path.stem], images)
        if mask.shape != y.shape[1:]:
            raise Prune2OnnxError(
                f"{masks[path.stem]}: {mask.shape[1]}x{mask.shape[0]} pixels, its image has "
                f"{y.shape[2]}x{y.shape[1]}, expected the same"
            )
        y[row] = mask
    y[y == _VOID] = IGNORED
    return shaped(x, y, task, str(folder))


def _mask(path: Path, images: Images) -> NDArray[np.uint8]:
    """Classes, uint8 `[h, w]`."""
    with _opened(path) as image:
        if image.mode not in ("1", "L", "P"):
            raise Prune2OnnxError(
                f"{path}: a mask of mode {image.mode}, expected grey or palette pixels of 8 bits, "
                "whose values are classes; convert it"
            )
        return np.asarray(images.sized(image, smooth=False)).astype(np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image, and one error where it cannot be read."""
    try:
        with Image.open(path) as image:
            yield image
    # Pillow's plug-ins raise these on a file they cannot read (SyntaxError: a broken PNG).
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise Prune2OnnxError(
            f"{path}: not a readable image ({one_line(error)}), expected one; fix or remove it"
        ) from error


def _files(folder: Path) -> list[Path]:
    """The image files of one class, in order of their names."""
    entries = sorted((p for p in folder.iterdir() if p.name[0] != "."), key=lambda p: p.name)
    for path in entries:
        if path.is_dir():
            raise Prune2OnnxError(f"{path}: a folder inside a class, expected an image; {FORM}")
    if not entries:
        raise Prune2OnnxError(f"{folder}: a class without images; {FORM}; add some or remove it")
    return entries


def pixels_of(path: Path, images: Images) -> tuple[NDArray[np.uint8], bool]:
    """One image as uint8 `[3, h, w]`, and whether it is grey (then all three are equal)."""
    with _opened(path) as image:
        if image.mode.split(";")[0] in DEEP:
            raise Prune2OnnxError(
                f"{path}: its pixels are deeper than 8 bits (mode {image.mode}), expected an 8-bit "
                "image; convert it, or read it with file.py:callable"
            )
        sized = images.sized(image.convert("RGB"))
        return np.asarray(sized).transpose(2, 0, 1), image.mode in GREY


def _allocated(shape: tuple[int, ...], path: Path) -> NDArray[np.uint8]:
    """An uninitialised array for all images, or an error where memory is short."""
    try:
        return np.empty(shape, np.uint8)
    except MemoryError as error:
        raise Prune2OnnxError(
            f"{path}: {shape[0]:,} images of {_size(shape[1:])} need "
            f"{math.prod(shape) / 1e9:.1f} GB of memory, more than there is; "
            "read them one by one with file.py:callable"
        ) from error


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]}"
