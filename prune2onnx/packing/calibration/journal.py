"""What a calibration has done so far, beside the file that it is for, so that it can go on.

A folder `.NAME.calibration` holds one file for each layer of each pass, and for each number that
took long to measure. It belongs to one model, its examples and options: a folder of others is
removed, and so is its own once the calibration ends. Files appear whole or not at all, so any of
them may be missing, and that part is then done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.files import write_whole
from prune2onnx.graph.tensors import array_of

_VERSION = 1  # of what is stored, and of how weights are calibrated
_WORTH_KEEPING = 60.0  # seconds of work: an interrupted run of less leaves nothing behind
_KEY = "key.json"

Arrays = dict[str, NDArray[Any]]


@dataclass(eq=False)
class Journal:
    """Results by name; `Journal(None)` keeps nothing.

    Attributes:
        folder: where they are kept.
        restored: how many were there from an earlier run.
    """

    folder: Path | None
    restored: int = 0
    _known: set[str] = field(default_factory=set)

    def get(self, *name: object) -> Arrays | None:
        """What was kept under a name; None where there is nothing, or nothing that can be read."""
        path = self._path(name)
        if path is None or path.name not in self._known:
            return None
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                found = dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        self.restored += 1
        return found

    def put(self, arrays: Mapping[str, NDArray[Any]], *name: object) -> None:
        """Keeps arrays under a name."""
        path = self._path(name)
        if path is not None:
            stream = BytesIO()
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # names are no options of it
            write_whole(path, stream.getvalue())

    def number(self, measured: Callable[[], float], *name: object) -> float:
        """A number that was kept under a name, or is measured and kept now."""
        if (found := self.get(*name)) is not None:
            return float(found["number"])
        number = float(measured())
        self.put({"number": np.float64(number)}, *name)  # type: ignore[dict-item]
        return number

    def _path(self, name: Sequence[object]) -> Path | None:
        if self.folder is None:
            return None
        text = "/".join(one.hex() if isinstance(one, float) else str(one) for one in name)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


@contextlib.contextmanager
def journal_of(
    target: Path, model: ModelProto, batches: Sequence[Mapping[str, Any]], options: str
) -> Iterator[Journal]:
    """The journal of a calibration; gone at its end, and where it was interrupted early.

    Args:
        target: the file that is to be written.
        model: what is calibrated.
        batches: its examples.
        options: in text, with all else that results depend on.

    Raises:
        Prune2OnnxError: it cannot be written.
    """
    if target.exists() and not target.is_file():  # a device, a FIFO
        yield Journal(None)
        return
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        _add(digest, tensor.name, array_of(tensor))
    for batch in batches:
        for name, array in batch.items():
            _add(digest, name, array)
    key = json.dumps({"version": _VERSION, "options": options, "content": digest.hexdigest()})
    folder = target.with_name(f".{target.name[:200]}.calibration")
    known: set[str] = set()
    with contextlib.suppress(OSError):
        if (folder / _KEY).read_text() == key:
            known = {path.name for path in folder.iterdir() if path.suffix == ".npz"}
    if not known:
        _remove(folder)
        write_whole(folder / _KEY, key)
    began = time.monotonic()
    try:
        yield Journal(folder, _known=known)
    except BaseException:
        if not known and time.monotonic() - began < _WORTH_KEEPING:
            _remove(folder)
        raise
    _remove(folder)


def _add(digest: Any, name: str, array: NDArray[Any]) -> None:
    digest.update(f"{name} {array.shape} {array.dtype}".encode())
    digest.update(array.tobytes())


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
