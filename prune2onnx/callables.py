"""Functions that the user names: `path/to/file.py:name` or `package.module:name`.

This module finds, imports and calls them, and turns every failure into a one-line error. Callers
check what a function returns.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from prune2onnx.errors import Prune2OnnxError, one_line

FORM = "expected path/to/file.py:name or package.module:name"
# User code that parses a command line on import raises SystemExit: a failed import, not the end of
# this program. KeyboardInterrupt still ends it.
FAILURES = (Exception, SystemExit)


def load_callable(spec: str) -> Callable[..., Any]:
    """Imports what `spec` names: a function, a class or anything else that can be called.

    `path/to/file.py:name` runs the file as a module of its own (files beside it can be imported);
    the same content at the same path runs once per process. `package.module:name` imports as
    `python -m` would: the working directory comes first.

    Raises:
        Prune2OnnxError: not of that form; the file, the module or the name is missing; the import
            raises (kept as `__cause__`); the object named is not callable.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        is_file = place.endswith(".py") or spec.endswith(".py")
        example = f"{(place or spec) if is_file else 'file.py'}:NAME"
        raise Prune2OnnxError(f"{spec!r} names no function: {FORM}; write for example {example}")
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _file(Path(place).expanduser()) if is_file else _module(place)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        near = difflib.get_close_matches(name, own, n=1)
        # Names that the file merely imports are not suggested.
        defined = [
            key for key in own if getattr(vars(module)[key], "__module__", "") == module.__name__
        ]
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(defined) or 'none'}"
        raise Prune2OnnxError(f"{spec}: {place} has no {name!r}, expected a function there; {hint}")
    found = getattr(module, name)
    if not callable(found):
        raise Prune2OnnxError(
            f"{spec}: {name!r} is a value of type {type(found).__name__}, expected a function; "
            "wrap it in a function that returns it"
        )
    return found  # type: ignore[no-any-return]


def call_with(function: Callable[..., Any], spec: str, **available: Any) -> Any:
    """Calls `function` with those of the `available` arguments that its signature takes.

    A function with `**kwargs` takes them all; one whose signature cannot be inspected gets none.
    Error messages call it `spec`.

    >>> call_with(lambda classes, width=8: (classes, width), "net.py:net", classes=3, seed=0)
    (3, 8)

    Raises:
        Prune2OnnxError: it requires an argument that is not available, or raises (kept as
            `__cause__`). A Prune2OnnxError that it raises passes through.
    """
    parameters = _parameters(function)
    by_name = names_of(function)
    takes_all = takes_any(function)
    given = {key: value for key, value in available.items() if takes_all or key in by_name}
    for p in parameters:
        optional = p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if not optional and p.name not in given:
            raise Prune2OnnxError(
                f"{spec} requires the argument {p.name!r}, expected only arguments among "
                f"{', '.join(available) or 'none'}, by name; give it a default value"
            )
    try:
        return function(**given)
    except Prune2OnnxError:
        raise
    except FAILURES as error:
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise Prune2OnnxError(
            f"{spec}: calling it with ({arguments}) raised {_description(error)}; "
            "expected it to return; fix it and try again"
        ) from error


def names_of(function: Callable[..., Any]) -> set[str]:
    """The arguments that a function takes by name; none where its signature is not known."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in _parameters(function) if p.kind in kinds}


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether a function takes arguments of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(function))


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _file(path: Path) -> ModuleType:
    """Runs a Python file as a module; the same content runs once."""
    if path.suffix != ".py":
        raise Prune2OnnxError(f"{path} is not a .py file: {FORM}")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise Prune2OnnxError(f"{path}: no such file, expected a Python file; {hint}") from None
    except OSError as error:
        raise Prune2OnnxError(
            f"{path}: cannot be read ({error.strerror or error}), expected a Python file; "
            "check the path and its permissions"
        ) from error
    path = path.resolve()
    # A unique name, so that a user's torch.py or two different net.py never collide. It stays in
    # sys.modules because dataclasses and pickle look modules up there.
    digest = hashlib.sha256(str(path).encode() + b"\0" + content).hexdigest()[:12]
    name = f"{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # every .py suffix has a source loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(path.parent):
            # Compiled here, not by the loader: its bytecode cache compares mtimes in whole
            # seconds and may be older than the content just read.
            exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, FAILURES):
            raise
        raise Prune2OnnxError(
            f"{path}: importing it raised {_description(error, path)}; "
            "expected a file that imports; fix it and try again"
        ) from error
    return module


def _module(name: str) -> ModuleType:
    """Imports a module, the working directory first."""
    try:
        with _importable(Path.cwd()):
            importlib.invalidate_caches()
            return importlib.import_module(name)
    except FAILURES as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(missing + ".")):
            raise Prune2OnnxError(
                f"{name}: no module {missing!r} in {Path.cwd()} or among the installed packages; "
                f"{FORM}; check its spelling or name the file"
            ) from error
        raise Prune2OnnxError(
            f"{name}: importing it raised {_description(error)}; "
            "expected a module that imports; fix it and try again"
        ) from error


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts `folder` first on the import path, and leaves it there last.

    First while the user's module is imported, as Python itself does for a script; last afterwards,
    so that imports inside its functions still work but nothing there hides an installed package.
    """
    entry = str(folder)
    known = entry in sys.path
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
        if not known:
            sys.path.append(entry)


def _description(error: BaseException, path: Path | None = None) -> str:
    """The exception on one line: its type, its message and the line in `path` where it arose."""
    message = one_line(error)[:300]
    lines, step = [], error.__traceback__
    while step is not None:
        if path is not None and step.tb_frame.f_code.co_filename == str(path):
            lines.append(step.tb_lineno)
        step = step.tb_next
    description = type(error).__name__ + (f": {message}" if message else "")
    return description + (f" (line {lines[-1]})" if lines else "")
