"""Examples (inputs, targets): `Arrays` in memory, `Wrapped` around a user's own data set.

Both give numpy arrays, float32 x and int64 y in classification; `collate` makes tensors of them for
training. So a file is validated on data without torch, which takes seconds to import. `arrays` and
`wrap` build and check those of a classifier with one input, `shaped` those of any other task; how
files are read is in the modules beside this one.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.tasks.structure import leaves, mapped, stacked

Batch: TypeAlias = tuple[Any, Any]
"""Inputs and targets: an array, or a tuple or dict of arrays; targets may also be None."""
Indices: TypeAlias = NDArray[np.int64]

PIXEL = 1 / 255  # uint8 counts as pixels, from any source: 0 ... 255 becomes 0 ... 1


class MapDataset(Protocol):
    """Examples (x, y) by index: what torch calls a map-style dataset."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """One example: x, and its label."""


@dataclass(frozen=True)
class Data:
    """Three sets of examples of one task.

    Attributes:
        name: as reports show it.
        train: map-style dataset of (inputs, targets), in classification (float32 x of
            `input_shape`, int64 y); weights learn from it.
        validation: the same form, held out of training; every choice is made on it.
        test: the same form; read once, for the report.
        input_shape: shape of one x, without the batch: `[channels, height, width]` for images. A
            tuple or dict of shapes where inputs are a tuple or dict of arrays.
        classes: number of classes, labels are 0 ... classes - 1; or of labels, or of values, that a
            network returns for an example, or for each position of it.
        input_dtype: type of the inputs, in the same structure.
        tokens: one more than the largest integer in the inputs; 0 where inputs are no integers.
    """

    name: str
    train: MapDataset
    validation: MapDataset
    test: MapDataset
    input_shape: Any = ()
    classes: int = 0
    input_dtype: Any = "float32"
    tokens: int = 0


class Arrays:
    """Examples in memory; one indexing operation makes a batch.

    Attributes:
        x: `[n, *shape]`, as stored: uint8 pixels, float32, or integers; or a tuple or dict of such.
        y: `[n, ...]`, in the same way; the object x itself where the inputs are the targets.
        scale: what uint8 x is multiplied by on access.
        integers: whether x was given as integers.
    """

    def __init__(self, x: Any, y: Any, scale: float = 1.0, *, integers: bool = False) -> None:
        self.x, self.y, self.scale, self.integers = x, y, scale, integers

    @property
    def shape(self) -> Any:
        """Shape of one x."""
        return mapped(lambda array: tuple(array.shape[1:]), self.x)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each example, `[n]`; zeros where it has no single class."""
        if isinstance(self.y, np.ndarray) and self.y.ndim == 1 and self.y.dtype == np.int64:
            return np.asarray(self.y, np.int64)
        return np.zeros(len(self), np.int64)

    def __len__(self) -> int:
        return len(leaves(self.x)[0])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = self.__getitems__([index])
        return mapped(lambda array: array[0], x), mapped(lambda array: array[0], y)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch, such as float32 `[batch, *shape]` and int64 `[batch]`; see `collate`."""
        # Not in torch, which uses its thread pool for such a batch: where other programs keep the
        # cores busy, that was measured to take 100 times as long as the copying.
        x = mapped(lambda array: self._scaled(array.take(indices, axis=0)), self.x)
        if self.y is self.x:
            return x, x
        return x, mapped(lambda array: array.take(indices, axis=0), self.y)

    def _scaled(self, x: NDArray[Any]) -> NDArray[Any]:
        if x.dtype == np.uint8:
            x = np.multiply(x, np.float32(self.scale), dtype=np.float32)
        return x.astype(np.float32, copy=False) if x.dtype.kind == "f" else x

    def subset(self, indices: Indices) -> Arrays:
        """A copy of the examples at `indices`."""
        x = mapped(lambda array: array[indices], self.x)
        y = x if self.y is self.x else mapped(lambda array: array[indices], self.y)
        return Arrays(x, y, self.scale, integers=self.integers)


class Wrapped:
    """Examples of a user's dataset, with checked types and known labels.

    Attributes:
        dataset: the user's map-style dataset of (x, y).
        y: int64 `[n]`, the labels of the examples chosen.
        shape: shape of one x.
        indices: `[n]`, which of the user's examples these are.
    """

    def __init__(
        self,
        dataset: Any,
        y: NDArray[np.int64],
        shape: tuple[int, ...],
        indices: Indices,
        where: str,
    ) -> None:
        self.dataset, self.y, self.shape = dataset, y, shape
        self.indices, self.where = indices, where

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each example, `[n]`."""
        return self.y

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], np.int64]:
        return _converted(self.dataset, int(self.indices[index]), self.where)

    def subset(self, indices: Indices) -> Wrapped:
        """The examples at `indices`, nothing copied."""
        chosen = self.indices[indices]
        return Wrapped(self.dataset, self.y[indices], self.shape, chosen, self.where)


Examples: TypeAlias = Arrays | Wrapped


