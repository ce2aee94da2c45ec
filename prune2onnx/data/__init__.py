"""Examples: `load_data` reads them from a source and holds out what training must not see.

| source | what it reads |
| --- | --- |
| `digits` | scikit-learn's 1,797 handwritten digits, `[1, 8, 8]`; no file needed |
| `mnist`, `mnist:DIR` | MNIST, `[1, 28, 28]`; downloaded where it is missing |
| `idx:DIR` | IDX files named as MNIST's |
| `folder:DIR` | images, one folder per class |
| `npz:FILE` | x_train, y_train, x_test, y_test, or x, y; several inputs as x_NAME |
| `text:FILE` | lines of text, for language modelling and distillation, with a tokenizer |
| `file.py:callable`, `package.module:callable` | what your own function returns |

The test set is the source's own; where there is none, 20 % are held out, the same for every seed.
The validation set is held out of the rest and depends on the seed. Both are stratified by class,
where examples have one. What a task makes of examples is in `shaped`, how each source is read in
the other modules of this folder.
"""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prune2onnx.data.examples import (
    Arrays,
    Data,
    MapDataset,
    arrays,
    batches,
    collate,
    first,
)
from prune2onnx.data.folder import read_folder
from prune2onnx.data.idx import read_idx_folder, read_mnist
from prune2onnx.data.images import AS_THEY_ARE, Images
from prune2onnx.data.npz import read_npz
from prune2onnx.data.own import read_own
from prune2onnx.data.shaped import described_data, shaped, with_integers
from prune2onnx.data.split import hold_out
from prune2onnx.data.text import PREFIX as TEXT
from prune2onnx.data.text import read_text
from prune2onnx.errors import DataWarning, Prune2OnnxError, RecipeError
from prune2onnx.tasks.task import CLASSIFICATION, Task

__all__ = [
    "Arrays",
    "Data",
    "Images",
    "MapDataset",
    "batches",
    "collate",
    "first",
    "load_data",
    "with_integers",
]

Pair: TypeAlias = tuple[Arrays, Arrays | None]
"""A training and a test set; without the latter, it is held out of the former."""

TEST_FRACTION = 0.2
TEST_SEED = 1712  # any constant; the paper's month


def load_data(
    spec: str,
    *,
    validation: float = 0.1,
    seed: int = 0,
    task: Task = CLASSIFICATION,
    images: Images = AS_THEY_ARE,
    tokenizer: Path | None = None,
    length: int | None = None,
) -> Data:
    """Reads the examples that `spec` names (see the table above).

    Args:
        spec: a source, such as `digits` or `folder:DIR`.
        validation: the fraction of the training examples to hold out, between 0 and 1.
        seed: which of them; the test set does not depend on it.
        task: what they are for; it says which targets are expected.
        images: how images are resized, cropped and normalised.
        tokenizer: the tokenizer.json of `text:FILE`.
        length: tokens of an example of `text:FILE`, at most.

    Returns:
        Three map-style datasets of (inputs, targets): in classification, of (float32 x, int64 y).
        Batch them with `collate`:
        `DataLoader(data.train, batch_size=128, shuffle=True, collate_fn=collate)`.

    Raises:
        RecipeError: the source is unknown or `validation` is out of range.
        Prune2OnnxError: the examples cannot be read, or do not fit the task; the message names the
            file, what was found, what was expected and what to do.

    >>> data = load_data("digits")
    >>> data.input_shape, data.classes, len(data.train), len(data.validation), len(data.test)
    ((1, 8, 8), 10, 1294, 144, 359)
    """
    if not 0 < validation < 1:
        raise RecipeError(
            f"validation {validation}: expected a fraction between 0 and 1, both excluded; "
            "thresholds and checkpoints are chosen on it"
        )
    train: Any
    test: Any
    tokens = 0
    if spec.partition(":")[0] == TEXT:
        test = None
        train, tokens = read_text(spec.partition(":")[2], task, tokenizer, length)
    else:
        train, test = _read(spec, validation, seed, task, images)
    if isinstance(train, Data):
        return train
    if task.targets == "class" and len(seen := np.unique(train.labels)) < 2:
        raise Prune2OnnxError(
            f"{spec}: all {len(train):,} training examples have label {seen[0]}, expected at least "
            "2 classes; there is nothing to learn"
        )
    if test is None:
        train, test = hold_out(train, TEST_FRACTION, TEST_SEED, "test", spec)
    if train.shape != test.shape:
        raise Prune2OnnxError(
            f"{spec}: training examples have shape {_listed(train.shape)}, test examples "
            f"{_listed(test.shape)}, expected the same; prepare both in the same way"
        )
    if task.targets == "class":
        _warn_of_gaps(spec, np.union1d(train.labels, test.labels))
    train, held = hold_out(train, validation, seed, "validation", spec)
    data = described_data(spec, train, held, test, task, tokens)
    return images.normalized(data) if images.normalizes else data


