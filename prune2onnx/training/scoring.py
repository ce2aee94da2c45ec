"""Runs a network on examples: batches in a seeded order, its error on a split, a first check.

Knows models and datasets, but not pruning, nor the training loop, which is in `loop`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from prune2onnx.data import Data, MapDataset, batches, collate
from prune2onnx.errors import Prune2OnnxError


class Order(Sampler[list[int]]):
    """Batches of indices for one process: a seeded shuffle, which all processes split alike."""

    def __init__(self, examples: int, batch_size: int, rank: int, processes: int) -> None:
        self.examples = examples
        self.batch_size = min(batch_size, examples // processes * processes)
        self.rank, self.processes = rank, processes
        self.seed = 0

    def __len__(self) -> int:
        return self.examples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.examples, generator=generator)
        part = self.batch_size // self.processes
        for batch in order[: len(self) * self.batch_size].view(-1, self.processes, part):
            yield batch[self.rank].tolist()


def loader(data: MapDataset, order: Iterable[list[int]]) -> DataLoader[Any]:
    """Batches of a dataset as tensors, in the given order."""
    return DataLoader(data, batch_sampler=order, collate_fn=collate)  # type: ignore[arg-type]


def evaluate(
    model: nn.Module,
    data: MapDataset,
    accelerator: Accelerator | None = None,
    *,
    batch_size: int = 256,
) -> tuple[float, float]:
    """Classification error and cross entropy of a model in evaluation mode.

    Args:
        model: maps [n, ...] inputs to [n, classes] scores.
        data: a split of `Data`.
        accelerator: splits the work among its processes; None: only this process.
        batch_size: examples at a time.

    Returns:
        (error in percent, mean cross entropy).
    """
    processes = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    device = accelerator.device if accelerator else next(model.parameters()).device
    size = len(data)
    mine = range(rank, size, processes)
    batches = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    totals = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for x, y in loader(data, batches):
            scores = model(x.to(device)).float().cpu()
            totals[0] += (scores.argmax(1) != y).sum()
            totals[1] += nn.functional.cross_entropy(scores, y, reduction="sum")
    model.train(was_training)
    if accelerator and processes > 1:
        totals = accelerator.reduce(totals.to(device), "sum").cpu()
    return 100 * float(totals[0]) / size, float(totals[1]) / size


def check_output(
    model: nn.Module,
    data: Data,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> None:
    """Runs one small batch, so that a model that does not fit the data fails at once.

    Raises:
        Prune2OnnxError: the model fails, or does not return a score for each class.
    """
    x = torch.zeros(2, *data.input_shape, device=device)
    was_training = model.training
    try:
        with torch.no_grad():
            scores = model.eval()(x)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise Prune2OnnxError(
            f"the model fails on an input of shape {list(x.shape)} from {data.name}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    finally:
        model.train(was_training)
    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < data.classes:
        raise Prune2OnnxError(
            f"the model returns {shape} for an input of shape {list(x.shape)}, expected scores "
            f"[2, {data.classes}]: one for each class of {data.name}"
        )


def scores_of(model: nn.Module, data: MapDataset, size: int) -> NDArray[np.float32]:
    """Outputs of a model for all examples of a split, [n, classes], `size` at a time."""
    with torch.no_grad():
        parts = [model(torch.from_numpy(x)).float().numpy() for x, _ in batches(data, size)]
    return np.concatenate(parts)
