"""Examples of any shape: inputs and targets as a task needs them, checked and of known types.

1. Floats become float32. uint8 counts as pixels, 0 ... 1, where it is no token; integers in a tuple
   or a dict, and tokens, become int64; a single array of integers becomes float32, as in
   classification, and the model decides whether it is given integers (`with_integers`).
2. Targets become what the task says (`tasks.task.Targets`); those that it makes itself, from the
   inputs or by its own `batch`, are made here, so that training and validation have the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prune2onnx.data.examples import (
    PIXEL,
    Arrays,
    Data,
    Indices,
    Wrapped,
    arrays,
    is_torch,
    labels_of,
    numpy_of,
    require_map_style,
    wrap,
)
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.tasks.metrics import IGNORED
from prune2onnx.tasks.structure import described, leaves, mapped, stacked
from prune2onnx.tasks.task import TOKENS, Task

TARGET_NAMES = ("labels", "label", "targets", "target", "y")
"""Keys of a dict that is a whole example, under which its target may be."""

_ADVICE = {
    "class": "integers from 0, one for each example",
    "labels": "0 or 1 for each label, [examples, labels]",
    "values": "numbers, [examples, ...]",
    "class map": "integer classes from 0 at each place, [examples, height, width]",
    "token classes": "integer classes from 0 at each position, [examples, positions]",
}


class Mapped:
    """Examples of a user's map-style dataset, of any shape.

    Attributes:
        dataset: the user's.
        indices: `[n]`, which of its examples these are.
        labels: the class of each, `[n]`; zeros where it has no single class.
        shape: of the inputs of one.
        convert: one of its examples -> (inputs, targets).
    """

    def __init__(
        self,
        dataset: Any,
        indices: Indices,
        labels: NDArray[np.int64],
        shape: Any,
        convert: Callable[[int], tuple[Any, Any]],
    ) -> None:
        self.dataset, self.indices, self.labels = dataset, indices, labels
        self.shape, self.convert = shape, convert

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.convert(int(self.indices[index]))

    def subset(self, indices: Indices) -> Mapped:
        """The examples at `indices`, nothing copied."""
        chosen, labels = self.indices[indices], self.labels[indices]
        return Mapped(self.dataset, chosen, labels, self.shape, self.convert)


Shaped: TypeAlias = Arrays | Wrapped | Mapped


def shaped(x: Any, y: Any, task: Task, where: str, scale: float = PIXEL) -> Arrays:
    """Examples in memory, for any task.

    Args:
        x: inputs `[n, ...]`: an array or tensor, or a tuple or dict of such.
        y: targets `[n, ...]`, in the same way; None where there are none.
        task: what it is for.
        where: their name in error messages.
        scale: for uint8 inputs.

    Raises:
        Prune2OnnxError: inputs or targets are no numbers, are not finite, have different lengths,
            or are not what the task needs.
    """
    if task.targets == "class" and task.batch is None and not isinstance(x, tuple | dict):
        if y is None:
            raise _without_targets(task, where)
        return arrays(x, y, where, scale)
    x, y = _as_arrays(x, f"{where}: inputs"), _as_arrays(y, f"{where}: targets")
    single = not isinstance(x, tuple | dict)
    tokens = single and task.targets in TOKENS
    integers = single and x.dtype.kind in "iu" and x.dtype != np.uint8 and not tokens
    x = mapped(lambda array: _input(array, where, tokens or not single, tokens), x)
    if single and x.dtype == np.uint8 and x.ndim == 3:
        x = x[:, None]
    y = _targets(x, y, task, where)
    if task.batch is not None:
        x, y = _own_batch(task, x, y, where)
    elif task.targets == "next token" and y is None:
        x, y = _shifted(x, where)
    _same_length(x, y, where)
    return Arrays(x, y, scale, integers=integers)


def wrapped(dataset: Any, task: Task, where: str) -> Shaped:
    """Examples of a user's dataset or DataLoader, for any task.

    An example is (inputs, targets), inputs alone, or a dict with the inputs and, under one of
    `TARGET_NAMES`, the target. Of a DataLoader with a `collate_fn` of its own the batches are read
    once and kept; of any other, its dataset is used.

    Raises:
        Prune2OnnxError: it is not map-style, is empty, or an example is not what the task needs.
    """
    if is_torch(dataset, "DataLoader"):
        if _collates(dataset):
            return _gathered(dataset, task, where)
        dataset = dataset.dataset
    if isinstance(dataset, Arrays | Wrapped | Mapped):
        return dataset
    if is_torch(dataset, "TensorDataset"):
        *x, y = dataset.tensors if len(dataset.tensors) > 1 else (*dataset.tensors, None)
        return shaped(x[0] if len(x) == 1 else tuple(x), y, task, where)
    require_map_style(dataset, where)
    if task.targets == "class" and task.batch is None and _has_one_input(dataset, where):
        return wrap(dataset, where)

    def convert(index: int) -> tuple[Any, Any]:
        here = f"{where}: example {index}"
        x, y = _as_pair(_read(dataset, index, where))
        one = (_as_arrays(x, f"{here}: inputs"), _as_arrays(y, f"{here}: targets"))
        x, y = (mapped(lambda array: array[None], value) for value in one)
        return shaped(x, y, task, here)[0]

    first = convert(0)[0]
    head = described(first)
    labels = np.zeros(len(dataset), np.int64)
    for index in range(len(dataset)):
        x, y = convert(index)
        if described(x) != head:
            raise Prune2OnnxError(
                f"{where}: inputs of example {index} are {described(x)}, of example 0 {head}, "
                "expected the same shapes; resize or pad in the dataset"
            )
        if task.targets == "class":
            labels[index] = y
    shape = mapped(lambda array: tuple(array.shape), first)
    return Mapped(dataset, np.arange(len(dataset)), labels, shape, convert)


def with_integers(data: Data) -> Data | None:
    """The same data with int64 inputs, where its single input was given as integers; else None."""
    splits: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        if not isinstance(split, Arrays) or not split.integers:
            return None
        splits[name] = Arrays(split.x.astype(np.int64), split.y, integers=True)
    tokens = 1 + max(int(split.x.max()) for split in splits.values())
    return dataclasses.replace(data, **splits, input_dtype="int64", tokens=tokens)


def described_data(
    name: str, train: Any, validation: Any, test: Any, task: Task, tokens: int = 0
) -> Data:
    """`Data` with everything that is found by looking at its examples.

    Args:
        name: of the source.
        train: the splits.
        validation: see there.
        test: see there.
        task: what they are for.
        tokens: how many there are at least, whether they occur or not.
    """
    x, y = train[0]
    dtype = mapped(lambda array: str(array.dtype), x)
    every = (train, validation, test)
    classes = 0
    if task.targets in ("class", "class map", "outputs", *TOKENS):
        classes = 1 + max(_largest(split, 1) for split in every)
    elif isinstance(y, np.ndarray | np.generic):
        classes = max(1, int(np.prod(y.shape)))
    if any(str(array.dtype) == "int64" for array in leaves(x)):
        tokens = max(tokens, 1 + max(_largest(split, 0) for split in every))
    if task.targets == "next token":
        classes = tokens = max(classes, tokens)
    return Data(name, train, validation, test, train.shape, classes, dtype, tokens)


def _largest(split: Any, part: int) -> int:
    """The largest integer in the inputs (0) or the targets (1) of a split."""
    values = (split.x, split.y)[part] if isinstance(split, Arrays) else None
    if values is None and isinstance(split, Wrapped):
        return int(split.y.max()) if part else 0
    found = [values] if values is not None else (split[i][part] for i in range(len(split)))
    return max(
        (
            int(array.max(initial=0))
            for value in found
            for array in map(np.asarray, leaves(value))
            if array.dtype.kind in "iu" and array.dtype != np.uint8
        ),
        default=0,
    )


# -- one array at a time ---------------------------------------------------------------------------


def _as_arrays(value: Any, what: str) -> Any:
    """Numpy arrays, in the same structure."""
    if isinstance(value, dict):
        if not value or not all(isinstance(name, str) for name in value):
            raise Prune2OnnxError(f"{what}: a dict of {len(value)} entries, expected names: arrays")
        return {name: numpy_of(each, f"{what}: {name}") for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(numpy_of(each, f"{what}: {at}") for at, each in enumerate(value))
    return None if value is None else numpy_of(value, what)


def _input(array: NDArray[Any], where: str, as_integers: bool, tokens: bool) -> NDArray[Any]:
    """One input, of a type that a network takes; uint8 pixels stay."""
    if array.ndim < 1 or not array.size:
        raise Prune2OnnxError(
            f"{where}: inputs have shape {list(array.shape)}, expected [examples, ...], not empty"
        )
    if array.dtype.kind not in "biuf":
        raise Prune2OnnxError(
            f"{where}: inputs have dtype {array.dtype}, expected numbers; convert them"
        )
    if array.dtype == np.uint8 and not tokens:
        return _writable(array)
    if tokens and array.dtype.kind not in "iu":
        raise Prune2OnnxError(
            f"{where}: inputs have dtype {array.dtype}, expected integers: the numbers of tokens"
        )
    if array.dtype.kind in "iu" and as_integers:
        if tokens and int(array.min()) < 0:
            raise Prune2OnnxError(
                f"{where}: token {int(array.min())}, expected integers from 0; number the tokens"
            )
        return _writable(array.astype(np.int64))
    if array.dtype.kind == "b" and as_integers:
        return _writable(array)
    return _finite(array, f"{where}: inputs")


def _finite(array: NDArray[Any], what: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, caught below
        array = _writable(array.astype(np.float32))
    if not np.isfinite(array.sum(dtype=np.float64)) and len(
        bad := np.argwhere(~np.isfinite(array))
    ):
        raise Prune2OnnxError(
            f"{what} are {array[tuple(bad[0])]} at {bad[0].tolist()} ({len(bad):,} such values), "
            "expected finite float32; clean the data"
        )
    return array


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    # torch warns about read-only memory, such as that of a file
    return np.require(array, requirements=["C", "W"])


def _targets(x: Any, y: Any, task: Task, where: str) -> Any:
    """Targets in the type that the task needs."""
    kind = task.targets
    if kind == "inputs":
        if isinstance(x, tuple | dict):
            raise Prune2OnnxError(
                f"{where}: inputs are {described(x)}, expected one array to reconstruct; use your "
                "own task, or regression with the array as target"
            )
        return x
    if kind == "outputs":  # classes, where there are some, tell how many outputs a network needs
        is_class = isinstance(y, np.ndarray) and y.ndim == 1 and y.dtype.kind in "iu"
        return labels_of(y, where) if is_class else None
    if kind == "any":
        return mapped(
            lambda a: a.astype(np.int64) if a.dtype.kind in "biu" else _finite(a, f"{where}: y"), y
        )
    if kind == "next token":
        if isinstance(x, tuple | dict):
            raise Prune2OnnxError(
                f"{where}: inputs are {described(x)}, expected one array of tokens"
            )
        if y is None:
            return None
        if isinstance(y, tuple | dict) or y.dtype.kind not in "iu" or y.shape != x.shape:
            raise Prune2OnnxError(
                f"{where}: targets are {described(y)}, inputs {described(x)}; expected no targets "
                "(then each token's target is the next one), or the next tokens, of one shape"
            )
        return y.astype(np.int64)
    if y is None:
        raise _without_targets(task, where)
    if isinstance(y, tuple | dict) or y.dtype.kind not in "biuf":
        raise _wrong_targets(task, y, where)
    if kind == "values":
        return _finite(y, f"{where}: targets")
    if kind == "labels":
        if y.ndim != 2 or not np.isin(y, (0, 1)).all():
            raise _wrong_targets(task, y, where)
        return y.astype(np.float32)
    return _classes(y, task, where)


def _classes(y: NDArray[Any], task: Task, where: str) -> NDArray[np.int64]:
    if y.dtype.kind == "f":
        raise _wrong_targets(task, y, where)
    if task.targets == "class":
        if y.ndim != 1:
            raise _wrong_targets(task, y, where)
        return labels_of(y, where)
    if y.ndim < (3 if task.targets == "class map" else 2):
        raise _wrong_targets(task, y, where)
    y = y.astype(np.int64)
    if int(y[y != IGNORED].min(initial=0)) < 0:
        raise Prune2OnnxError(
            f"{where}: class {int(y[y != IGNORED].min())}, expected integers from 0, or {IGNORED} "
            "where nothing is to be learned"
        )
    return y


def _without_targets(task: Task, where: str) -> Prune2OnnxError:
    return Prune2OnnxError(
        f"{where}: has no targets, and task {task.name} needs {_ADVICE.get(task.targets, 'some')}; "
        "give pairs (inputs, targets), or a task without targets: language-modelling, "
        "reconstruction, distillation"
    )


def _wrong_targets(task: Task, y: Any, where: str) -> Prune2OnnxError:
    return Prune2OnnxError(
        f"{where}: targets are {described(y)}, and task {task.name} needs {_ADVICE[task.targets]}; "
        "convert them, or choose another --task"
    )


def _shifted(x: NDArray[np.int64], where: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens without the last, and without the first: what follows each."""
    if x.ndim != 2 or x.shape[1] < 2:
        raise Prune2OnnxError(
            f"{where}: tokens have shape {list(x.shape)}, expected [examples, positions], at least "
            "2 positions: the second is the first one's target"
        )
    return _writable(x[:, :-1]), _writable(x[:, 1:])


