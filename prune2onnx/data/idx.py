"""IDX files, the format of MNIST, and MNIST itself: `idx:DIR` and `mnist[:DIR]`.

An IDX file is two zero bytes, one byte for the type, one for the number of axes, the sizes of the
axes as big-endian uint32, then the values, big-endian, last axis fastest
(http://yann.lecun.com/exdb/mnist). It may be compressed with gzip, under any name.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.data.examples import Arrays, arrays
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.files import write_whole

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

# md5 of the uncompressed files: the gzip bytes differ between copies.
MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
TIMEOUT_S = 30
LARGEST_DOWNLOAD = 32 << 20  # three times the largest of the four


def read_idx_folder(argument: str) -> tuple[Arrays, Arrays]:
    """`idx:DIR`: train-images*, train-labels*, t10k-images* and t10k-labels*, gzip or not.

    Images `[n, h, w]` become `[n, 1, h, w]`; other shapes stay. uint8 is scaled to 0 ... 1.
    """
    folder = existing_folder(argument, "idx:DIR")
    train = _pair(_find(folder, "train-images"), _find(folder, "train-labels"))
    return train, _pair(_find(folder, "t10k-images"), _find(folder, "t10k-labels"))


def read_mnist(argument: str) -> tuple[Arrays, Arrays]:
    """`mnist[:DIR]`: the canonical 60,000 + 10,000; downloads what DIR lacks and checks all files.

    DIR is by default `prune2onnx/mnist` in the user's cache folder.

    Raises:
        Prune2OnnxError: a file is not the canonical one; one is missing and no mirror answers.
    """
    folder = Path(argument).expanduser() if argument else _cache() / "mnist"
    x, y, x_test, y_test = (
        parse_idx(_mnist_file(folder, name), f"{folder / name}") for name in MNIST
    )
    return _examples(x, y, f"{folder}: train"), _examples(x_test, y_test, f"{folder}: t10k")


def parse_idx(content: bytes, where: str) -> NDArray[Any]:
    """The array in the bytes of an IDX file (gzip or not), in its own type and shape.

    Raises:
        Prune2OnnxError: not IDX, cut short, or longer than its header says.
    """
    content = _unzipped(content, where)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in DTYPES or content[3] == 0:
        raise Prune2OnnxError(
            f"{where}: starts with the bytes {content[:4].hex(' ') or '(none)'}, expected an IDX "
            "header such as 00 00 08 03; this is not an IDX file, or a damaged one"
        )
    dtype, axes = np.dtype(DTYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        shape, expected, described = (), start, f"a header of {axes} axes"
    else:
        shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
        expected = start + math.prod(shape) * dtype.itemsize
        described = f"{dtype.name} {list(shape)}"
    if len(content) != expected:
        state = "cut short" if len(content) < expected else "too long"
        raise Prune2OnnxError(
            f"{where}: {len(content):,} bytes found, {expected:,} expected for {described}; "
            f"the file is {state}: copy or download it again"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def existing_folder(argument: str, form: str) -> Path:
    """`argument` as a folder that exists.

    Raises:
        Prune2OnnxError: it is missing or not a folder.
    """
    folder = Path(argument).expanduser()
    if argument and folder.is_dir():
        return folder
    state = "is not a folder" if argument and folder.exists() else "no such folder"
    raise Prune2OnnxError(f"{argument or form}: {state}; expected {form} with a folder that exists")


def _pair(images: Path, labels: Path) -> Arrays:
    """Images and their labels, from two IDX files."""
    x, y = parse_idx(images.read_bytes(), str(images)), parse_idx(labels.read_bytes(), str(labels))
    return _examples(x, y, f"{images} with {labels.name}")


def _examples(x: NDArray[Any], y: NDArray[Any], where: str) -> Arrays:
    return arrays(x[:, None] if x.ndim == 3 else x, y, where)


def _find(folder: Path, prefix: str) -> Path:
    """The one file with a prefix; an uncompressed file is preferred to its own .gz."""
    found = sorted(p for p in folder.glob(f"{prefix}*") if p.is_file())
    found = [p for p in found if p.suffix != ".gz" or p.with_suffix("") not in found]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise Prune2OnnxError(
            f"{folder}: files {prefix}*: {names}; expected exactly one; an IDX folder holds "
            "train-images*, train-labels*, t10k-images* and t10k-labels*"
        )
    return found[0]


def _unzipped(content: bytes, where: str) -> bytes:
    """The content, decompressed where it is gzip."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise Prune2OnnxError(
            f"{where}: its gzip stream ends early, after {len(content):,} bytes, expected an end "
            "mark; the file is cut short: copy or download it again"
        ) from error
    except (OSError, zlib.error) as error:
        raise Prune2OnnxError(
            f"{where}: its gzip stream is corrupt ({error}); copy or download it again"
        ) from error


def _cache() -> Path:
    """This project's folder in the user's cache (XDG Base Directory Specification)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # By the specification relative paths are ignored, and an empty one counts as unset.
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "prune2onnx"


def _mnist_file(folder: Path, name: str) -> bytes:
    """The uncompressed content of one of the four files, found or downloaded, and checked."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            content = _unzipped(path.read_bytes(), str(path))
            if (found := _md5(content)) != MNIST[name]:
                raise Prune2OnnxError(
                    f"{path}: md5 {found} (uncompressed), expected {MNIST[name]}: not the "
                    "canonical MNIST; delete the file to download it again, or use idx:DIR for "
                    "other data"
                )
            return content
    download = _download(name, folder)
    write_whole(folder / f"{name}.gz", download)
    return _unzipped(download, name)


def _download(name: str, folder: Path) -> bytes:
    """The gzip file from the first mirror that serves the canonical content."""
    failures = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=TIMEOUT_S) as answer:
                content: bytes = answer.read(LARGEST_DOWNLOAD)
            found = _md5(_unzipped(content, mirror))
        except (OSError, HTTPException, Prune2OnnxError) as error:
            failures.append(f"{mirror}: {one_line(error)}")
            continue
        if found == MNIST[name]:
            return content
        failures.append(f"{mirror}: md5 {found}, expected {MNIST[name]}")
    raise Prune2OnnxError(
        f"{folder}: {name} is missing and cannot be downloaded ({'; '.join(failures)}); put the "
        f"four files {', '.join(f'{n}.gz' for n in MNIST)} into {folder}, or name "
        "another folder with mnist:DIR"
    )


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
