"""Examples with labels, as training sees them: `Arrays` in memory, `Wrapped` around a user's own.

Both give (float32 x, int64 y). `arrays` and `wrap` make them from what a source has read, and
check it; where the files are and how they are read is in the files beside this one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from prune2onnx.errors import Prune2OnnxError

Example: TypeAlias = tuple[Tensor, Tensor]
Indices: TypeAlias = NDArray[np.int64]

PIXEL = 1 / 255  # uint8 is taken for pixels wherever it comes from: 0 ... 255 becomes 0 ... 1


@dataclass(frozen=True)
class Data:
    """Three sets of examples of one classification task.

    Attributes:
        name: what a report calls it.
        train: map-style dataset of (float32 x of `input_shape`, int64 y); weights learn from it.
        validation: the same form, held out of training; every choice is made on it.
        test: the same form; read once, for the report.
        input_shape: shape of one x, without the batch: `[channels, height, width]` for images.
        classes: number of classes; labels are 0 ... classes - 1.
    """

    name: str
    train: Dataset[Example]
    validation: Dataset[Example]
    test: Dataset[Example]
    input_shape: tuple[int, ...]
    classes: int


class Arrays(Dataset[Example]):
    """Examples held in memory, batched by one indexing.

    Attributes:
        x: uint8 or float32 `[n, *shape]`, as stored.
        y: int64 `[n]`.
        scale: what x is multiplied by on access.
    """

    def __init__(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        self.x, self.y, self.scale = x, y, scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one x."""
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Example:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> Example:
        """Gives a batch: float32 `[batch, *shape]` and int64 `[batch]`; needs `collate`."""
        # In numpy: torch wakes its thread pool for such a batch, and where other programs keep the
        # cores busy that was measured to cost a hundred times the copying.
        x, y = self.x.numpy().take(indices, axis=0), self.y.numpy().take(indices)
        if self.scale != 1.0:
            x = np.multiply(x, np.float32(self.scale), dtype=np.float32)
        return torch.from_numpy(x.astype(np.float32, copy=False)), torch.from_numpy(y)

    def subset(self, indices: Indices) -> Arrays:
        """A copy of the examples at `indices`."""
        chosen = torch.from_numpy(indices)
        return Arrays(self.x[chosen], self.y[chosen], self.scale)


class Wrapped(Dataset[Example]):
    """Some of the examples of a user's dataset, with types made sure of and labels known.

    Attributes:
        dataset: the user's map-style dataset of (x, y).
        y: int64 `[n]`, the labels of the examples chosen.
        shape: shape of one x.
        indices: `[n]`, which of the user's examples these are.
    """

    def __init__(
        self, dataset: Any, y: Tensor, shape: tuple[int, ...], indices: Indices, where: str
    ) -> None:
        self.dataset, self.y, self.shape = dataset, y, shape
        self.indices, self.where = indices, where

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return _converted(self.dataset, int(self.indices[index]), self.where)

    def subset(self, indices: Indices) -> Wrapped:
        """The examples at `indices`, nothing copied."""
        y = self.y[torch.from_numpy(indices)]
        return Wrapped(self.dataset, y, self.shape, self.indices[indices], self.where)


Examples: TypeAlias = Arrays | Wrapped


def collate(batch: Any) -> Any:
    """Makes a `DataLoader`'s batch (`collate_fn`): float32 `[batch, ...]` and int64 `[batch]`.

    `Arrays` hands over batches that are ready, a tuple of two tensors; every other dataset a list
    of examples, which torch's own `default_collate` stacks.
    """
    if isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch):
        return batch
    return default_collate(batch)


