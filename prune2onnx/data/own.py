"""The user's own data: what `file.py:callable` or `package.module:callable` returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from prune2onnx.callables import call_with, load_callable
from prune2onnx.data.examples import Arrays, Data, is_torch
from prune2onnx.data.shaped import Shaped, described_data, shaped, wrapped
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.tasks.task import Task

FORM = (
    "expected Data, (train, test) where each is a torch Dataset or a pair (x, y) of arrays, "
    "or one such pair"
)


def read_own(
    spec: str, validation: float, seed: int, task: Task
) -> Data | tuple[Shaped, Shaped | None]:
    """Calls the user's function, with `validation` and `seed` if it takes them.

    It may return

    1. a `Data`: used as it is, with its validation set;
    2. `(train, test)`, each a torch map-style Dataset or DataLoader of (inputs, targets), or a pair
       `(inputs, targets)` of arrays or tensors;
    3. such a pair, or a single Dataset or DataLoader: a test set is then held out;
    4. where the task needs no targets, inputs alone.

    Inputs are an array, or a tuple or dict of arrays, and so are targets, which may be None. In 2
    to 4 the validation set is held out of train. A Dataset that augments its examples at random
    augments the validation examples, too; return a `Data` where that matters.

    Raises:
        Prune2OnnxError: the function is missing or raises, or returns something else.
    """
    result = call_with(load_callable(spec), spec, validation=validation, seed=seed)
    if isinstance(result, Data):  # 1
        return _checked(result, spec, task)
    if _is_dataset(result):  # 3
        return wrapped(result, task, spec), None
    if _is_array(result) or _are_arrays(result, dict):  # 4
        return shaped(result, None, task, spec), None
    if isinstance(result, tuple | list) and len(result) == 2:
        if _is_pair(result):  # 3
            return shaped(result[0], result[1], task, spec), None
        return _part(result[0], task, f"{spec}: train"), _part(result[1], task, f"{spec}: test")
    raise Prune2OnnxError(f"{spec} returned a {type(result).__name__}; {FORM}")


def _part(part: Any, task: Task, where: str) -> Shaped:
    """The train or the test set."""
    if _is_dataset(part):
        return wrapped(part, task, where)
    if _are_arrays(part, dict):
        return shaped(part, None, task, where)
    if isinstance(part, tuple | list) and len(part) == 2:
        return shaped(part[0], part[1], task, where)
    raise Prune2OnnxError(f"{where} is a {type(part).__name__}; {FORM}")


def _is_pair(values: Any) -> bool:
    """Whether two things are inputs and targets, not a train and a test set."""
    x, y = values
    if _is_array(x) or _are_arrays(x, dict):
        return y is None or _is_array(y) or _are_arrays(y, dict)
    return _are_arrays(x, tuple) and _is_array(y)


def _are_arrays(value: Any, kind: type) -> bool:
    """Whether a value is a tuple, or a dict, of arrays."""
    if not isinstance(value, kind) or not value:
        return False
    values: Any = value.values() if isinstance(value, dict) else value
    return all(_is_array(each) for each in values)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or is_torch(value, "Tensor")


def _is_dataset(value: Any) -> bool:
    """Whether it is a torch Dataset, or has a length and items but is not an array or a pair."""
    if is_torch(value, "Dataset") or is_torch(value, "DataLoader") or isinstance(value, Arrays):
        return True
    plain = _is_array(value) or isinstance(value, tuple | list | dict | str | bytes)
    return not plain and hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _checked(data: Data, spec: str, task: Task) -> Data:
    """A user's `Data`, checked: types, shapes and labels of its sets, none of them empty."""
    if data.classes == 1 and task.targets == "class":
        raise Prune2OnnxError(f"{spec}: classes is {data.classes}, expected at least 2")
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    sets = {name: wrapped(dataset, task, f"{spec}: {name}") for name, dataset in named.items()}
    given = _listed(data.input_shape) if data.input_shape else sets["train"].shape
    for name, found in sets.items():
        where = f"{spec}: {name}"
        if found.shape != given:
            raise Prune2OnnxError(
                f"{where}: examples have shape {_shown(found.shape)}, but input_shape is "
                f"{_shown(given)}, expected the same"
            )
        beyond = len(found) and data.classes and int(found.labels.max()) >= data.classes
        if task.targets == "class" and (beyond or not len(found)):
            largest = f"label {int(found.labels.max())}" if len(found) else "no examples"
            raise Prune2OnnxError(
                f"{where}: {largest}, expected labels 0 ... {data.classes - 1} (classes is "
                f"{data.classes})"
            )
    made = described_data(data.name, sets["train"], sets["validation"], sets["test"], task)
    return replace(made, input_shape=given, classes=int(data.classes) or made.classes)


def _listed(shape: Any) -> Any:
    """A shape as a tuple; a dict of shapes as it is."""
    return shape if isinstance(shape, dict) else tuple(shape)


def _shown(shape: Any) -> Any:
    return list(shape) if isinstance(shape, tuple) else shape
