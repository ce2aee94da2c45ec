"""The user's own data: what `file.py:callable` or `package.module:callable` returns."""

from __future__ import annotations

from typing import Any

import numpy as np

from prune2onnx.callables import call_with, load_callable
from prune2onnx.data.examples import Data, Examples, arrays, is_torch, wrap
from prune2onnx.errors import Prune2OnnxError

FORM = (
    "expected Data, (train, test) where each is a torch Dataset or a pair (x, y) of arrays, "
    "or one such pair"
)


def read_own(spec: str, validation: float, seed: int) -> Data | tuple[Examples, Examples | None]:
    """Calls the user's function, with `validation` and `seed` if it takes them.

    It may return

    1. a `Data`: used as it is, with its validation set;
    2. `(train, test)`, each a torch map-style Dataset of (x, y) or a pair `(x, y)` of arrays or
       tensors;
    3. `(x, y)`, arrays or tensors, or a single Dataset: a test set is then held out.

    In 2 and 3 the validation set is held out of train. A Dataset that augments its examples at
    random augments the validation examples, too; return a `Data` where that matters.

    Raises:
        Prune2OnnxError: the function is missing or raises, or returns something else.
    """
    result = call_with(load_callable(spec), spec, validation=validation, seed=seed)
    if isinstance(result, Data):  # 1
        return _checked(result, spec)
    if _is_dataset(result):  # 3
        return wrap(result, spec), None
    if isinstance(result, tuple | list) and len(result) == 2:
        if all(_is_array(part) for part in result):  # 3
            return arrays(result[0], result[1], spec), None
        return _part(result[0], f"{spec}: train"), _part(result[1], f"{spec}: test")  # 2
    raise Prune2OnnxError(f"{spec} returned a {type(result).__name__}; {FORM}")


def _part(part: Any, where: str) -> Examples:
    """The train or the test set."""
    if _is_dataset(part):
        return wrap(part, where)
    if isinstance(part, tuple | list) and len(part) == 2:
        return arrays(part[0], part[1], where)
    raise Prune2OnnxError(f"{where} is a {type(part).__name__}; {FORM}")


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or is_torch(value, "Tensor")


def _is_dataset(value: Any) -> bool:
    """Whether it is a torch Dataset, or has a length and items but is not an array or a pair."""
    if is_torch(value, "Dataset"):
        return True
    plain = _is_array(value) or isinstance(value, tuple | list | dict | str | bytes)
    return not plain and hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _checked(data: Data, spec: str) -> Data:
    """A user's `Data`, checked: types, shapes and labels of its sets, none of them empty."""
    if data.classes < 2:
        raise Prune2OnnxError(f"{spec}: classes is {data.classes}, expected at least 2")
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    sets = {name: wrap(dataset, f"{spec}: {name}") for name, dataset in named.items()}
    for name, found in sets.items():
        where = f"{spec}: {name}"
        if found.shape != tuple(data.input_shape):
            raise Prune2OnnxError(
                f"{where}: examples have shape {list(found.shape)}, but input_shape is "
                f"{list(data.input_shape)}, expected the same"
            )
        if len(found) == 0 or int(found.y.max()) >= data.classes:
            largest = f"label {int(found.y.max())}" if len(found) else "no examples"
            raise Prune2OnnxError(
                f"{where}: {largest}, expected labels 0 ... {data.classes - 1} (classes is "
                f"{data.classes})"
            )
    return Data(
        data.name,
        sets["train"],
        sets["validation"],
        sets["test"],
        tuple(data.input_shape),
        int(data.classes),
    )