def batches(
    data: Dataset[Any], size: int = 128
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """A data set as numpy batches (x [size, ...], y [size]), for onnxruntime."""
    for x, y in DataLoader(data, batch_size=size, collate_fn=collate):
        yield x.numpy(), y.numpy()


def first(data: Dataset[Any], examples: int, size: int = 64) -> list[NDArray[np.float32]]:
    """The first examples of a data set, without labels, in batches."""
    taken: list[NDArray[np.float32]] = []
    left = examples
    for x, _ in batches(data, min(size, examples)):
        taken.append(x[:left])
        left -= len(taken[-1])
        if not left:
            break
    return taken


def arrays(x: Any, y: Any, where: str, scale: float = PIXEL) -> Arrays:
    """Checks arrays or tensors of examples and labels and holds them in memory.

    Args:
        x: `[n, ...]`, numbers. uint8 is kept and multiplied by `scale` on access, and uint8
            `[n, h, w]` are grey images, `[n, 1, h, w]`; every other type becomes float32 as it is.
        y: `[n]`, integers from 0.
        where: what error messages call them.
        scale: for uint8 only.

    Raises:
        Prune2OnnxError: x is no array of numbers, has no axis beside n, or is not finite; y is
            not `[n]`, not of integers, or negative; there are no examples.
    """
    x, y = _numpy(x, f"{where}: x"), _numpy(y, f"{where}: y")
    if x.ndim < 2:
        raise Prune2OnnxError(
            f"{where}: x has shape {list(x.shape)}, expected [examples, ...] with at least one "
            "axis beside the examples; reshape it"
        )
    if x.size == 0:
        raise Prune2OnnxError(
            f"{where}: x has shape {list(x.shape)}, so it holds nothing; expected examples"
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
    if x.dtype == np.uint8:
        x = x[:, None] if x.ndim == 3 else x
    elif x.dtype.kind in "biuf":
        scale = 1.0
        with np.errstate(over="ignore"):  # too large for float32 becomes inf, caught below
            x = x.astype(np.float32)
        # The sum is finite if all of x is, save for overflow: only then look for the place.
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
    # W: torch warns about memory that it may not write to, such as a file's.
    stored = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    return Arrays(stored, _labels(y, where), scale)


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
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return arrays(*dataset.tensors, where)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise Prune2OnnxError(
            f"{where}: a {type(dataset).__name__} has no length and no order, expected a map-style "
            "dataset (__len__ and __getitem__); read it into arrays"
        )
    if len(dataset) == 0:
        raise Prune2OnnxError(f"{where}: the dataset is empty, expected examples")
    first, label = _converted(dataset, 0, where)
    targets = getattr(dataset, "targets", None)
    known = None
    if targets is not None and getattr(dataset, "target_transform", None) is None:
        known = _numpy(targets, f"{where}: targets")
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
    return Wrapped(dataset, _labels(known, where), tuple(first.shape), every, where)


def _labels(y: NDArray[Any], where: str) -> Tensor:
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
    return torch.from_numpy(y.astype(np.int64))


def _numpy(value: Any, what: str) -> NDArray[Any]:
    """An array, a tensor or nested lists as a numpy array."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    try:
        return np.asarray(value)
    except Exception as error:  # numpy raises what the value's own conversion raises
        raise Prune2OnnxError(
            f"{what} is a {type(value).__name__}, expected an array: {error}"
        ) from error


def _converted(dataset: Any, index: int, where: str) -> Example:
    """One example of a user's dataset as (float32 tensor, int64 tensor)."""
    where = f"{where}: example {index}"
    try:
        item = dataset[index]
    except Exception as error:
        raise Prune2OnnxError(
            f"{where}: reading it raised {type(error).__name__}: {error}; mend the dataset"
        ) from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise Prune2OnnxError(f"{where} is a {type(item).__name__}, expected a pair (x, y)")
    x = item[0]
    if isinstance(x, np.ndarray):
        # torch warns about memory that it may not write to and refuses negative strides.
        x = np.require(x, requirements=["C", "W"])
    try:
        x = torch.as_tensor(x)
    except Exception as error:  # torch raises TypeError, ValueError or RuntimeError here
        raise Prune2OnnxError(
            f"{where}: x is a {type(item[0]).__name__}, expected a tensor or an array; "
            "convert it in the dataset (torchvision: ToTensor)"
        ) from error
    if x.ndim == 0 or x.is_complex():
        raise Prune2OnnxError(
            f"{where}: x has shape {list(x.shape)} and dtype {x.dtype}, expected real numbers with "
            "at least one axis"
        )
    x = x.to(torch.float32) * PIXEL if x.dtype == torch.uint8 else x.to(torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise Prune2OnnxError(f"{where}: x holds NaN or infinity, expected finite float32")
    try:
        y = operator.index(item[1])
    except TypeError as error:
        raise Prune2OnnxError(
            f"{where}: label {item[1]!r} is a {type(item[1]).__name__}, expected an integer from 0"
        ) from error
    return x, torch.tensor(y, dtype=torch.int64)
