"""Arrays in an archive of numpy's: `npz:FILE`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.data.examples import Arrays, arrays
from prune2onnx.errors import Prune2OnnxError, one_line

KEYS = "expected x_train, y_train[, x_test, y_test] or x, y"


def read_npz(argument: str) -> tuple[Arrays, Arrays | None]:
    """`npz:FILE`: x_train, y_train, x_test, y_test; the last two may be missing; or x, y.

    x is `[n, ...]` (images `[n, channels, h, w]`), y is `[n]`; see `arrays` for types. Other
    entries are ignored.

    Raises:
        Prune2OnnxError: the file is missing, damaged, holds pickled objects or other names.
    """
    path = Path(argument).expanduser()
    with _opened(argument) as archive:
        wanted = _wanted(set(archive.files), path)
        found = [archive[name] for name in wanted]
    train = arrays(found[0], found[1], f"{path}: {wanted[0]}, {wanted[1]}")
    if len(found) == 2:
        return train, None
    return train, arrays(found[2], found[3], f"{path}: x_test, y_test")


def read_named(argument: str, names: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """One array per name, as stored; None where they are not all there, or it has labels, too.

    (A single input may be called x, as examples are.)

    Raises:
        Prune2OnnxError: the file is missing, damaged, or holds pickled objects.
    """
    with _opened(argument) as archive:
        found = set(archive.files)
        if not set(names) <= found or (len(names) == 1 and found & {"y", "y_train"}):
            return None
        return {name: archive[name] for name in names}


@contextmanager
def _opened(argument: str) -> Iterator[Any]:
    """The archive, with its errors told in one line."""
    path = Path(argument).expanduser()
    if not argument or not path.is_file():
        raise Prune2OnnxError(f"{argument or 'npz:FILE'}: no such file; expected npz:FILE")
    try:
        with path.open("rb") as stream:  # opened here, as numpy leaves a damaged file open
            archive = np.load(stream, allow_pickle=False)  # a pickle may run code
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array, as numpy.save writes it")
            yield archive
    # numpy raises these on another format, a damaged file, and pickled objects (ValueError).
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Prune2OnnxError(
            f"{path}: not an .npz archive of plain arrays ({one_line(error)}); "
            "write one with numpy.savez(FILE, x_train=..., y_train=...)"
        ) from error


def _wanted(names: set[str], path: Path) -> list[str]:
    """The entries to read, training before test."""
    prefix = "_train" if "x_train" in names else ""
    wanted = [f"x{prefix}", f"y{prefix}"]
    if names & {"x_test", "y_test"}:
        wanted = ["x_train", "y_train", "x_test", "y_test"]
    if missing := [name for name in wanted if name not in names]:
        raise Prune2OnnxError(
            f"{path}: holds {', '.join(sorted(names)) or 'nothing'} but no {missing[0]}; "
            f"{KEYS}; rename with numpy.savez"
        )
    return wanted
