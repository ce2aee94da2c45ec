"""One training loop for CPU, GPU and many processes: `fit` and its four phases.

dense (ordinary training) -> prune (weights and thresholds together, lambda ramped up) -> tune
(fixed masks) -> share (codebooks). Everything random in an epoch comes from (seed, phase, epoch),
and learning rates are functions of the step, so a checkpoint is no more than weights and optimiser
state, and a continued run ends in the same bytes. Needs no file unless asked for checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from prune2onnx.checkpoint import Checkpoints, plain_state
from prune2onnx.data import Data, collate
from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.fold import fold_batch_norm
from prune2onnx.pruning import (
    bake,
    density,
    hold_zeros,
    penalty,
    prunable_weights,
    prune,
    selected_weights,
    survivors,
    thresholds_of,
)
from prune2onnx.recipe import Recipe
from prune2onnx.sharing import bake_codebooks, coarsen, share

PHASES = ("dense", "prune", "tune", "share")

# Where the recipe gives no epochs: the steps a phase takes, and the fewest epochs.
_DEFAULT_STEPS = {"dense": 1500, "prune": 4000, "tune": 1500, "share": 800}
_FEWEST_EPOCHS = {"dense": 5, "prune": 10, "tune": 3, "share": 2}

_WARM_UP = 0.1  # part of a phase over which the learning rate rises
_LOOK_EVERY = 16  # steps between looks at density and losses, each a wait for the GPU


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        phase: one of `PHASES`.
        epoch: 1 to `epochs`.
        epochs: of this phase.
        loss: mean training loss, penalty included.
        density: survivors over elements of the pruned weights, 0-1.
        validation_error: percent of the validation split.
        validation_loss: mean cross entropy there.
        seconds: wall-clock time, evaluation included.
    """

    phase: str
    epoch: int
    epochs: int
    loss: float
    density: float
    validation_error: float
    validation_loss: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """Where training stands, for a progress bar; losses are up to 16 steps old."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    density: float


@dataclass(frozen=True)
class Fitted:
    """The outcome of `fit`.

    Attributes:
        model: pruned, shared, in evaluation mode, on the CPU, with plain parameters.
        dense: state_dict of the network before pruning.
        pruned: names of the pruned weights.
        history: every epoch, in order.
    """

    model: nn.Module
    dense: dict[str, Tensor]
    pruned: tuple[str, ...]
    history: tuple[Epoch, ...]


def with_epochs(recipe: Recipe, examples: int) -> Recipe:
    """The recipe with every phase's epochs filled in.

    Args:
        recipe: epochs may be None there.
        examples: size of the training split; a default is a number of steps, not of epochs, so
            that a small data set is not left half trained.
    """
    steps_per_epoch = max(1, examples // recipe.batch_size)
    sections = {}
    for phase in PHASES:
        section = getattr(recipe, phase)
        epochs = section.epochs or max(
            _FEWEST_EPOCHS[phase], math.ceil(_DEFAULT_STEPS[phase] / steps_per_epoch)
        )
        sections[phase] = section.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update=sections)


class _Order(Sampler[list[int]]):
    """Batches of indices for one process: a seeded shuffle, cut alike by every process."""

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


def make_accelerator(recipe: Recipe, *, cpu: bool = False) -> Accelerator:
    """What accelerate finds: devices and processes, in the recipe's precision.

    Raises:
        Prune2OnnxError: this process already trains in another precision, or the device cannot.
    """
    # a network may hold a layer that its forward leaves out
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        return Accelerator(cpu=cpu, mixed_precision=recipe.precision, kwargs_handlers=[unused])
    except ValueError as error:
        raise Prune2OnnxError(
            f"precision {recipe.precision!r}: {one_line(error)}; "
            "choose another --precision, or start a new process"
        ) from error


def evaluate(
    model: nn.Module,
    data: Dataset[Any],
    accelerator: Accelerator | None = None,
    *,
    batch_size: int = 256,
) -> tuple[float, float]:
    """Classification error and cross entropy of a model in evaluation mode.

    Args:
        model: maps [n, ...] inputs to [n, classes] scores.
        data: a split of `Data`.
        accelerator: shares the work among its processes; None runs here alone.
        batch_size: examples at a time.

    Returns:
        (error in percent, mean cross entropy).
    """
    processes = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    device = accelerator.device if accelerator else next(model.parameters()).device
    size = len(data)  # type: ignore[arg-type]
    mine = range(rank, size, processes)
    batches = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate)
    totals = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for x, y in loader:
            scores = model(x.to(device)).float().cpu()
            totals[0] += (scores.argmax(1) != y).sum()
            totals[1] += nn.functional.cross_entropy(scores, y, reduction="sum")
    model.train(was_training)
    if accelerator and processes > 1:
        totals = accelerator.reduce(totals.to(device), "sum").cpu()
    return 100 * float(totals[0]) / size, float(totals[1]) / size


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    accelerator: Accelerator | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    start: str = "dense",
    on_step: Callable[[Step], None] = lambda _: None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Fitted:
    """Trains, prunes, tunes and shares a classifier.

    Args:
        model: maps [n, *data.input_shape] to [n, data.classes] scores; trained in place up to the
            point where folding replaces BatchNorm layers.
        data: its training split is learned from; choices look at its validation split; its test
            split is not read.
        recipe: the settings; `with_epochs` fills in epochs that are None.
        accelerator: devices, precision and processes; default: what accelerate finds, with the
            recipe's precision.
        checkpoints: folder for a checkpoint after each epoch and one for each finished phase.
        resume: continue from what is in `checkpoints`.
        start: the first phase: "dense", "prune" for a model that comes trained, "tune" for one
            that comes pruned as well (its exact zeros are the masks).
        on_step: called every few steps, on the main process.
        on_epoch: called after each epoch, on the main process.

    Returns:
        The finished model and how it came about.

    Raises:
        Prune2OnnxError: the loss became NaN or infinite (with phase, epoch and step), the model's
            output has the wrong shape, or a checkpoint does not fit the model.
    """
    accelerator = accelerator or make_accelerator(recipe)
    if recipe.batch_size % accelerator.num_processes:
        raise RecipeError(
            f"batch_size {recipe.batch_size} cannot be split among {accelerator.num_processes} "
            "processes; choose a multiple"
        )
    if accelerator.num_processes > 1 and len(data.train) < accelerator.num_processes:  # type: ignore[arg-type]
        raise RecipeError("fewer training examples than processes")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    recipe = with_epochs(recipe, len(data.train))  # type: ignore[arg-type]
    model = model.to(accelerator.device)
    check_output(model, data, accelerator.device)
    settings = f"{recipe.to_yaml()}{len(data.train)} training examples"  # type: ignore[arg-type]
    kept = Checkpoints(checkpoints, accelerator, hashlib.sha256(settings.encode()).hexdigest())
    if not resume:
        kept.forget(PHASES)
    run = _Run(data, recipe, accelerator, kept, on_step, on_epoch)
    dense = plain_state(model)
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    with _flushed_denormals():
        for phase in PHASES[PHASES.index(start) :]:
            run.phase(phase, model)
            _restore_order(model, order)
            if phase == "dense":
                dense = plain_state(model)
    model = model.cpu().eval()
    return Fitted(model, dense, run.pruned, tuple(run.history))


@contextlib.contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Pruned weights decay into denormals, on which a CPU is 40 times slower: they become zero.

    The processor's mode is put back afterwards, for it is the whole process's.
    """
    before = float(torch.tensor(1e-39) * 0.5) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def check_output(
    model: nn.Module,
    data: Data,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> None:
    """Runs one small batch, so that a model that does not fit the data says so at once.

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


class _Run:
    """The state of one `fit` that outlives a phase: history, checkpoints, the chosen settings."""

    def __init__(
        self,
        data: Data,
        recipe: Recipe,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        on_step: Callable[[Step], None],
        on_epoch: Callable[[Epoch], None],
    ) -> None:
        self.data, self.recipe, self.accelerator = data, recipe, accelerator
        self.checkpoints, self.on_step, self.on_epoch = checkpoints, on_step, on_epoch
        self.history: list[Epoch] = []
        self.pruned: tuple[str, ...] = ()
        self.size = 0  # elements of the pruned weights

    # -- phases ---------------------------------------------------------------------------------

    def phase(self, phase: str, model: nn.Module) -> None:
        """Takes the model from the end of one phase to the end of the next, in place."""
        if phase == "share":
            fold_batch_norm(
                model,
                torch.zeros(2, *self.data.input_shape, device=self.accelerator.device),
            )
        finished = self.checkpoints.load_finished(phase, model)
        if finished is not None:
            self._recall(finished)
            return
        finish = getattr(self, f"_begin_{phase}")(model)
        self._train(phase, model)
        finish()
        self.checkpoints.save_finished(phase, model, self._facts())

    def _facts(self) -> dict[str, Any]:
        history = [asdict(epoch) for epoch in self.history]
        return {"pruned": self.pruned, "size": self.size, "history": history}

    def _recall(self, facts: dict[str, Any]) -> None:
        self.pruned, self.size = tuple(facts["pruned"]), facts["size"]
        self.history = [Epoch(**epoch) for epoch in facts["history"]]

    def _begin_dense(self, model: nn.Module) -> Callable[[], object]:
        return lambda: None

    def _begin_prune(self, model: nn.Module) -> Callable[[], object]:
        chosen = self.recipe.prune
        prune(
            model,
            function=chosen.function,
            granularity=chosen.granularity,
            thresholds=chosen.thresholds,
            beta=chosen.beta,
            start=chosen.start,
            include=chosen.include,
            exclude=chosen.exclude,
            balance=chosen.balance,
            importance=chosen.importance,
        )
        layers = density(model).layers
        self.pruned = tuple(layer.name for layer in layers)
        self.size = sum(layer.size for layer in layers)
        return lambda: bake(model)

    def _begin_tune(self, model: nn.Module) -> Callable[[], object]:
        if not self.pruned:
            self._pruned_before(model)
        weights = {name: model.get_parameter(name) for name in self.pruned}
        return hold_zeros(model, {name: w.detach() != 0 for name, w in weights.items()})

    def _pruned_before(self, model: nn.Module) -> None:
        """Takes the zeros that a model came with for its masks."""
        chosen = selected_weights(model, self.recipe.prune.include, self.recipe.prune.exclude)
        layers = [layer for layer in density(model).layers if layer.name in chosen]
        if all(layer.nnz == layer.size for layer in layers):
            raise Prune2OnnxError(
                "start is 'tune', but no Linear or convolution weight has a zero; "
                "start with 'prune', or give pruned weights"
            )
        self.pruned = tuple(layer.name for layer in layers)
        self.size = sum(layer.size for layer in layers)

    def _begin_share(self, model: nn.Module) -> Callable[[], object]:
        settings = self.recipe.share

        def error() -> float:
            return self._evaluate(model)[0]

        # a weight that was excluded from pruning is left alone here, too
        kept = {*self.pruned, *prunable_weights(model)}
        others = [name for name, _ in model.named_parameters() if name not in kept]
        small, halves = coarsen(
            model, others, settings.small_levels, error, allowed=error() + settings.slack
        )
        levels = dict.fromkeys(self.pruned, settings.levels) | small
        share(model, levels, pruned=self.pruned)
        for name in halves:  # rounded, and to stay so
            model.get_parameter(name).requires_grad_(False)
        return lambda: bake_codebooks(model)

    # -- the loop -------------------------------------------------------------------------------

    def _train(self, phase: str, model: nn.Module) -> None:
        settings = getattr(self.recipe, phase)
        accelerator = self.accelerator
        thresholds = thresholds_of(model)
        known = {id(p) for p in thresholds}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": others, "peak": settings.lr}]
        if thresholds:
            groups.append({"params": thresholds, "peak": settings.threshold_lr})
        decay = settings.weight_decay if phase == "tune" else 0.0
        optimiser: Any = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=decay, fused=True)
        first = 1
        running = self.checkpoints.load_running(phase, model, optimiser)
        if running is not None:
            self._recall(running)
            first = running["epoch"] + 1
        wrapped, optimiser = accelerator.prepare(model, optimiser)
        for epoch in range(first, settings.epochs + 1):
            began = time.perf_counter()
            loss = self._epoch(phase, epoch, settings.epochs, wrapped, model, optimiser)
            self._agree(model)
            error, validation_loss = self._evaluate(model)
            if not math.isfinite(validation_loss):
                raise Prune2OnnxError(
                    f"the validation loss became {validation_loss} after phase {phase}, epoch "
                    f"{epoch}; start again with a lower --{phase}-lr"
                )
            left = self._density(phase, model)
            seconds = time.perf_counter() - began
            record = Epoch(
                phase, epoch, settings.epochs, loss, left, error, validation_loss, seconds
            )
            self.history.append(record)
            self.checkpoints.save_running(phase, epoch, model, optimiser, self._facts())
            if accelerator.is_main_process:
                self.on_epoch(record)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        accelerator.free_memory()

    def _epoch(
        self,
        phase: str,
        epoch: int,
        epochs: int,
        wrapped: nn.Module,
        model: nn.Module,
        optimiser: Any,
    ) -> float:
        accelerator = self.accelerator
        order = _Order(
            len(self.data.train),  # type: ignore[arg-type]
            self.recipe.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        order.seed = self._seed(phase, epoch)
        torch.manual_seed(order.seed)  # dropout
        random.seed(order.seed)  # these two: what a data set of the user's may draw from
        np.random.seed(order.seed % 2**32)
        loader = DataLoader(self.data.train, batch_sampler=order, collate_fn=collate)
        steps = len(order)
        losses: list[Tensor] = []
        total = 0.0
        pressing = phase == "prune"
        left = self._density(phase, model)
        wrapped.train()
        for step, (x, y) in enumerate(loader, 1):
            progress = (epoch - 1 + (step - 1) / steps) / epochs
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * _one_cycle(progress)
            try:
                scores = wrapped(x.to(accelerator.device, non_blocking=True))
            except (RuntimeError, ValueError) as error:  # out of memory, BatchNorm of one example
                raise Prune2OnnxError(
                    f"the model fails in phase {phase}, epoch {epoch}, step {step}, on a batch of "
                    f"shape {list(x.shape)}: {one_line(error)[:300]}"
                ) from error
            loss = nn.functional.cross_entropy(scores, y.to(accelerator.device, non_blocking=True))
            if pressing:
                above = survivors(model) / (self.size * self.recipe.prune.density) - 1
                loss = loss + self._lambda(progress, above) * penalty(model)
            optimiser.zero_grad()
            accelerator.backward(loss)
            if pressing:
                step_with_brake(optimiser, above)
            else:
                optimiser.step()
            losses.append(loss.detach())
            if step % _LOOK_EVERY == 0 or step == steps:
                total += self._look(losses, phase, epoch, step)
                if pressing:
                    left = self._density(phase, model)
                if accelerator.is_main_process:
                    shown = total / step
                    self.on_step(Step(phase, epoch, epochs, step, steps, shown, left))
                losses.clear()
        return total / steps

    def _lambda(self, progress: float, above: Tensor) -> Tensor:
        """Loss per surviving weight: ramped up, and let go as the density nears its goal.

        A fixed lambda has no brake: a threshold that has outrun its layer's weights runs on. The
        pressure falls to zero linearly over the last quarter above the wanted density.

        Args:
            progress: of the phase, 0-1.
            above: density / wanted density - 1.
        """
        settings = self.recipe.prune
        ramp = min(1.0, progress / settings.ramp) if settings.ramp else 1.0
        return settings.pressure * ramp * (above / 0.25).clamp(0, 1) / self.size

    def _evaluate(self, model: nn.Module) -> tuple[float, float]:
        # without gradients twice the batch takes less memory than a training step
        batch_size = 2 * self.recipe.batch_size
        data = self.data.validation
        return evaluate(model, data, self.accelerator, batch_size=batch_size)

    def _density(self, phase: str, model: nn.Module) -> float:
        """Survivors over elements of the pruned weights; 1 before there are any."""
        if phase == "prune":
            return density(model).total
        layers = density(model).layers if self.pruned else ()
        nnz = sum(layer.nnz for layer in layers if layer.name in self.pruned)
        return nnz / self.size if self.pruned else 1.0

    def _look(self, losses: list[Tensor], phase: str, epoch: int, step: int) -> float:
        """Sum of the latest losses; one wait for the device instead of one a step."""
        values = torch.stack(losses).cpu().double()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            where = step - len(losses) + 1 + int(bad[0])
            raise Prune2OnnxError(
                f"the loss became {float(values[bad[0]])} in phase {phase}, epoch {epoch}, "
                f"step {where}; lower --{phase}-lr, or check the data for extreme values"
            )
        return float(values.sum())

    def _seed(self, phase: str, epoch: int) -> int:
        entropy = [self.recipe.seed, PHASES.index(phase), epoch]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _agree(self, model: nn.Module) -> None:
        """Gives every process the main one's buffers (BatchNorm statistics are each one's own)."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)


