"""`fit`: trains, prunes, tunes and quantizes a network, on CPU, GPU or in several processes.

dense (ordinary training) -> channels (channel pruning, on request) -> prune (weights and thresholds
together, under a penalty that leads to a density or a size) -> tune (fixed masks) -> quantize (few
levels). From the second phase on, a network may learn from the dense one's outputs. Writes no file
but checkpoints, on request. Each phase is in `phases`, the training loop in `loop`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator as Accelerator  # also for those who hand one to `fit`
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from prune2onnx.data import Data
from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.files import write_whole
from prune2onnx.pruning import other_parameters, unwrapped
from prune2onnx.runs.history import Callbacks, Epoch
from prune2onnx.runs.recipe import PHASES, Recipe
from prune2onnx.tasks.task import CLASSIFICATION, Task
from prune2onnx.training.augment import check_images
from prune2onnx.training.checkpoint import Checkpoints, plain_state
from prune2onnx.training.cpu.allocator import keep_freed_memory
from prune2onnx.training.cpu.threads import faster, may_choose, threads
from prune2onnx.training.denormals import denormals
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.loop import Run
from prune2onnx.training.model import check_parameters
from prune2onnx.training.phases import train_phase, warn_of_a_short_phase
from prune2onnx.training.scoring import check_output, deviation, warn_of_saturation

THREADS = "threads.json"
"""The file in a folder of checkpoints with the number of threads."""

# Where the recipe gives no epochs: the steps of a phase, and its fewest epochs.
_DEFAULT_STEPS = {"dense": 1500, "channels": 2000, "prune": 3000, "tune": 1000, "quantize": 800}
_FEWEST_EPOCHS = {"dense": 8, "channels": 6, "prune": 12, "tune": 5, "quantize": 5}


@dataclass(frozen=True)
class Fitted:
    """The outcome of `fit`.

    Attributes:
        model: pruned, quantized, in evaluation mode, on the CPU, with plain parameters.
        dense: state_dict of the network before pruning.
        pruned: names of the pruned weights.
        history: every epoch, in order.
        dense_error: the task's metric on the validation split (for classification, percent of
            errors), of the network to compare with; NaN if only the dense phase was run.
        error: the same, of `model`.
        steps: name of a weight on levels -> the step of which its values are multiples.
        others: elements of the parameters that are not among the pruned weights.
    """

    model: nn.Module
    dense: dict[str, Tensor]
    pruned: tuple[str, ...]
    history: tuple[Epoch, ...]
    dense_error: float
    error: float
    steps: Mapping[str, float]
    others: int = 0

    @property
    def size(self) -> int:
        """Elements of the pruned weights."""
        return sum(self.model.get_parameter(name).numel() for name in self.pruned)

    @property
    def density(self) -> float:
        """Nonzeros over elements of the pruned weights, 0-1."""
        weights = [self.model.get_parameter(name) for name in self.pruned]
        return sum(int(torch.count_nonzero(weight)) for weight in weights) / self.size


def with_epochs(recipe: Recipe, examples: int) -> Recipe:
    """The recipe with every phase's epochs filled in.

    Args:
        recipe: epochs may be None there.
        examples: size of the training split; a default is a number of steps, not of epochs, so
            that a small dataset is trained enough.
    """
    steps_per_epoch = max(1, examples // recipe.batch_size)
    sections = {}
    for phase in _DEFAULT_STEPS:
        section = getattr(recipe, phase)
        epochs = section.epochs
        if epochs is None:
            needed = math.ceil(_DEFAULT_STEPS[phase] / steps_per_epoch)
            epochs = max(_FEWEST_EPOCHS[phase], needed)
            if phase == "channels" and not recipe.prunes_channels:
                epochs = 0
        sections[phase] = section.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update=sections)


def make_accelerator(recipe: Recipe, *, cpu: bool = False) -> Accelerator:
    """The devices and processes that accelerate finds, in the recipe's precision.

    Raises:
        Prune2OnnxError: this process already trains in another precision, or the device cannot.
    """
    # a network may have a layer that its forward does not use
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        cpu = True  # else accelerate would take each of torchrun's processes to be alone
    try:
        return Accelerator(cpu=cpu, mixed_precision=recipe.precision, kwargs_handlers=[unused])
    except ValueError as error:
        raise Prune2OnnxError(
            f"precision {recipe.precision!r}: {one_line(error)}; "
            "choose another --precision, or start a new process"
        ) from error


def made_by_main(accelerator: Accelerator, path: Path, make: Callable[[], str]) -> str:
    """The text of a file, which the main process writes if it is missing; the others wait."""
    if accelerator.is_main_process and not path.exists():
        write_whole(path, make())
    accelerator.wait_for_everyone()
    return path.read_text()


def end_processes() -> None:
    """Destroys the process group of a run of several processes.

    The last call of a program: one that ends without it may be torn down with its threads alive.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    accelerator: Accelerator | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    start: str = "dense",
    stop: str = "quantize",
    teacher: nn.Module | None = None,
    task: Task = CLASSIFICATION,
    deployment: Deployment | None = None,
    callbacks: Callbacks | None = None,
) -> Fitted:
    """Trains, prunes, tunes and quantizes a network.

    Args:
        model: takes the data's inputs and returns what the task needs: scores [n, data.classes] in
            classification; trained in place up to the point where folding replaces BatchNorm
            layers.
        data: its training split is trained on, its validation split decides choices, its test
            split is not read.
        recipe: the settings; `with_epochs` fills in epochs that are None.
        accelerator: devices, precision and processes; default: what accelerate finds, with the
            recipe's precision.
        checkpoints: folder for a checkpoint after each epoch and one for each finished phase.
        resume: continue from what is in `checkpoints`.
        start: the first phase: "dense", "prune" for a trained model, "tune" for one that is pruned,
            too (its exact zeros are the masks).
        stop: the last phase.
        teacher: the dense network to learn from (`recipe.distill`) and to compare with; default:
            the model as it is before it is pruned.
        task: loss and metrics.
        deployment: measures the file; needed for `recipe.target_size` and for channel pruning.
        callbacks: called during training.

    Returns:
        The finished model and its history.

    Raises:
        Prune2OnnxError: the loss became NaN or infinite (with phase, epoch and step), the model's
            output has the wrong shape, it has nothing to train or to prune, or a checkpoint does
            not fit it.

    Warns:
        PruningWarning: the prune phase is too short for its goal, or the outputs come from a
            function that saturates.
    """
    accelerator = accelerator or make_accelerator(recipe)
    if recipe.batch_size % accelerator.num_processes:
        raise RecipeError(
            f"batch_size {recipe.batch_size} cannot be split among {accelerator.num_processes} "
            "processes; choose a multiple"
        )
    if accelerator.num_processes > 1 and len(data.train) < accelerator.num_processes:
        raise RecipeError(
            f"{len(data.train)} training examples for {accelerator.num_processes} processes, "
            "expected at least one for each; start fewer processes"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    recipe = with_epochs(recipe, len(data.train))
    model = unwrapped(model)
    model = model.to(accelerator.device)
    check_images(recipe.augment, data)
    check_output(model, data, task, accelerator.device)
    check_parameters(model, recipe, prunes=stop != "dense")
    if stop != "dense":
        warn_of_saturation(model, data, accelerator.device, stacklevel=2)
    _channels_last(model, data, task, accelerator.device)
    settings = f"{recipe.to_yaml()}{len(data.train)} training examples"
    kept = Checkpoints(checkpoints, accelerator, hashlib.sha256(settings.encode()).hexdigest())
    if not resume:
        kept.forget(PHASES)
        if checkpoints is not None:
            (checkpoints / THREADS).unlink(missing_ok=True)
    task = task.normalized(deviation(data, task))
    run = Run(data, recipe, accelerator, kept, callbacks or Callbacks(), deployment, task)
    first = "channels" if start == "prune" else start
    phases = PHASES[PHASES.index(first) : PHASES.index(stop) + 1]
    if "prune" in phases and recipe.prune.epochs and not recipe.channels.epochs:
        warn_of_a_short_phase(run.course, model, stacklevel=2)
    dense = plain_state(model)
    with denormals(flushed=True), threads(_threads(run, model, checkpoints)):
        for phase in phases:
            if not recipe.phase(phase).epochs:
                continue
            if phase != "dense" and run.teacher is None:
                run.set_teacher(model if teacher is None else teacher.to(accelerator.device))
            train_phase(run, phase, model)
            if phase == "dense":
                dense = plain_state(model)
    return Fitted(
        error=run.value(model),
        model=model.cpu().eval(),
        dense=dense,
        pruned=run.state.pruned,
        history=tuple(run.state.history),
        dense_error=run.dense_value,
        steps=run.state.steps,
        others=sum(other.size for other in other_parameters(model, run.state.pruned)),
    )


def _threads(run: Run, model: nn.Module, folder: Path | None) -> int | None:
    """The number of threads to train with, on a CPU; None: as torch has it.

    It is measured once and kept in the run's folder.
    """
    if run.accelerator.device.type != "cpu" or run.accelerator.num_processes > 1:
        return None
    kept = None if folder is None else folder / THREADS
    if kept is not None and kept.exists():
        return int(json.loads(kept.read_text()))
    if not may_choose():
        return None
    try:
        count = faster(run.trial_step(model))
    except (RuntimeError, ValueError):  # training says in which step it fails
        return None
    if kept is not None:
        write_whole(kept, f"{count}\n")
    return count


def _channels_last(model: nn.Module, data: Data, task: Task, device: torch.device) -> None:
    """Sets the memory format of convolutions to channels last, up to twice as fast.

    A model that needs the other format (`view` of a convolution's output) keeps it.
    """
    if data.input_dtype != "float32" or len(data.input_shape) != 3:
        return
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        check_output(model, data, task, device)
    except Prune2OnnxError:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