def _own_batch(task: Task, x: Any, y: Any, where: str) -> tuple[Any, Any]:
    assert task.batch is not None
    try:
        x, y = task.batch(x, y)
    except Exception as error:  # whatever the user's function raises
        raise Prune2OnnxError(
            f"task {task.name}: its batch fails on inputs {described(x)} and targets "
            f"{described(y)}: {type(error).__name__}: {one_line(error)[:300]}"
        ) from error
    here = f"{where}: batch of task {task.name}"
    return mapped(_writable, _as_arrays(x, here)), mapped(_writable, _as_arrays(y, here))


def _same_length(x: Any, y: Any, where: str) -> None:
    lengths = {len(array) for array in (*leaves(x), *leaves(y)) if array.ndim}
    if len(lengths) > 1 or any(not array.ndim for array in leaves(y)):
        raise Prune2OnnxError(
            f"{where}: inputs are {described(x)}, targets {described(y)}, expected as many "
            "examples in each, along the first axis"
        )


# -- datasets --------------------------------------------------------------------------------------


def _read(dataset: Any, index: int, where: str) -> Any:
    try:
        return dataset[index]
    except Exception as error:
        raise Prune2OnnxError(
            f"{where}: example {index}: reading it raised {type(error).__name__}: {error}; fix the "
            "dataset"
        ) from error


