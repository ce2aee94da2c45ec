"""Checkpoints of a training run: safetensors files that appear whole or not at all.

`running.safetensors` holds an unfinished phase (model and optimizer), `<phase>.safetensors` the
plain state_dict at the end of one. Facts that are not tensors are in the file's metadata; `loop`
knows what they mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.files import write_whole

_RUNNING = "running"
_OPTIMIZER = "optimiser"  # first part of the names of its tensors
_START_AGAIN = "start again with --overwrite"
_LEAST_SECONDS = 1.0  # between two checkpoints of a phase: about what a kill may cost


class Checkpoints:
    """The checkpoint folder of a run, written by the main process and read by all.

    Args:
        folder: made when first needed; None keeps nothing.
        accelerator: knows the main process, for which the others wait.
        settings: a digest of what the run depends on; a checkpoint of other settings is refused.
    """

    def __init__(self, folder: Path | None, accelerator: Accelerator, settings: str) -> None:
        self.folder, self.accelerator, self.settings = folder, accelerator, settings
        self._next_save = 0.0

    def forget(self, phases: tuple[str, ...]) -> None:
        """Removes the checkpoints of an earlier run."""
        if self.folder and self.accelerator.is_main_process:
            for name in (_RUNNING, *phases):
                self._path(name).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def save_finished(self, phase: str, model: nn.Module, facts: dict[str, Any]) -> None:
        """Saves the model at the end of a phase, and removes the checkpoint of its epochs."""
        self._save(phase, plain_state(model), facts)
        if self.folder and self.accelerator.is_main_process:
            self._path(_RUNNING).unlink(missing_ok=True)

    def load_finished(self, phase: str, model: nn.Module) -> dict[str, Any] | None:
        """Restores the model at the end of a phase; returns its facts, None if there is none."""
        found = self._load(phase)
        if found is None:
            return None
        tensors, facts = found
        self._restore(model, tensors, phase)
        return facts

    def save_running(
        self,
        phase: str,
        epoch: int,
        model: nn.Module,
        optimizer: Any,
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        """Saves an unfinished phase after an epoch, unless it did less than a second ago.

        Epochs of a small dataset take less time than writing a file. A resumed run ends in the same
        bytes from wherever it starts.
        """
        alone = self.accelerator.num_processes == 1  # several have to decide alike
        if alone and time.monotonic() < self._next_save:
            return
        tensors = {f"model/{name}": value for name, value in plain_state(model).items()}
        names = _optimized_names(model, optimizer)
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"{_OPTIMIZER}/{names[index]}/{slot}": value.cpu().contiguous()
                for slot, value in state.items()
            }
        self._save(_RUNNING, tensors, facts() | {"phase": phase, "epoch": epoch})
        self._next_save = time.monotonic() + _LEAST_SECONDS

    def load_running(self, phase: str, model: nn.Module, optimizer: Any) -> dict[str, Any] | None:
        """Restores an unfinished phase; returns its facts, None if it is another one or missing."""
        found = self._load(_RUNNING)
        if found is None or found[1]["phase"] != phase:
            return None
        tensors, facts = found
        inner = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
        self._restore(model, inner, _RUNNING)
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, name in enumerate(_optimized_names(model, optimizer)):
            prefix = f"{_OPTIMIZER}/{name}/"
            slots = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if slots:  # in the memory layout of the parameter
                like = parameters[index]
                state[index] = {
                    k: torch.empty_like(like).copy_(v) if v.shape == like.shape else v
                    for k, v in slots.items()
                }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return facts

    def _path(self, name: str) -> Path:
        assert self.folder is not None  # callers check it
        return self.folder / f"{name}.safetensors"

    def _save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if self.folder and self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            facts |= {"settings": self.settings, "scaler": scaler and scaler.state_dict()}
            write_whole(self._path(name), save(tensors, {"prune2onnx": json.dumps(facts)}))
        self.accelerator.wait_for_everyone()

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.folder or not self._path(name).exists():
            return None
        try:
            with safe_open(self._path(name), framework="pt") as file:
                facts = json.loads(file.metadata()["prune2onnx"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors, JSON and the system raise different types
            raise Prune2OnnxError(
                f"{self._path(name)}: not a checkpoint of this program ({error}); {_START_AGAIN}"
            ) from error
        if facts["settings"] != self.settings:
            raise Prune2OnnxError(
                f"{self._path(name)}: made with another recipe or other data; {_START_AGAIN}"
            )
        if facts["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        return tensors, facts

    def _restore(self, model: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise Prune2OnnxError(
                f"{self._path(name)}: the checkpoint does not fit the model "
                f"({one_line(error)[:300]}); was the model's code changed? "
                f"{_START_AGAIN}"
            ) from error


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict on the CPU; tied tensors are copied under each name."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def _optimized_names(model: nn.Module, optimizer: Any) -> list[str]:
    """Names of the optimizer's parameters, in the order of its state's indices."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
