"""Files that appear whole or not at all.

A file is written beside its destination, flushed to the disk and renamed, so a killed run or a
full disk leaves no half file behind, and no other process reads one. What stands in the files is
up to the callers.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from prune2onnx.errors import Prune2OnnxError


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Writes `content` to `path`, replacing what was there, or leaves everything as it was.

    Text is encoded as UTF-8. Parent folders are made.

    Raises:
        Prune2OnnxError: the file cannot be written (no space, no permission, not a folder); the
            message names the file and the system's reason, and nothing is left behind.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    # One name, so that what a killed run left is overwritten by the next.
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise unwritten(path, len(content), error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def unwritten(path: Path, nbytes: int, error: OSError) -> Prune2OnnxError:
    """The error for a file that the system does not let us write."""
    advice = "free some space" if error.errno == errno.ENOSPC else "check the path"
    return Prune2OnnxError(
        f"{path}: cannot write {nbytes:,} bytes: {error.strerror or error}; "
        f"{advice}, or choose another folder"
    )
