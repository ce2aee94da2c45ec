"""Files that appear whole or not at all.

A file is written beside its destination, flushed to the disk and renamed, so a killed run, a full
disk or a second reader never meets half a file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
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
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp gives 0600; a result is meant to be read by others, as the umask allows.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except OSError as error:
        raise Prune2OnnxError(
            f"{path}: cannot write {len(content):,} bytes: {error.strerror or error}; "
            "free some space or choose another place with -o"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()
