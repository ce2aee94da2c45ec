"""Arrays in an archive of numpy's: `npz:FILE`."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune2onnx.data.examples import Arrays
from prune2onnx.data.images import Images
from prune2onnx.data.shaped import shaped
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.tasks.task import UNLABELLED, Task

KEYS = (
    "expected x_train, y_train[, x_test, y_test] or x, y; several inputs as x_NAME or x_train_NAME"
)

_SETS = ("train", "test")
_ENTRY = re.compile(r"(?P<part>[xy])(_(?P<split>train|test))?(_(?P<name>\w+))?")


def read_npz(argument: str, task: Task, images: Images) -> tuple[Arrays, Arrays | None]:
    """`npz:FILE`: x_train, y_train, x_test, y_test; the last two may be missing; or x, y.

    x is `[n, ...]` (images `[n, channels, h, w]`), y is `[n]` in classification; see `shaped` for
    types. Several inputs are called x_NAME (or x_train_NAME, x_test_NAME), and NAME is the argument
    of the model that gets them; several targets y_NAME. Other entries are ignored.

    Raises:
        Prune2OnnxError: the file is missing, damaged, holds pickled objects or other names.
    """
    path = Path(argument).expanduser()
    with _opened(argument) as archive:
        names = set(archive.files)
        if any(_named(name) for name in names):
            return _read_structures(archive, path, task)
        wanted = _wanted(names, path, task)
        found = {name: archive[name] for name in wanted}

    def part(suffix: str) -> Arrays:
        x, y = f"x{suffix}", f"y{suffix}"
        where = ", ".join(name for name in (x, y) if name in found)
        return shaped(found[x], found.get(y), task, f"{path}: {where}")

    if "x" in found:
        return part(""), None
    return part("_train"), part("_test") if "x_test" in found else None


def _named(entry: str) -> str:
    """The name of the input or target in an entry such as x_left or x_train_left; else ""."""
    match = _ENTRY.fullmatch(entry)
    return (match and match["name"]) or ""


def _read_structures(archive: Any, path: Path, task: Task) -> tuple[Arrays, Arrays | None]:
    """Inputs, or targets, that are several arrays."""
    found: dict[str, dict[str, dict[str, NDArray[Any]]]] = {}
    for entry in archive.files:
        if match := _ENTRY.fullmatch(entry):
            split, part = match["split"] or "", match["part"]
            found.setdefault(split, {}).setdefault(part, {})[match["name"] or ""] = archive[entry]
    sets = [split for split in ("", *_SETS) if "x" in found.get(split, {})]
    if sets not in ([""], ["train"], ["train", "test"]):
        raise Prune2OnnxError(f"{path}: holds {', '.join(sorted(archive.files))}; {KEYS}")

    def structure(arrays: dict[str, NDArray[Any]] | None) -> Any:
        if arrays is None:
            return None
        if "" in arrays and len(arrays) > 1:
            raise Prune2OnnxError(
                f"{path}: holds one array without a name beside {', '.join(filter(None, arrays))}; "
                "give each a name, as x_NAME"
            )
        return arrays.get("", arrays)

    made = []
    for split in sets:
        x, y = structure(found[split]["x"]), structure(found[split].get("y"))
        made.append(shaped(x, y, task, f"{path}: {split or 'x, y'}"))
    return made[0], made[1] if len(made) > 1 else None


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


def _wanted(names: set[str], path: Path, task: Task) -> list[str]:
    """The entries to read, training before test."""
    prefix = "_train" if "x_train" in names else ""
    wanted = [f"x{prefix}", f"y{prefix}"]
    if names & {"x_test", "y_test"}:
        wanted = ["x_train", "y_train", "x_test", "y_test"]
    if task.targets in (*UNLABELLED, "any"):  # used where they are there
        wanted = [name for name in wanted if name[0] == "x" or name in names]
    if missing := [name for name in wanted if name not in names]:
        raise Prune2OnnxError(
            f"{path}: holds {', '.join(sorted(names)) or 'nothing'} but no {missing[0]}; "
            f"{KEYS}; rename with numpy.savez"
        )
    return wanted
