"""Files and folders that appear whole or not at all, and never in place of what a command reads.

A file is written beside its destination, flushed to the disk and renamed, so a killed run or a full
disk leaves no half file behind, and no other process reads one. What stands in the files is up to
the callers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from prune2onnx.errors import Prune2OnnxError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LONGEST_STEM = 60  # bytes of a name that its temporary repeats; a name has at most 255


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Writes `content` to `path`, replacing what was there, or leaves everything as it was.

    Text is encoded as UTF-8. Parent folders are made. As with `cp`, a link is followed, a device or
    a FIFO is written to, and the mode of a file that is replaced stays.

    Raises:
        Prune2OnnxError: the file cannot be written (no space, no permission, a folder, a link to
            nothing); the message names it and the reason, and nothing is left behind.
    """
    content = content.encode() if isinstance(content, str) else content
    with replacing(path, len(content)) as stream:
        stream.write(content)


@contextlib.contextmanager
def replacing(path: str | Path, nbytes: int) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of `path` at the end, or is dropped on an error.

    Args:
        path: as for `write_whole`.
        nbytes: how many bytes are to be written, for the error.
    """
    path = Path(path)
    target = _destination(path)
    try:
        if target.exists() and not target.is_file():  # a device, a FIFO
            with target.open("wb") as stream:
                yield stream
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with _temporary(target) as (stream, partial):
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if target.exists():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            partial.replace(target)
    except OSError as error:
        raise unwritten(path, nbytes, error) from error


@contextlib.contextmanager
def scratch(path: Path, nbytes: int) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file for what does not fit into memory, gone afterwards: in the folder of `path`.

    Args:
        path: what is written in the end; for a device or a FIFO, the system's folder is used.
        nbytes: about how many bytes will be in it, for the error.

    Raises:
        Prune2OnnxError: it cannot be made or written.
    """
    target = _destination(path)
    if target.exists() and not target.is_file():
        target = Path(tempfile.gettempdir()) / target.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with _temporary(target) as made:
            yield made
    except OSError as error:
        raise unwritten(path, nbytes, error) from error


def _destination(path: Path) -> Path:
    """Where a path leads.

    Raises:
        Prune2OnnxError: to a folder, or nowhere.
    """
    if not path.name or path.is_dir():
        raise Prune2OnnxError(f"{str(path)!r} is a folder; give the name of a file to write")
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if not target.exists():
        raise Prune2OnnxError(f"{path}: a link to {target}, which does not exist; remove the link")
    return target


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `target`, locked while it is written, and gone afterwards."""
    while True:
        partial = target.with_name(f"{_stem(target)}{secrets.token_hex(8)}.partial")
        with partial.open("xb") as stream:
            try:
                if fcntl:
                    with contextlib.suppress(OSError):  # no locks here: then nobody removes it
                        fcntl.flock(stream, fcntl.LOCK_EX)  # waits while it is looked at
                    if not partial.exists():
                        continue  # another process took it for a leftover before it was locked
                yield stream, partial
                return
            finally:
                with contextlib.suppress(OSError):
                    partial.unlink()


def _stem(target: Path) -> str:
    """What the names of all temporaries of a file begin with."""
    cut = target.name.encode(errors="surrogateescape")[:_LONGEST_STEM]
    return f".{cut.decode(errors='ignore')}."


def _remove_leftovers(target: Path) -> None:
    """Removes what killed processes left: temporaries that nobody has locked."""
    if fcntl is None:
        return
    stem = _stem(target)
    with os.scandir(target.parent) as entries:
        names = [e.name for e in entries if e.name.startswith(stem) and e.name.endswith(".partial")]
    for name in names:
        left = target.with_name(name)
        with contextlib.suppress(OSError):
            held = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(held)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder whose content takes the place of `target` at the end, or is dropped on an error.

    Other processes see the old folder or the new one, and for a moment neither. Whether the old one
    may be replaced is up to the caller.

    Raises:
        Prune2OnnxError: it is a file, or cannot be written.
    """
    target = target.absolute()
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise Prune2OnnxError(f"{target}: a file, expected a folder; name another")
    previous = target.with_name(f"{_stem(target)}previous")
    partial = target.with_name(f"{_stem(target)}{secrets.token_hex(8)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(target.parent):
            _restore(target, previous)
            _remove_leftovers(target)
            partial.mkdir()
            lock = _locked(partial)
        try:
            yield partial
            with alone_in(target.parent):
                if target.exists():
                    partial.chmod(stat.S_IMODE(target.stat().st_mode))
                    target.replace(previous)
                try:
                    partial.replace(target)
                except OSError:
                    if previous.exists():
                        previous.replace(target)
                    raise
                shutil.rmtree(previous, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except OSError as error:
        raise Prune2OnnxError(
            f"{target}: cannot be written: {error.strerror or error}; check the path, or choose "
            "another folder"
        ) from error


def _restore(target: Path, previous: Path) -> None:
    """Undoes what a process began that was killed between two renames."""
    if not previous.exists():
        return
    if target.exists():
        shutil.rmtree(previous)
    else:
        previous.replace(target)


def _locked(folder: Path) -> int | None:
    """A lock on a folder while it is written, where the system has such locks."""
    if fcntl is None:
        return None
    held = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_EX)
    return held


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process that asks for this writes into a folder; nothing is left there.

    Where the system has no such locks (Windows, some network file systems), it does not wait.
    """
    held = None
    try:
        with contextlib.suppress(OSError):  # where it cannot be made, to write there is an error
            folder.mkdir(parents=True, exist_ok=True)
            if fcntl is not None:
                held = os.open(folder, os.O_RDONLY)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        if held is not None:
            os.close(held)


def keep_inputs(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Makes sure that no output is a file that is read, by whatever name or link.

    Raises:
        Prune2OnnxError: one is.
    """
    read = [path for path in inputs if path.exists()]
    for output in outputs:
        for path in read:
            if output.exists() and output.samefile(path):
                raise Prune2OnnxError(
                    f"{output}: the same file as {path}, which is read; give another name"
                )


def unwritten(path: Path, nbytes: int, error: OSError) -> Prune2OnnxError:
    """The error for a file that the system does not let us write."""
    advice = "free some space" if error.errno == errno.ENOSPC else "check the path"
    return Prune2OnnxError(
        f"{path}: cannot write {nbytes:,} bytes: {error.strerror or error}; "
        f"{advice}, or choose another folder"
    )