def collate(batch: Any) -> Any:
    """A `DataLoader`'s `collate_fn`: makes tensors, such as float32 `[batch, ...]`.

    A batch of `Arrays` is a tuple of arrays already; that of any other dataset is a list of
    examples (inputs, targets), which are stacked; targets that are None stay None.
    """
    import torch  # a caller with a DataLoader has imported it
    from torch.utils.data import default_collate

    if isinstance(batch, tuple):
        return tuple(mapped(torch.from_numpy, each) for each in batch)
    if all(isinstance(example, tuple | list) and example[-1] is None for example in batch):
        return default_collate([example[0] for example in batch]), None
    return default_collate(batch)


def batches(data: MapDataset, size: int = 128) -> Iterator[Batch]:
    """A dataset in numpy batches (inputs [size, ...], targets [size, ...]), for onnxruntime."""
    for begin in range(0, len(data), size):
        indices = range(begin, min(begin + size, len(data)))
        if isinstance(data, Arrays):
            yield data.__getitems__(indices)
        else:
            x, y = zip(*(data[index] for index in indices), strict=True)
            yield _stacked(x), _stacked(y)


def _stacked(examples: Sequence[Any]) -> Any:
    return stacked([mapped(as_numpy, each) for each in examples], lambda parts: np.stack(parts))


def first(data: MapDataset, examples: int, size: int = 64) -> list[Any]:
    """The first examples of a dataset, without targets, in batches."""
    taken: list[Any] = []
    left = examples
    for x, _ in batches(data, min(size, examples)):
        part = mapped(lambda array: array[:left], x)  # noqa: B023  # called at once
        taken.append(part)
        left -= len(leaves(part)[0])
        if not left:
            break
    return taken


def arrays(x: Any, y: Any, where: str, scale: float = PIXEL) -> Arrays:
    """Checks arrays or tensors of examples and labels, and keeps them in memory.

    Args:
        x: `[n, ...]`, numbers. uint8 is kept and multiplied by `scale` on access, and uint8
            `[n, h, w]` are grey images, `[n, 1, h, w]`; every other type becomes float32 as it is.
        y: `[n]`, integers from 0.
        where: their name in error messages.
        scale: for uint8 only.

    Raises:
        Prune2OnnxError: x is not an array of numbers, has no axis beside n, or is not finite; y is
            not `[n]`, not of integers, or negative; there are no examples.
    """
    x, y = numpy_of(x, f"{where}: x"), numpy_of(y, f"{where}: y")
    if x.ndim < 2:
        raise Prune2OnnxError(
            f"{where}: x has shape {list(x.shape)}, expected [examples, ...] with at least one "
            "axis beside the examples; reshape it"
        )
    if x.size == 0:
        raise Prune2OnnxError(
            f"{where}: x has shape {list(x.shape)} and is empty; expected examples"
        )
    if y.ndim != 1:
        raise Prune2OnnxError(
            f"{where}: y has shape {list(y.shape)}, expected [examples]: one class number each; "
            "use y.argmax(1) for one-hot labels, y.ravel() for a column"
        )
    if len(x) != len(y):
        raise Prune2OnnxError(
            f"{where}: {len(x):,} examples but {len(y):,} labels, expected one label each; "
            "check that both come from the same set"
        )
    integers = x.dtype.kind in "iu" and x.dtype != np.uint8
    if x.dtype == np.uint8:
        x = x[:, None] if x.ndim == 3 else x
    elif x.dtype.kind in "biuf":
        scale = 1.0
        with np.errstate(over="ignore"):  # too large for float32 becomes inf, caught below
            x = x.astype(np.float32)
        # The sum is finite if all of x is, barring overflow: search only where it is not.
        if not np.isfinite(x.sum(dtype=np.float64)):
            bad = np.argwhere(~np.isfinite(x))
            if len(bad):
                raise Prune2OnnxError(
                    f"{where}: x is {x[tuple(bad[0])]} in example {bad[0][0]} at "
                    f"{bad[0][1:].tolist()} ({len(bad):,} such values), expected finite float32; "
                    "clean the data"
                )
    else:
        raise Prune2OnnxError(
            f"{where}: x has dtype {x.dtype}, expected uint8 (pixels) or numbers that fit float32"
        )
    # W: torch warns about read-only memory, such as that of a file.
    x = np.require(x, requirements=["C", "W"])
    return Arrays(x, labels_of(y, where), scale, integers=integers)


