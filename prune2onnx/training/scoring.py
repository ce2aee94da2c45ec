"""Runs a network on examples: batches in a seeded order, its metrics on a split, a first check.

Knows models, datasets and tasks, but not pruning, nor the training loop, which is in `loop`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from prune2onnx.data import Data, MapDataset, batches, collate
from prune2onnx.errors import Prune2OnnxError, PruningWarning, one_line
from prune2onnx.tasks.metrics import batch_sums, final
from prune2onnx.tasks.structure import described, mapped, stacked
from prune2onnx.tasks.task import CLASSIFICATION, Task, misfit
from prune2onnx.training.model import on_device, outputs_of

_MOST_TARGETS = 4096


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
    task: Task = CLASSIFICATION,
    batch_size: int = 256,
) -> tuple[float, float]:
    """The metric and the loss of a model in evaluation mode: of a classifier, error in percent.

    Args:
        model: takes the data's inputs.
        data: a split of `Data`.
        accelerator: splits the work among its processes; None: only this process.
        task: says how the model is judged.
        batch_size: examples at a time.

    Returns:
        (the task's first metric, mean loss): for classification, error in percent and cross
        entropy.
    """
    metrics, loss = evaluated(model, data, task, accelerator, batch_size=batch_size)
    return next(iter(metrics.values())), loss


def evaluated(
    model: nn.Module,
    data: MapDataset,
    task: Task,
    accelerator: Accelerator | None = None,
    *,
    batch_size: int = 256,
    dense: nn.Module | None = None,
) -> tuple[dict[str, float], float]:
    """All metrics of a model, by name, and its mean loss.

    Args:
        model: as for `evaluate`, like the other arguments.
        data: a split.
        task: says how the model is judged.
        accelerator: splits the work.
        batch_size: examples at a time.
        dense: the network whose outputs are the targets, in a task that has no others.

    Raises:
        Prune2OnnxError: a metric fails or is not finite, or a task without targets has no `dense`.
    """
    processes = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    device = accelerator.device if accelerator else next(model.parameters()).device
    mine = range(rank, len(data), processes)
    parts = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    loss = 0.0
    sums: list[NDArray[np.float64]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for part, (x, y) in zip(parts, loader(data, parts), strict=True):
            x = on_device(x, device)
            outputs = mapped(_on_cpu, outputs_of(model, x))
            if task.targets == "outputs":
                y = mapped(_on_cpu, outputs_of(_required(dense, task), x))
            loss += float(task.loss(outputs, y)) * len(part)
            given = mapped(Tensor.numpy, outputs), mapped(Tensor.numpy, y)
            batch = [batch_sums(metric, *given) for metric in task.metrics]
            sums = [a + b for a, b in zip(sums, batch, strict=True)] if sums else batch
    model.train(was_training)
    totals = [torch.tensor([loss], dtype=torch.float64), *map(torch.from_numpy, sums)]
    if accelerator and processes > 1:
        totals = [accelerator.reduce(total.to(device), "sum").cpu() for total in totals]
    names = [metric.name for metric in task.metrics]
    values = (
        final(metric, total.numpy(), "the validation split")
        for metric, total in zip(task.metrics, totals[1:], strict=True)
    )
    return dict(zip(names, values, strict=True)), float(totals[0]) / len(data)


def _on_cpu(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu()


def _required(dense: nn.Module | None, task: Task) -> nn.Module:
    if dense is None:
        raise Prune2OnnxError(
            f"task {task.name} has no targets but the outputs of a trained network, expected one; "
            "give --weights, and no --start dense"
        )
    return dense


def example_inputs(data: Data) -> Any:
    """The inputs of a batch of two: zeros, or the first examples where those may not be valid."""
    if isinstance(data.input_shape, tuple) and data.input_dtype == "float32":
        return torch.zeros(2, *data.input_shape)
    return next(iter(loader(data.train, [[0, min(1, len(data.train) - 1)]])))[0]


def deviation(data: Data, task: Task) -> float:
    """The standard deviation of the training targets, where a task's loss depends on it; else 0.

    Of each column of targets [n, ...], then their root mean square; of a large split, of a part.
    """
    if not task.power:
        return 0.0
    count = min(len(data.train), _MOST_TARGETS)
    chosen = np.linspace(0, len(data.train) - 1, count).round().astype(int).tolist()
    parts = [chosen[at : at + 64] for at in range(0, count, 64)]
    targets = np.concatenate(
        [y.double().reshape(len(y), -1).numpy() for _, y in loader(data.train, parts)]
    )
    return float(np.sqrt(targets.var(0).mean()))


def check_output(
    model: nn.Module,
    data: Data,
    task: Task = CLASSIFICATION,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> None:
    """Runs one small batch, so that a model that does not fit the data or the task fails at once.

    Raises:
        Prune2OnnxError: the model fails, or its output is not what the task needs, such as a score
            for each class.
    """
    x = on_device(example_inputs(data), device)
    was_training = model.training
    try:
        with torch.no_grad():
            outputs = outputs_of(model.eval(), x)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise Prune2OnnxError(
            f"the model fails on an input of {_shown(x)} from {data.name}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    finally:
        model.train(was_training)
    first = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
    if not isinstance(first, Tensor):
        raise Prune2OnnxError(
            f"the model returns no tensor for an input of {_shown(x)}, expected one; return the "
            "tensors that the loss needs"
        )
    if task.targets == "outputs":
        return
    y = next(iter(loader(data.train, [[0, min(1, len(data.train) - 1)]])))[1]
    if task.targets == "any":
        _check_own(task, outputs, on_device(y, device))
        return
    made, wanted = tuple(first.shape), tuple(y.shape)
    if (expected := misfit(task.targets, made, wanted, data.classes)) is not None:
        raise Prune2OnnxError(
            f"the model returns {list(made)} for an input of {_shown(x)}, expected {expected} of "
            f"{data.name}"
        )


_SATURATING = {"Sigmoid": "a sigmoid", "Tanh": "a tanh", "Softmax": "a softmax"}
_PASSING = re.compile(
    "(Add|Alias|Clone|Div|Expand|Mul|Permute|ReshapeAlias|Select|Slice|Squeeze|Sub|T|ToCopy"
    "|Transpose|UnsafeView|Unsqueeze|View)Backward"
)
"""Steps of the backward pass after which the outputs are as saturated as before."""


def warn_of_saturation(
    model: nn.Module, data: Data, device: torch.device, stacklevel: int = 1
) -> None:
    """Warns if a model's outputs come from a function that has no gradient where it is at its end.

    Weights behind it seem to be those that nothing depends on, and are pruned first.
    """
    was_training = model.training
    with torch.enable_grad():
        outputs = outputs_of(model.eval(), on_device(example_inputs(data), device))
    model.train(was_training)
    step: Any = (outputs[0] if isinstance(outputs, tuple) else outputs).grad_fn
    while step is not None and _PASSING.match(step.name()):
        before = [one for one, _ in step.next_functions if one is not None]
        step = before[0] if len(before) == 1 else None
    name = "" if step is None else step.name().partition("Backward")[0]
    if name in _SATURATING:
        warnings.warn(
            f"{type(model).__name__}: its outputs come from {_SATURATING[name]}; near its limits "
            "weights have no gradient, and those that matter may be pruned: return what is before "
            "it, with a loss that fits, and apply it where the file is used",
            PruningWarning,
            stacklevel=stacklevel + 1,
        )


def _check_own(task: Task, outputs: Any, targets: Any) -> None:
    """Tries a user's loss and metrics on a small batch."""
    try:
        loss = task.loss(outputs, targets)
    except Exception as error:  # whatever the user's function raises
        raise Prune2OnnxError(
            f"task {task.name}: its loss fails on outputs {described(outputs)} and targets "
            f"{described(targets)}: {type(error).__name__}: {one_line(error)[:300]}"
        ) from error
    if not isinstance(loss, Tensor) or loss.ndim:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise Prune2OnnxError(
            f"task {task.name}: its loss returns {shape}, expected a scalar tensor: the mean over "
            "the batch"
        )
    given = (mapped(lambda t: _on_cpu(t).numpy(), value) for value in (outputs, targets))
    made, wanted = given
    for metric in task.metrics:
        batch_sums(metric, made, wanted)


def _shown(x: Any) -> str:
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else described(x)


def outputs_on(model: nn.Module, data: MapDataset, size: int) -> Any:
    """Outputs of a model for all examples of a split, `size` at a time: [n, ...], or a tuple."""
    parts = []
    with torch.no_grad():
        for x, _ in batches(data, size):
            outputs = outputs_of(model, mapped(torch.from_numpy, x))
            parts.append(mapped(lambda t: _on_cpu(t).numpy(), outputs))
    return stacked(parts, np.concatenate)
