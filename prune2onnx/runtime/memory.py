"""How much memory a process may still take, and what is said where that is less than it will need.

What something needs is an estimate, so up to twice what is free there is a warning before it
starts, and only beyond that an error.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import psutil

from prune2onnx.errors import LowMemoryWarning, OutOfMemoryError

BASE_NBYTES = 0.2e9
"""What Python, numpy and onnxruntime take before any model is read."""

_CERTAIN = 2.0
"""Times what is free, of which more is an error: estimates are within that."""

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def require(doing: str, nbytes: float, advice: str) -> None:
    """Says so before something starts that takes more memory than there is.

    Args:
        doing: what takes it, as the subject of a sentence.
        nbytes: about how much, in all.
        advice: what takes less, or what to do.

    Raises:
        OutOfMemoryError: it takes more than twice of what is free.
    """
    free = available()
    if nbytes <= free:
        return
    text = (
        f"{doing} takes about {nbytes / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} are free; "
        f"{advice}"
    )
    if nbytes > _CERTAIN * free:
        raise OutOfMemoryError(text)
    warnings.warn(LowMemoryWarning(f"{text}; it may end with an error, or be killed"), stacklevel=2)


def available() -> int:
    """Bytes that this process may still take: the least that the system and its limits leave."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, RuntimeError):  # some systems do not tell
        free += int(psutil.swap_memory().free)
    return max(0, min([free, *_left_in_groups(), *_left_of_limit()]))


def _left_of_limit() -> list[int]:
    """What the limit of a process's addresses (`ulimit -v`) leaves."""
    if sys.platform == "win32":
        return []
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    return [limit - int(psutil.Process().memory_info().vms)]


def _left_in_groups() -> list[int]:
    """What the limits of Linux's control groups leave, as containers have them.

    Files that are cached count there, too, and are given back: those are free.
    """
    found = []
    for folder, names in _groups():
        limit, used, cached = names
        try:
            most, taken = ((folder / name).read_text().strip() for name in (limit, used))
            lines = (folder / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        facts = dict(line.split() for line in lines if len(line.split()) == 2)
        if most.isdigit() and taken.isdigit():  # else "max"
            found.append(int(most) - int(taken) + int(facts.get(cached, 0)))
    return found


def _groups() -> list[tuple[Path, tuple[str, str, str]]]:
    """Folders of this process's control groups, and of those around them, with names of files."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.lstrip("/")
        found += [(each, names) for each in (own, *own.parents) if each.is_relative_to(root)]
    return found
