"""The training loop: epochs of seeded batches, schedules, checkpoints, watched losses.

Everything random in an epoch comes from (seed, phase, epoch), and learning rates are functions of
the step, so a checkpoint is no more than weights, optimiser state and the pressure's, and a
continued run ends in the same bytes. What a phase does to a model before and after is `phases`'.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prune2onnx.data import Data, collate
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.history import Epoch
from prune2onnx.pruning import (
    density,
    penalty,
    survivors,
    thresholds_of,
    weigh_by_bits,
    widths_of,
)
from prune2onnx.recipe import Recipe
from prune2onnx.training.augment import augment
from prune2onnx.training.checkpoint import Checkpoints
from prune2onnx.training.distill import Teacher
from prune2onnx.training.levels import scales_of
from prune2onnx.training.pressure import Pressure
from prune2onnx.training.scoring import Order, evaluate

PHASES = ("dense", "narrow", "prune", "tune", "share")
_STREAMS = {"dense": 0, "narrow": 4, "prune": 1, "tune": 2, "share": 3}  # of random numbers

_WEIGH_EVERY = 100  # steps between looks at what survivors take
_WARM_UP = 0.1  # part of a phase over which the learning rate rises
_LOOK_EVERY = 16  # steps between looks at density and losses, each a wait for the GPU


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


class Loop:
    """Trains a model through one phase; keeps what outlives it.

    Args:
        data: examples.
        recipe: the settings, epochs filled in.
        accelerator: devices and processes.
        checkpoints: where to keep and find them.
        on_step: called every few steps, on the main process.
        on_epoch: called after each epoch, on the main process.
    """

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
        self.silent: tuple[str, ...] = ()  # scales and biases that branches left, to stay zero
        self.goal = recipe.wanted_density  # their density, where no size is asked for
        self.teacher: Teacher | None = None
        self.dense_error = math.nan
        self.pressure: Pressure | None = None

    def meet(self, dense: nn.Module) -> None:
        """Takes the dense network as what to learn from and to compare with."""
        self.teacher = Teacher(dense, self.recipe)
        self.dense_error = self.error(self.teacher.model)

    def error(self, model: nn.Module) -> float:
        """Percent of the validation split."""
        return self._evaluate(model)[0]

    def _facts(self) -> dict[str, Any]:
        history = [asdict(epoch) for epoch in self.history]
        pressure = self.pressure and self.pressure.state()
        return {
            "pruned": self.pruned,
            "size": self.size,
            "silent": self.silent,
            "goal": self.goal,
            "history": history,
            "pressure": pressure,
        }

    def _recall(self, facts: dict[str, Any]) -> None:
        self.pruned, self.size, self.goal = tuple(facts["pruned"]), facts["size"], facts["goal"]
        self.silent = tuple(facts["silent"])
        if self.pressure and facts["pressure"]:
            self.pressure.restore(facts["pressure"])
        self.history = [Epoch(**epoch) for epoch in facts["history"]]

    def _example(self) -> Tensor:
        return torch.zeros(2, *self.data.input_shape, device=self.accelerator.device)

    def _order(self) -> Order:
        return Order(
            len(self.data.train),  # type: ignore[arg-type]
            self.recipe.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch: of its labels, and of the dense network's answers."""
        device = self.accelerator.device
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        scores = model(x)
        if self.teacher is None:
            return nn.functional.cross_entropy(scores, y)
        with self.accelerator.autocast():  # the model's own comes with it, the teacher's does not
            return self.teacher.loss(x, y, scores)

    def _after_epoch(self, phase: str, model: nn.Module, progress: float) -> None:
        """What a phase looks at between two epochs."""

    def _train(self, phase: str, model: nn.Module) -> None:
        settings: Any = self.recipe.phase(phase)
        accelerator = self.accelerator
        widths = widths_of(model)
        thresholds = [widths.rho] if widths else thresholds_of(model)
        scales = scales_of(model)
        known = {id(p) for p in (*thresholds, *scales)}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        decay = getattr(settings, "weight_decay", 0.0)
        groups = [{"params": others, "peak": settings.lr, "weight_decay": decay}]
        if thresholds:
            # what the goal still asks of them late is asked at full speed
            groups.append({"params": thresholds, "peak": settings.threshold_lr, "steady": True})
        if scales:
            groups.append({"params": scales, "peak": settings.scale_lr})
        optimiser: Any = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0, fused=True)
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
            self._after_epoch(phase, model, epoch / settings.epochs)
            error, validation_loss = self._evaluate(model)
            if not math.isfinite(validation_loss):
                raise Prune2OnnxError(
                    f"the validation loss became {validation_loss} after phase {phase}, epoch "
                    f"{epoch}; start again with a lower --{phase}-lr"
                )
            left = self._density(phase, model)
            seconds = time.perf_counter() - began
            record = Epoch(
                phase,
                epoch,
                settings.epochs,
                loss,
                left,
                error,
                validation_loss,
                seconds,
                *self._layers(model),
            )
            self.history.append(record)
            self.checkpoints.save_running(phase, epoch, model, optimiser, self._facts())
            if accelerator.is_main_process:
                self.on_epoch(record)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        # or accelerate would take it for prepared in the next phase, without mixed precision
        vars(model).pop("_is_accelerate_prepared", None)
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
        order = self._order()
        order.seed = self._seed(phase, epoch)
        torch.manual_seed(order.seed)  # dropout
        random.seed(order.seed)  # these two: what a data set of the user's may draw from
        np.random.seed(order.seed % 2**32)
        loader = DataLoader(self.data.train, batch_sampler=order, collate_fn=collate)
        drawing = torch.Generator().manual_seed(order.seed + accelerator.process_index)
        steps = len(order)
        losses: list[Tensor] = []
        total = 0.0
        pressure = self.pressure
        left = self._density(phase, model)
        wrapped.train()
        if phase != "dense":  # a pruned network overfits less
            rest_dropout(model)
        for step, (x, y) in enumerate(loader, 1):
            progress = (epoch - 1 + (step - 1) / steps) / epochs
            for group in optimiser.param_groups:
                falls = not group.get("steady") or progress < _WARM_UP
                group["lr"] = group["peak"] * (one_cycle(progress) if falls else 1.0)
            x = augment(x, self.recipe.augment, drawing)
            try:
                loss = self._loss(wrapped, x, y)
            except (RuntimeError, ValueError) as error:  # out of memory, BatchNorm of one example
                raise Prune2OnnxError(
                    f"the model fails in phase {phase}, epoch {epoch}, step {step}, on a batch of "
                    f"shape {list(x.shape)}: {one_line(error)[:300]}"
                ) from error
            if pressure:
                if pressure.settings.weigh == "bytes" and (step - 1) % _WEIGH_EVERY == 0:
                    weigh_by_bits(model)
                widths = widths_of(model)
                above = pressure.above(widths.left() if widths else survivors(model), progress)
                pressed = widths.penalty() if widths else penalty(model)
                loss = loss + pressure.factor(above) * pressed
            optimiser.zero_grad()
            accelerator.backward(loss)
            if pressure:
                step_with_brake(optimiser, above)
            else:
                optimiser.step()
            losses.append(loss.detach())
            if step % _LOOK_EVERY == 0 or step == steps:
                total += self._look(losses, phase, epoch, step)
                if pressure:
                    left = self._density(phase, model)
                if accelerator.is_main_process:
                    shown = total / step
                    self.on_step(Step(phase, epoch, epochs, step, steps, shown, left))
                losses.clear()
        return total / steps

    def _evaluate(self, model: nn.Module) -> tuple[float, float]:
        # without gradients twice the batch takes less memory than a training step
        batch_size = 2 * self.recipe.batch_size
        data = self.data.validation
        return evaluate(model, data, self.accelerator, batch_size=batch_size)

    def _density(self, phase: str, model: nn.Module) -> float:
        """Survivors over elements of the pruned weights; 1 before there are any.

        While channels go: what is left of their cost.
        """
        if (widths := widths_of(model)) is not None:
            return float(widths.left())
        if self.pressure is not None:
            return density(model).total
        layers = density(model).layers if self.pruned else ()
        nnz = sum(layer.nnz for layer in layers if layer.name in self.pruned)
        return nnz / self.size if self.pruned else 1.0

    def _layers(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        """Density of each pruned weight, and its threshold where it has a learned one."""
        if (widths := widths_of(model)) is not None:
            return widths.densities(), widths.thresholds()
        layers = [layer for layer in density(model).layers if layer.name in self.pruned]
        densities = {layer.name: layer.density for layer in layers}
        return densities, {x.name: x.threshold for x in layers if x.threshold is not None}

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
        entropy = [self.recipe.seed, _STREAMS[phase], epoch]
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


def rest_dropout(model: nn.Module) -> None:
    """Puts Dropout layers into evaluation mode, whatever the rest of the model is in."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def one_cycle(progress: float) -> float:
    """Learning rate over its peak at a point of a phase (0-1): linear rise, then half a cosine."""
    if progress < _WARM_UP:
        return (progress + 0.01) / (_WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