def _as_pair(item: Any) -> tuple[Any, Any]:
    """(inputs, targets) of one example, or of a batch."""
    if isinstance(item, dict):
        name = next((name for name in TARGET_NAMES if name in item), None)
        x = {key: value for key, value in item.items() if key != name}
        return x, None if name is None else item[name]
    if isinstance(item, tuple | list) and len(item) == 2:
        x, y = item
        return (tuple(x) if isinstance(x, list) and _are_arrays(x) else x), y
    return item, None


def _are_arrays(values: Sequence[Any]) -> bool:
    return bool(values) and all(hasattr(value, "shape") for value in values)


def _has_one_input(dataset: Any, where: str) -> bool:
    x, y = _as_pair(_read(dataset, 0, where))
    return y is None or not isinstance(x, tuple | dict)


def _collates(loader: Any) -> bool:
    from torch.utils.data import default_collate

    return loader.collate_fn is not default_collate or not hasattr(loader.dataset, "__len__")


def _gathered(loader: Any, task: Task, where: str) -> Arrays:
    """All batches of a DataLoader, read once."""
    pairs = []
    for number, batch in enumerate(loader):
        x, y = _as_pair(batch)
        here = f"{where}: batch {number}"
        pairs.append((_as_arrays(x, f"{here}: inputs"), _as_arrays(y, f"{here}: targets")))
    if not pairs:
        raise Prune2OnnxError(f"{where}: the DataLoader gives no batch, expected examples")
    try:
        x, y = (stacked(list(part), np.concatenate) for part in zip(*pairs, strict=True))
    except ValueError as error:
        raise Prune2OnnxError(
            f"{where}: batches of the DataLoader have different shapes ({one_line(error)}), "
            "expected the same but for the number of examples; pad in its collate_fn"
        ) from error
    return shaped(x, y, task, where)