def _read(spec: str, validation: float, seed: int, task: Task, images: Images) -> tuple[Any, Any]:
    """The training and the test set, or None for the latter; or a user's `Data`, and None."""
    head, _, argument = spec.partition(":")
    if images.resizes and head != "folder":
        raise RecipeError(
            f"data {spec!r}: resize and crop are for folder:DIR, whose images are files; leave "
            "them out, or resize the examples before"
        )
    if head not in SOURCES:
        if not _names_a_callable(spec):
            raise RecipeError(f"data {spec!r}: unknown source; {_hint(spec)}")
        found = read_own(spec, validation, seed, task)
        if not isinstance(found, Data):
            return found
        return (images.normalized(found) if images.normalizes else found), None
    try:
        return SOURCES[head](argument, task, images)
    except OSError as error:
        raise Prune2OnnxError(
            f"{spec}: {error.filename or argument} cannot be read "
            f"({error.strerror or error}); check that it exists and may be read"
        ) from error


def _warn_of_gaps(spec: str, known: NDArray[np.int64]) -> None:
    """Warns where classes have no example."""
    classes = 1 + int(known.max())
    if len(known) < classes:
        absent = np.setdiff1d(np.arange(classes), known)
        warnings.warn(
            f"{spec}: labels go up to {classes - 1}, so there are {classes:,} classes, and "
            f"{len(absent):,} of them have no example, {absent[0]} the first; number classes from "
            "0 without gaps",
            DataWarning,
            stacklevel=3,
        )


def _listed(shape: Any) -> Any:
    """A shape as messages show it."""
    return list(shape) if isinstance(shape, tuple) else shape


def _read_digits(argument: str) -> Pair:
    """`digits`: pixels 0 ... 16 as uint8 `[n, 1, 8, 8]`, scaled to 0 ... 1."""
    if argument:
        raise RecipeError(f"data 'digits:{argument}': expected digits alone; it reads no file")
    # Imported here: it takes a second, and no other source needs it.
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return arrays(x.reshape(-1, 1, 8, 8).astype(np.uint8), y, "digits", scale=1 / 16), None


def _for_task(read: Callable[[str], Pair]) -> Callable[[str, Task, Images], Pair]:
    """A source of images with labels, for any task."""

    def convert(argument: str, task: Task, images: Images) -> Pair:
        train, test = read(argument)
        if task.targets == "class" and task.batch is None:
            return train, test
        parts = (
            None if part is None else shaped(part.x, part.y, task, argument, part.scale)
            for part in (train, test)
        )
        return next(parts), next(parts)  # type: ignore[return-value]

    return convert


SOURCES: dict[str, Callable[[str, Task, Images], tuple[Any, Any]]] = {
    "digits": _for_task(_read_digits),
    "mnist": _for_task(read_mnist),
    "idx": _for_task(read_idx_folder),
    "folder": read_folder,
    "npz": read_npz,
}


def _names_a_callable(spec: str) -> bool:
    """Whether `spec` means file.py:callable or module:callable, not a misspelt source."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py") or spec.endswith(".py"):
        return True
    if not name.isidentifier() or not all(part.isidentifier() for part in place.split(".")):
        return False
    return "." in place or Path(place).is_dir() or _is_module(place)


def _is_module(name: str) -> bool:
    try:
        return Path(f"{name}.py").is_file() or importlib.util.find_spec(name) is not None
    except ValueError:  # __main__ and other modules without a file
        return False


def _hint(spec: str) -> str:
    """A suggestion for an unknown source."""
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return f"did you mean npz:{spec}?"
    if path.is_file() and path.suffix == ".txt":
        return f"did you mean text:{spec}, for a model that reads tokens?"
    if spec and path.is_dir():
        return f"did you mean folder:{spec} or idx:{spec}?"
    head, colon, argument = spec.partition(":")
    near = difflib.get_close_matches(head.lower(), (*SOURCES, TEXT), n=1)
    known = (
        "expected digits, mnist[:DIR], idx:DIR, folder:DIR, npz:FILE, text:FILE or file.py:callable"
    )
    return known + (f"; did you mean {near[0]}{colon}{argument}?" if near else "")
