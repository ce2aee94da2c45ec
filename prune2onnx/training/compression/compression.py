"""`Compression`: pruning and quantization in a training loop of the user's own.

The phases, the pressure and the budgets are those of `fit` (`course`, `phases`, `size_budget`).
Different is what belongs to the loop: the optimizer is made once, by the user, and batches are not
seen here. So layers stay where they are, thresholds and scales have an optimizer of their own, and
the gradients of the user's steps say which weights matter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import onnx
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from prune2onnx.errors import Prune2OnnxError, PruningWarning, RecipeError
from prune2onnx.packing.pack import Packed
from prune2onnx.pruning import Learned, add_gradients, checked_weights, deep_copy, unwrapped
from prune2onnx.pruning.channel_groups import original
from prune2onnx.runs.defaults import FileOptions
from prune2onnx.runs.recipe import resolve
from prune2onnx.training.compression.course import Course, State, one_cycle, steady, step_with_clamp
from prune2onnx.training.compression.plain_names import use_plain_names
from prune2onnx.training.compression.plan import Progress, planned
from prune2onnx.training.compression.processes import (
    average,
    of_first_process,
    refuse_sharded,
    share_buffers,
)
from prune2onnx.training.compression.saved import learned_state, load_learned, unparametrize
from prune2onnx.training.denormals import denormals
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.export import DynamicShapes, ExportOptions
from prune2onnx.training.model import on_device
from prune2onnx.training.phases import FALL, IN_PLACE, RISE, warn_of_a_short_phase
from prune2onnx.training.pressure import MEASURES
from prune2onnx.training.size_budget import (
    as_numbers,
    deployed_with_scales,
    meet_budget,
    use_budget,
)

_MEMORY = 0.98  # of the squared gradients: about the last 50 steps
_SMALL_LEVELS = 127  # of biases: no data are seen here that would say how coarse they may be


class Compression:
    """Makes a network small in a training loop of the user's own.

        compression = Compression(model, example_inputs, steps=1000, target_size=20_000)
        for x, y in batches:
            loss = loss_of(model(x), y) + compression.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            compression.step()
        small, packed = compression.finish()

    Weights keep their identity, so an optimizer made before or after goes on to the end, and a
    state_dict of the network has plain names at any time. Gradient accumulation: a part of the
    penalty in each of the losses, as of everything else, and one `step` for each of the
    optimizer's. In several processes with DistributedDataParallel all come to the same zeros.

    Args:
        model: trained, or to be trained in a "dense" phase; DistributedDataParallel,
            torch.compile and the like are looked through. Changed in place.
        example_inputs: a batch of inputs, as for `export`, with which files are measured.
        steps: optimizer steps of the whole training; default: those of `phases` together.
        target_size: budget: bytes of the file.
        target_density: budget: fraction of the pruned weights, 0-1.
        target_macs: budget: fraction of the multiply-adds, 0-1; whole channels are pruned.
        max_drop: budget: how much larger `evaluate` may get. The density follows it in the prune
            phase; in the end it is measured once more.
        evaluate: gives the error of a network on validation data; less is better. For `max_drop`.
        phases: phase -> its steps, or fractions of `steps`; "dense", "channels", "prune", "tune"
            and "quantize" are known. Default: 60 % prune, 20 % tune, 20 % quantize.
        settings: other settings, by the names of a recipe: {"prune.exclude": ["head"]}.
        dynamic_shapes: open axes of the inputs, as for `export`.

    Raises:
        RecipeError: no budget, or a setting that does not fit.
        Prune2OnnxError: a network that cannot be pruned or exported.

    Warns:
        PruningWarning: the prune phase is too short for its goal.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        steps: int | None = None,
        target_size: int | None = None,
        target_density: float | None = None,
        target_macs: float | None = None,
        max_drop: float | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        phases: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        dynamic_shapes: DynamicShapes | None = None,
    ) -> None:
        budgets = (target_size, target_density, target_macs, max_drop)
        if all(budget is None for budget in budgets):
            raise RecipeError(
                "no budget; give target_size, target_density, target_macs or max_drop"
            )
        if max_drop is not None and evaluate is None:
            raise RecipeError("max_drop needs evaluate: a function that gives a model's error")
        self.model = unwrapped(model)
        refuse_sharded(self.model)
        self._plan = planned(steps, phases, channels=target_macs is not None)
        known = {
            "target_size": target_size,
            "target_density": target_density,
            "target_macs": target_macs,
            "max_drop": max_drop,
            "channels.epochs": self._plan.get("channels", 0),
            "quantize.small_levels": _SMALL_LEVELS,
        }
        recipe = resolve(
            {"model": "a loop of your own"},
            {n: value for n, value in known.items() if value is not None} | dict(settings or {}),
            "settings",
        )
        checked_weights(self.model, recipe.prune.include, recipe.prune.exclude)
        self._evaluate = evaluate if max_drop is not None else None
        self._max_drop = max_drop or 0.0
        self._deployment = Deployment(
            example_inputs,
            FileOptions(recipe.opset, recipe.anonymize, recipe.portable, recipe.file.multiple),
            graph=ExportOptions(recipe.opset, dynamic_shapes),
        )
        self.course = Course(
            recipe,
            self._deployment,
            next(self.model.parameters()).device,
            steps_of=lambda phase: self._plan[phase],
            example=lambda: on_device(example_inputs, self.course.device),
            error=lambda _: math.nan,
            slack=lambda: 0.0,
            sensitivity=self._sensitivity,
            # accelerate's mixed precision is in the network's forward
            copied=lambda one: extract_model_from_parallel(deep_copy(one), keep_fp32_wrapper=False),
            in_place=True,
        )
        deployed_with_scales(self.course, self.model)  # what cannot be exported is said now
        if "prune" in self._plan and "channels" not in self._plan and self._evaluate is None:
            warn_of_a_short_phase(self.course, self.model, stacklevel=2)
        use_plain_names(self.model)  # from now on, also after `finish`
        self._at = 0  # index of the phase
        self._step = self._done = 0  # steps within it, and in all
        self._fisher: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._above: Tensor | None = None
        self._factor = self._latest = torch.zeros((), device=self.course.device)
        self._optimizer: torch.optim.Optimizer | None = None
        self._learned: list[Tensor] = []
        self._dense_error = math.nan
        if self._evaluate is not None:
            self._dense_error = self._error()
        self._finish: Callable[[], object] = lambda: None
        self._begin()

    # -- what a loop calls ---------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """What to add to the loss; a scalar, zero in phases that prune nothing."""
        course = self.course
        if course.pressure is None:
            return torch.zeros((), device=course.device)
        if self._above is None:  # once for all of a step's losses
            course.weigh(self.model, self._step)
            self._above = course.excess(self.model, self._progress())
            self._factor = course.pressure.factor(self._above)
        added = self._factor * course.regulariser(self.model)
        self._latest = added.detach()
        return added

    def add_penalty(self) -> None:
        """Adds the penalty's gradients to those that are there, in place of adding it to the loss.

        Between the last backward pass, or the clipping of gradients, and the optimizer's step. With
        float16's loss scaling gradients have to be unscaled before.
        """
        if self.course.pressure is not None:
            add_gradients(self.penalty(), self.model, self._learned)

    def step(self) -> None:
        """After the optimizer's step, before gradients are set to zero.

        Raises:
            Prune2OnnxError: the loss had no penalty, or there are no gradients.
        """
        course, name = self.course, self.phase
        self._remember_gradients()
        if self._learned:
            if course.pressure is not None and self._above is None:
                raise Prune2OnnxError(
                    "step() without penalty(): add compression.penalty() to the loss that is "
                    "differentiated"
                )
            self._step_learned()
        self._above = None
        self._zero()
        self._step += 1
        self._done += 1
        steps = self._plan[name]
        if self._step < steps:
            every = max(1, steps // MEASURES)
            if self._step % every == 0:
                self._measure()
        elif self._at + 1 < len(self._plan):
            self._next()

    def epoch_end(self) -> Progress:
        """Measures the network as it is: for a line of progress after an epoch."""
        with denormals(flushed=False):
            plain, scales = deployed_with_scales(self.course, self.model)
            nbytes = self._deployment.nbytes(plain.cpu(), as_numbers(scales))
        return Progress(
            self.phase,
            self._done,
            sum(self._plan.values()),
            self.course.density(self.model),
            nbytes,
            float(self._latest),
        )

    def finish(self, weights: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, Packed]:
        """The finished network and its file, within the budget.

        Args:
            weights: a state_dict to take in place of the network's, such as a moving average of
                its state_dict; zeros and levels are those that were trained.

        Returns:
            A copy of the network with plain parameters on levels and BatchNorm folded, on the CPU,
            in evaluation mode; and what `pack` returns, with the file as `.model`. The same in
            all processes, each of which has to call it.

        Warns:
            PruningWarning: fewer steps were made than planned, or the budget is missed.
        """
        left = sum(self._plan.values()) - self._done
        if left > 0:
            warnings.warn(
                f"finish() with {left:,} of {sum(self._plan.values()):,} steps left: what they "
                "would have trained is cut off; plan the steps that the loop makes",
                PruningWarning,
                stacklevel=2,
            )
        while self._at + 1 < len(self._plan):
            self._next()
        share_buffers(self.model)
        before = None
        if weights is not None:
            before = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(weights)
        self._end()
        meet_budget(self.course, self.model, 1.0)
        use_budget(self.course, self.model)
        plain, scales = deployed_with_scales(self.course, self.model)
        if before is not None:
            self.model.load_state_dict(before)
        plain = plain.cpu().eval()
        with denormals(flushed=False):
            packed = self._deployment.pack(plain, as_numbers(scales))
        self._warn_if_missed(plain, packed)
        return plain, packed

    def _warn_if_missed(self, plain: nn.Module, packed: Packed) -> None:
        wanted, got = self.course.recipe.target_size, packed.model.ByteSize()
        text = ""
        if wanted is not None and got > wanted:
            text = f"the file has {got:,} bytes, more than the {wanted:,} asked for"
        elif self._evaluate is not None:
            drop = float(self._evaluate(plain.to(self.course.device))) - self._dense_error
            plain.cpu()
            if drop > self._max_drop:
                text = (
                    f"the error is larger by {drop:.4g}, more than the {self._max_drop:.4g} allowed"
                )
        if text:
            warnings.warn(f"{text}; train longer, or allow more", PruningWarning, stacklevel=3)

    def shrunk(self, network: nn.Module) -> onnx.ModelProto:
        """The graph of a finished network without what is dead in it, not packed."""
        return self._deployment.shrunk(network)

    @property
    def phase(self) -> str:
        """The phase that the next step belongs to."""
        return list(self._plan)[self._at]

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs besides the network's and the optimizer's state_dicts."""
        pressure = self.course.pressure
        optimizer = self._optimizer
        facts = asdict(self.course.state)
        facts.pop("history")
        return {
            "plan": dict(self._plan),
            "at": self._at,
            "step": self._step,
            "done": self._done,
            "state": facts,
            "pressure": None if pressure is None else pressure.state(),
            "dense_error": self._dense_error,
            "fisher": _copies(self._fisher),
            "masks": _copies(self._masks),
            "learned": _copies(learned_state(self.model)),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was called; the network loads its own, before or after.

        Raises:
            Prune2OnnxError: it is that of another plan, or of another network.
        """
        if state["plan"] != self._plan:
            raise Prune2OnnxError(
                f"the saved state is of phases {state['plan']}, this compression has {self._plan}; "
                "make it with the same steps and phases"
            )
        if self._done or state["at"] < self._at:
            raise Prune2OnnxError("load the state into a new Compression, before its first step")
        unparametrize(self.model)
        self.course.pressure = None
        self._at, self._step, self._done = state["at"], state["step"], state["done"]
        self.course.state = State(**_tuples(state["state"]))
        self.course.meets = False
        try:
            self._begin()
        finally:
            self.course.meets = True
        self.course.state = State(**_tuples(state["state"]))
        if self.course.pressure is not None and state["pressure"]:
            self.course.pressure.restore(dict(state["pressure"]))
        device = self.course.device
        self._dense_error = state["dense_error"]
        self._fisher = {name: value.to(device).clone() for name, value in state["fisher"].items()}
        self._masks = {name: value.to(device).clone() for name, value in state["masks"].items()}
        load_learned(self.model, state["learned"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])

    # -- phases --------------------------------------------------------------------------------

    def _progress(self) -> float:
        return min(1.0, self._step / self._plan[self.phase])

    def _begin(self) -> None:
        """Begins a phase: what it puts on the network gets an optimizer of its own."""
        name, course = self.phase, self.course
        self._finish = IN_PLACE[name].begin(course, self.model)
        learned = [module.hide() for module in self.model.modules() if isinstance(module, Learned)]
        self._learned = list({id(one): one for one in learned}.values())
        self._optimizer = None
        if self._learned:
            settings: Any = course.recipe.phase(name)
            self._peak = settings.scale_lr if name == "quantize" else settings.threshold_lr
            self._optimizer = torch.optim.AdamW(self._learned, lr=self._peak, weight_decay=0.0)
        self._masks = {}
        if name in ("prune", "tune"):  # of what was pruned before
            self._masks = {n: self._original(n) != 0 for n in self._held()}
        self._fisher = {
            n: self._fisher.get(n, torch.zeros_like(self._original(n))) for n in course.state.pruned
        }

    def _held(self) -> tuple[str, ...]:
        pruned = (*self.course.state.pruned, *self.course.state.frozen)
        return pruned if self._at else ()

    def _end(self) -> None:
        """Ends a phase; the last one stays on levels, until the file is made from a copy."""
        finish, self._finish = self._finish, lambda: None
        finish()
        self.course.pressure = None

    def _next(self) -> None:
        share_buffers(self.model)
        self._end()
        self._at, self._step = self._at + 1, 0
        self._begin()

    def _measure(self) -> None:
        """Corrects the course by the size of the file, or by the accuracy loss."""
        share_buffers(self.model)
        pressure = self.course.pressure
        if self._evaluate is not None and pressure is not None:
            drop = self._error() - self._dense_error
            left = self.course.density(self.model)
            over = drop > self._max_drop
            goal = left * RISE if over else min(pressure.goal, left * FALL)
            self.course.state.goal = pressure.goal = min(1.0, goal)
            return
        IN_PLACE[self.phase].after_epoch(self.course, self.model, self._progress())

    def _error(self) -> float:
        """The error, in evaluation mode; that of the first process in all of them."""
        assert self._evaluate is not None  # callers check it
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            found = float(self._evaluate(self.model))
        finally:
            for module, training in modes.items():
                module.training = training
        return of_first_process(found, self.course.device)

    # -- steps ---------------------------------------------------------------------------------

    def _original(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        return original(self.model.get_submodule(path), attribute)

    def _remember_gradients(self) -> None:
        """Adds the step's gradients to the mean squares that say which weights matter."""
        seen = False
        with torch.no_grad():
            for name, mean in self._fisher.items():
                gradient = self._original(name).grad
                if gradient is not None:
                    seen = True
                    # a step that mixed precision skipped has infinite ones
                    square = gradient.square().nan_to_num(0.0, 0.0, 0.0).to(mean.dtype)
                    mean.mul_(_MEMORY).add_(square, alpha=1 - _MEMORY)
        if self._fisher and not seen:
            raise Prune2OnnxError(
                "step() finds no gradients: call it after the optimizer's step and before "
                "gradients are set to zero"
            )

    def _step_learned(self) -> None:
        optimizer = self._optimizer
        assert optimizer is not None  # as there is something learned
        for parameter in self._learned:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            average(parameter.grad)  # hidden from DistributedDataParallel
        rate = one_cycle if self.phase == "quantize" else steady
        for group in optimizer.param_groups:
            group["lr"] = self._peak * rate(self._progress())
        if self._above is None:
            optimizer.step()
        else:
            step_with_clamp(optimizer, self._learned, self._above)
        optimizer.zero_grad()

    def _zero(self) -> None:
        """Sets what is pruned to zero again, which an optimizer's momentum moves."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._original(name).mul_(mask)

    def _sensitivity(self, _: nn.Module) -> dict[str, Tensor]:
        """Mean squared gradients of the latest steps; all alike before there were any."""
        return {
            name: mean if mean.any() else torch.ones_like(mean)
            for name, mean in self._fisher.items()
        }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _tuples(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