def wrap(dataset: Any, where: str) -> Examples:
    """Takes a user's map-style dataset of (x, y) and finds its labels.

    Labels are known for a `TensorDataset` and where `targets` lists them (torchvision); otherwise
    every example is read once.

    Raises:
        Prune2OnnxError: it is not map-style, is empty, or an example is not (x, y) with numbers of
            one shape and an integer label from 0.
    """
    if isinstance(dataset, Arrays | Wrapped):
        return dataset
    if is_torch(dataset, "TensorDataset") and len(dataset.tensors) == 2:
        x, y = dataset.tensors
        return arrays(x, y, where)
    require_map_style(dataset, where)
    first, label = _converted(dataset, 0, where)
    targets = getattr(dataset, "targets", None)
    known = None
    if targets is not None and getattr(dataset, "target_transform", None) is None:
        known = numpy_of(targets, f"{where}: targets")
        if known.shape != (len(dataset),) or known[0] != int(label):
            known = None  # `targets` means something else here
    if known is None:
        known = np.empty(len(dataset), np.int64)
        for index in range(len(dataset)):
            x, label = _converted(dataset, index, where)
            if x.shape != first.shape:
                raise Prune2OnnxError(
                    f"{where}: example {index} has shape {list(x.shape)} but example 0 has "
                    f"{list(first.shape)}, expected one shape; resize or pad in the dataset"
                )
            known[index] = int(label)
    every = np.arange(len(dataset))
    return Wrapped(dataset, labels_of(known, where), tuple(first.shape), every, where)


def require_map_style(dataset: Any, where: str) -> None:
    """Makes sure that a dataset has a length and an order, and is not empty.

    Raises:
        Prune2OnnxError: it has not, or is.
    """
    if is_torch(dataset, "IterableDataset") or not hasattr(dataset, "__len__"):
        raise Prune2OnnxError(
            f"{where}: a {type(dataset).__name__} has no length and no order, expected a map-style "
            "dataset (__len__ and __getitem__); read it into arrays"
        )
    if len(dataset) == 0:
        raise Prune2OnnxError(f"{where}: the dataset is empty, expected examples")


def labels_of(y: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Labels as int64 `[n]`, or an error."""
    if y.dtype.kind not in "biu":
        raise Prune2OnnxError(
            f"{where}: labels have dtype {y.dtype}, expected integers from 0; "
            "number the classes 0, 1, 2, ..."
        )
    wrong = np.flatnonzero((y < 0) | (y > np.iinfo(np.int32).max))
    if len(wrong):
        raise Prune2OnnxError(
            f"{where}: label {y[wrong[0]]} in example {wrong[0]}, expected integers from 0; "
            "number the classes 0, 1, 2, ..."
        )
    return y.astype(np.int64)


TorchType = Literal["Tensor", "Dataset", "IterableDataset", "TensorDataset", "DataLoader"]


def is_torch(value: Any, *types: TorchType) -> bool:
    """Whether a value is of one of torch's types; does not import torch."""
    if "torch" not in sys.modules:
        return False  # then no value can be
    import torch
    import torch.utils.data

    modules = {"Tensor": torch}
    return isinstance(value, tuple(getattr(modules.get(t, torch.utils.data), t) for t in types))


def as_numpy(value: Any) -> NDArray[Any]:
    """An array, a tensor or nested lists as a numpy array; bfloat16 as float32."""
    if is_torch(value, "Tensor"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def numpy_of(value: Any, what: str) -> NDArray[Any]:
    """`as_numpy`, with an error that names what is converted."""
    try:
        return as_numpy(value)
    except Exception as error:  # whatever the value's own conversion raises
        raise Prune2OnnxError(
            f"{what} is a {type(value).__name__}, expected an array: {error}"
        ) from error


def _converted(dataset: Any, index: int, where: str) -> tuple[NDArray[np.float32], np.int64]:
    """One example of a user's dataset, checked."""
    where = f"{where}: example {index}"
    try:
        item = dataset[index]
    except Exception as error:
        raise Prune2OnnxError(
            f"{where}: reading it raised {type(error).__name__}: {error}; fix the dataset"
        ) from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise Prune2OnnxError(f"{where} is a {type(item).__name__}, expected a pair (x, y)")
    try:
        x = as_numpy(item[0])
        # numpy would also accept an image, with its channels last
        known = isinstance(item[0], np.ndarray | list | tuple | float) or is_torch(
            item[0], "Tensor"
        )
        if not known or x.dtype.kind not in "biufc":
            raise TypeError("not numbers")
    except Exception as error:  # whatever the value's own conversion raises
        raise Prune2OnnxError(
            f"{where}: x is a {type(item[0]).__name__}, expected a tensor or an array; "
            "convert it in the dataset (torchvision: ToTensor)"
        ) from error
    if x.ndim == 0 or x.dtype.kind == "c":
        raise Prune2OnnxError(
            f"{where}: x has shape {list(x.shape)} and dtype {x.dtype}, expected real numbers with "
            "at least one axis"
        )
    scale = np.float32(PIXEL if x.dtype == np.uint8 else 1)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32) * scale
    if not np.isfinite(x).all():
        raise Prune2OnnxError(f"{where}: x holds NaN or infinity, expected finite float32")
    try:
        y = operator.index(item[1])
    except TypeError as error:
        raise Prune2OnnxError(
            f"{where}: label {item[1]!r} is a {type(item[1]).__name__}, expected an integer from 0"
        ) from error
    return x, np.int64(y)