def step_with_brake(optimiser: Any, above: Tensor) -> None:
    """An optimiser step that raises no threshold at or below the wanted density.

    Without pressure the optimiser's momentum alone would carry thresholds on for some steps.
    """
    thresholds = [p for group in optimiser.param_groups[1:] for p in group["params"]]
    before = [threshold.detach().clone() for threshold in thresholds]
    optimiser.step()
    with torch.no_grad():
        for threshold, old in zip(thresholds, before, strict=True):
            threshold.copy_(torch.where(above > 0, threshold, torch.minimum(threshold, old)))


def _restore_order(model: nn.Module, order: dict[str, int]) -> None:
    """Puts every module's parameters back in order; parametrizations leave theirs last.

    Order decides which is tried first and which stands first in the file, so it has to be that of
    a run that starts from a checkpoint.
    """
    for prefix, module in model.named_modules():
        stem = f"{prefix}." if prefix else ""
        items = sorted(
            module._parameters.items(), key=lambda item: order.get(stem + item[0], len(order))
        )
        module._parameters.clear()
        module._parameters.update(items)


def _one_cycle(progress: float) -> float:
    """Learning rate over its peak at a point of a phase (0-1): linear rise, then half a cosine."""
    if progress < _WARM_UP:
        return (progress + 0.01) / (_WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
