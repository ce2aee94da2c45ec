"""The training loop of one fit.

Everything random in an epoch comes from (seed, phase, epoch), and learning rates are functions of
the step. So a checkpoint holds only weights, optimizer state and the pressure's state, and a
resumed run ends in the same bytes. What a phase does to a model before and after is in `phases`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn

from prune2onnx.data import Data
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.pruning import (
    channel_thresholds_of,
    deep_copy,
    pressed,
    thresholds_of,
)
from prune2onnx.runs.history import Callbacks, Epoch, Step
from prune2onnx.runs.recipe import Recipe
from prune2onnx.tasks.metrics import CLASS_ERROR
from prune2onnx.tasks.structure import described, leaves
from prune2onnx.tasks.task import CLASSIFICATION, Task
from prune2onnx.training.augment import augment
from prune2onnx.training.checkpoint import Checkpoints
from prune2onnx.training.compression.course import Course, State, one_cycle, steady, step_with_clamp
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.distill import Teacher
from prune2onnx.training.levels import scales_of
from prune2onnx.training.model import on_device, outputs_of
from prune2onnx.training.scoring import Order, evaluated, example_inputs, loader

_STREAMS = {"dense": 0, "channels": 4, "prune": 1, "tune": 2, "quantize": 3}  # of random numbers

_SENSITIVITY_BATCHES = 64
_MOST_NOISE = 0.5  # points of error
_LOOK_EVERY = 16  # steps between reads of density and losses, each of which waits for the GPU

AfterEpoch = Callable[[nn.Module, float], None]
"""Called between two epochs with the model and the fraction of the phase that is over, 0-1."""


@dataclass(eq=False)
class Run:
    """One fit: its settings, its state, and the loop that trains its phases.

    Attributes:
        data: examples.
        recipe: the settings, epochs filled in.
        accelerator: devices and processes.
        checkpoints: saves and loads them.
        callbacks: called during training.
        deployment: measures the file; None if there is none.
        course: what phases work with, and pass on.
        teacher: the dense network to learn from and to compare with, after the dense phase.
        task: loss and metrics.
        dense_value: the task's metric of that network, on the validation split.
    """

    data: Data
    recipe: Recipe
    accelerator: Accelerator
    checkpoints: Checkpoints
    callbacks: Callbacks
    deployment: Deployment | None
    course: Course = field(init=False)
    task: Task = CLASSIFICATION
    teacher: Teacher | None = None
    dense_value: float = math.nan

    def __post_init__(self) -> None:
        self.course = Course(
            self.recipe,
            self.deployment,
            self.accelerator.device,
            steps_of=lambda phase: self._epochs(phase) * len(self.order(phase, 0)),
            example=self.example,
            error=self.error,
            slack=lambda: self.recipe.quantize.slack * self.task.metric.point(self.dense_value),
            drop=lambda model: self.task.metric.drop(self.dense_value, self.value(model)),
            noise=self.noise,
            sensitivity=self.sensitivity,
            copied=self.copied,
        )

    @property
    def state(self) -> State:
        """What phases pass on."""
        return self.course.state

    def _epochs(self, phase: str) -> int:
        settings: Any = self.recipe.phase(phase)
        return int(settings.epochs)

    # -- for phases -----------------------------------------------------------------------------

    def set_teacher(self, dense: nn.Module) -> None:
        """Sets the dense network to learn from and to compare with."""
        self.teacher = Teacher(dense, self.recipe, self.task)
        self.dense_value = self.value(self.teacher.model)
        pruned = self.recipe.first_phase == "tune" and self.recipe.teacher is None
        if self.recipe.distill is None and self.task is CLASSIFICATION and not pruned:
            # as far as it can be trusted: one that was hardly trained has less to say than labels
            self.teacher.weight = 1 - self.dense_value / 100

    def error(self, model: nn.Module) -> float:
        """The task's metric on the validation split, with the sign that makes less of it better."""
        return self.task.metric.badness(self.value(model))

    def value(self, model: nn.Module) -> float:
        """The task's metric on the validation split: for classification, percent of errors."""
        return next(iter(self._evaluate(model)[0].values()))

    def noise(self) -> float:
        """One standard error of the dense network's metric on the validation split.

        Of a rate of errors, and at most half a point: few examples are no reason to lose accuracy.
        Of another metric, whose spread is not known, its small tolerance.
        """
        if self.task.metric != CLASS_ERROR.quantity:
            return self.task.metric.point(self.dense_value)
        examples = len(self.data.validation)
        rate = max(self.dense_value / 100, 1 / examples)  # as no error seen does not mean none
        return min(_MOST_NOISE, 100 * math.sqrt(rate * (1 - rate) / examples))

    def example(self) -> Any:
        """The inputs of a batch of two."""
        return on_device(example_inputs(self.data), self.accelerator.device)

    def order(self, phase: str, epoch: int) -> Order:
        """The batches of an epoch, for this process."""
        order = Order(
            len(self.data.train),
            self.recipe.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        entropy = [self.recipe.seed, _STREAMS[phase], epoch]
        drawn = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        order.seed = int(drawn >> np.uint64(1))
        return order

    def loss(self, model: nn.Module, x: Any, y: Any) -> Tensor:
        """Mean loss of a batch, by its targets and by the dense network's outputs."""
        device = self.accelerator.device
        x, y = on_device(x, device), on_device(y, device)
        outputs = outputs_of(model, x)
        if self.teacher is None:
            return self.task.loss(outputs, y)
        with self.accelerator.autocast():  # the model has its own, the teacher does not
            return self.teacher.loss(x, y, outputs)

    def trial_step(self, model: nn.Module) -> Callable[[], None]:
        """A forward and a backward pass on a batch, with a copy of the model, to be timed."""
        trial = self.copied(model).train()
        inputs, _ = next(iter(loader(self.data.train, [next(iter(self.order("dense", 0)))])))
        x = on_device(inputs, self.accelerator.device)

        def step() -> None:
            trial.zero_grad()
            with self.accelerator.autocast():
                outputs = outputs_of(trial, x)
            loss = sum(one.float().square().mean() for one in leaves(outputs))
            loss.backward()

        return step

    def sensitivity(self, model: nn.Module) -> dict[str, Tensor]:
        """Mean squared gradients over some batches: the empirical Fisher information's diagonal."""
        found = {name: torch.zeros_like(model.get_parameter(name)) for name in self.state.pruned}
        for batches, (x, y) in enumerate(loader(self.data.train, self.order("quantize", 0))):
            if batches == _SENSITIVITY_BATCHES:
                break
            model.zero_grad()
            self.loss(model, x, y).backward()  # type: ignore[no-untyped-call]
            for name, summed in found.items():
                gradient = model.get_parameter(name).grad
                if gradient is not None:
                    summed += gradient.square()
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, "sum")
        return found

    def copied(self, model: nn.Module) -> nn.Module:
        """A copy without mixed precision, whose parametrizations may be removed."""
        copied: nn.Module = self.accelerator.unwrap_model(deep_copy(model), keep_fp32_wrapper=False)
        return copied

    def facts(self) -> dict[str, Any]:
        """The state, for a checkpoint; nothing is copied, as `asdict` would the whole history."""
        pressure = self.course.pressure
        return vars(self.state) | {
            "history": [vars(epoch) for epoch in self.state.history],
            "pressure": pressure and pressure.state(),
        }

    def restore(self, facts: dict[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        self.course.state = State(
            facts["goal"],
            tuple(facts["pruned"]),
            facts["size"],
            tuple(facts["frozen"]),
            dict(facts["steps"]),
            [Epoch(**epoch) for epoch in facts["history"]],
        )
        if self.course.pressure and facts["pressure"]:
            self.course.pressure.restore(facts["pressure"])

    # -- the loop -------------------------------------------------------------------------------

    @property
    def _is_plain(self) -> bool:
        """Whether steps need nothing of accelerate: it looks for optional packages in each."""
        accelerator = self.accelerator
        return accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None

    def train(self, phase: str, model: nn.Module, after_epoch: AfterEpoch) -> None:
        """Trains a model for a phase, from its last checkpoint on."""
        settings: Any = self.recipe.phase(phase)
        accelerator, epochs = self.accelerator, settings.epochs
        optimizer = _optimizer(model, settings)
        running = self.checkpoints.load_running(phase, model, optimizer)
        if running is not None:
            self.restore(running)
        first = 1 if running is None else running["epoch"] + 1
        wrapped, prepared = accelerator.prepare(model, optimizer)
        if not self._is_plain:
            optimizer = prepared
        for epoch in range(first, epochs + 1):
            began = time.perf_counter()
            loss, added = self._epoch(phase, epoch, epochs, wrapped, model, optimizer)
            self._sync_buffers(model)
            after_epoch(model, epoch / epochs)
            metrics, validation_loss = self._evaluate(model)
            if not math.isfinite(validation_loss):
                raise Prune2OnnxError(
                    f"the validation loss became {validation_loss} after phase {phase}, epoch "
                    f"{epoch}; start again with a lower --{phase}-lr"
                )
            left, layers = self.course.density(model), self.course.layers(model)
            seconds = time.perf_counter() - began
            error = metrics.get(CLASS_ERROR.name) if self.task is CLASSIFICATION else None
            record = Epoch(
                phase,
                epoch,
                epochs,
                loss,
                left,
                error,
                validation_loss,
                seconds,
                *layers,
                metrics,
                penalty=added,
            )
            self.state.history.append(record)
            self.checkpoints.save_running(phase, epoch, model, optimizer, self.facts)
            if accelerator.is_main_process:
                self.callbacks.on_epoch(record)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        # else accelerate would consider it prepared in the next phase, without mixed precision
        vars(model).pop("_is_accelerate_prepared", None)
        accelerator.free_memory()

    def _epoch(
        self,
        phase: str,
        epoch: int,
        epochs: int,
        wrapped: nn.Module,
        model: nn.Module,
        optimizer: Any,
    ) -> tuple[float, float]:
        """Trains for an epoch; returns the mean loss of its steps, and the mean penalty."""
        order = self.order(phase, epoch)
        # each process has other examples, and draws for them other masks and crops
        own = order.seed + self.accelerator.process_index
        torch.manual_seed(own)  # dropout
        random.seed(own)  # these two: a user's dataset may draw from them
        np.random.seed(own % 2**32)
        drawing = torch.Generator().manual_seed(own)
        steps = len(order)
        losses: list[Tensor] = []
        total = np.zeros(2)  # of losses, and of penalties
        left = self.course.density(model)
        wrapped.train()
        if phase != "dense":  # a pruned network overfits less
            disable_dropout(model)
        for step, (x, y) in enumerate(loader(self.data.train, order), 1):
            progress = (epoch - 1 + (step - 1) / steps) / epochs
            for group in optimizer.param_groups:
                rate = steady if group.get("steady") else one_cycle
                group["lr"] = group["peak"] * rate(progress)
            x = augment(x, self.recipe.augment, drawing)
            try:
                loss = self.loss(wrapped, x, y)
            except (RuntimeError, ValueError) as error:  # out of memory, BatchNorm of one example
                raise Prune2OnnxError(
                    f"the model fails in phase {phase}, epoch {epoch}, step {step}, on a batch of "
                    f"{described(x)}: {one_line(error)[:300]}"
                ) from error
            losses.append(self._step(model, optimizer, loss, progress, step))
            if step % _LOOK_EVERY == 0 or step == steps:
                total += _sum(losses, phase, epoch, step)
                if self.course.pressure:
                    left = self.course.density(model)
                if self.accelerator.is_main_process:
                    loss_now, added = (total / step).tolist()
                    now = Step(phase, epoch, epochs, step, steps, loss_now, left, added)
                    self.callbacks.on_step(now)
                losses.clear()
        mean_loss, mean_penalty = (total / steps).tolist()
        return mean_loss, mean_penalty

    def _step(
        self, model: nn.Module, optimizer: Any, loss: Tensor, progress: float, step: int
    ) -> Tensor:
        """One step on the loss and the penalty; returns [2], the two."""
        course, pressure = self.course, self.course.pressure
        added = torch.zeros_like(loss)
        optimizer.zero_grad()
        if self._is_plain:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.accelerator.backward(loss)
        if pressure:
            course.weigh(model, step - 1)
            found = pressed(model)
            above = pressure.above(found.alive, progress)
            factor = pressure.factor(above)
            added = factor * found.penalty
            scaler = self.accelerator.scaler
            found.add(factor if scaler is None else scaler.scale(factor))
            steadily = [group for group in optimizer.param_groups if group.get("steady")]
            thresholds = [p for group in steadily for p in group["params"]]
            step_with_clamp(optimizer, thresholds, above)
        else:
            optimizer.step()
        return torch.stack([loss.detach(), added.detach().to(loss.dtype)])

    def _evaluate(self, model: nn.Module) -> tuple[dict[str, float], float]:
        """The task's metrics, by name, and its loss, on the validation split."""
        return evaluated(
            model,
            self.data.validation,
            self.task,
            self.accelerator,
            # without gradients twice the batch takes less memory than a training step
            batch_size=2 * self.recipe.batch_size,
            dense=None if self.teacher is None else self.teacher.model,
        )

    def _sync_buffers(self, model: nn.Module) -> None:
        """Copies the main process's buffers to all others, whose BatchNorm statistics differ."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)


def _optimizer(model: nn.Module, settings: Any) -> Any:
    """AdamW on weights, thresholds and scales, each with its own learning rate."""
    channels = channel_thresholds_of(model)
    thresholds = [channels.rho] if channels else thresholds_of(model)
    scales = scales_of(model)
    known = {id(p) for p in (*thresholds, *scales)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    decay = getattr(settings, "weight_decay", 0.0)
    # decay is for what multiplies: on a bias, or the scale of a norm, it only moves outputs
    matrices = [p for p in others if p.ndim > 1 or not decay]
    vectors = [p for p in others if p.ndim < 2 and decay]
    groups: list[dict[str, Any]] = [
        {"params": params, "peak": settings.lr, "weight_decay": rate}
        for params, rate in ((matrices, decay), (vectors, 0.0))
        if params
    ]
    if thresholds:
        groups.append({"params": thresholds, "peak": settings.threshold_lr, "steady": True})
    if scales:
        groups.append({"params": scales, "peak": settings.scale_lr})
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0, fused=True)


def _sum(losses: list[Tensor], phase: str, epoch: int, step: int) -> NDArray[np.float64]:
    """Sums of the latest losses, each [2]; waits for the device once instead of once per step."""
    values = torch.stack(losses).cpu().double()
    bad = (~torch.isfinite(values)).any(1).nonzero()
    if len(bad):
        where = step - len(losses) + 1 + int(bad[0])
        value = float(values[bad[0, 0]].sum())
        raise Prune2OnnxError(
            f"the loss became {value} in phase {phase}, epoch {epoch}, "
            f"step {where}; lower --{phase}-lr, or check the data for extreme values"
        )
    return values.sum(0).numpy()


def disable_dropout(model: nn.Module) -> None:
    """Sets Dropout layers, and no others, to evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
