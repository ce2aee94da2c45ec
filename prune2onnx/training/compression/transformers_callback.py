"""`TransformersCallback`: a `Compression` driven by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.packing.pack import Packed
from prune2onnx.training.compression.compression import Compression
from prune2onnx.training.compression.plan import Progress

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise Prune2OnnxError(
        "TransformersCallback needs transformers; pip install 'prune2onnx[transformers]'"
    ) from error

_FILE = "compression.pt"


class TransformersCallback(TrainerCallback):  # type: ignore[misc]
    """Makes the network of a `transformers.Trainer` small while it is trained.

        callback = TransformersCallback(example_inputs, target_size=100_000)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        small, packed = callback.finish()

    The phases follow from the Trainer's steps. Checkpoints hold the state beside the network's, so
    `resume_from_checkpoint` goes on; saved weights have plain names. With fp16 keep a max_grad_norm
    above 0, which unscales gradients before the penalty's are added.

    Args:
        example_inputs: a batch of inputs, as for `export`; a dict with the names of forward's
            arguments, without labels.
        options: of `Compression`: a budget, phases, settings.

    Attributes:
        compression: None before training.
        progress: a line for each epoch.
    """

    def __init__(self, example_inputs: Any, **options: Any) -> None:
        self._inputs, self._options = example_inputs, options
        self.compression: Compression | None = None
        self.progress: list[Progress] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts thresholds on the network; in a resumed training as they were saved."""
        path = self._path(args, state)
        if state.global_step and not path.is_file():
            raise Prune2OnnxError(
                f"{path}: missing, so the compression cannot go on; resume from a checkpoint "
                "that was saved with this callback, or train anew"
            )
        options = {"steps": state.max_steps} | self._options
        self.compression = Compression(kwargs["model"], self._inputs, **options)
        if state.global_step:
            self.compression.load_state_dict(torch.load(path, weights_only=True))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the penalty's gradients, after the clipping."""
        self._made().add_penalty()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step."""
        self._made().step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures the file."""
        self.progress.append(self._made().epoch_end())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the penalty beside the loss, which does not have it."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if "loss" in logs and self.progress:
            latest = self.progress[-1]
            shown = {"density": latest.density, "file_bytes": latest.nbytes}
            # what is printed, and what is kept: the Trainer has copied the one to the other before
            for line in (logs, *state.log_history[-1:]):
                line |= shown | {"penalty": latest.penalty}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves the state into the Trainer's checkpoint."""
        path = self._path(args, state)
        if state.is_world_process_zero and path.parent.is_dir():
            torch.save(self._made().state_dict(), path)

    def finish(self) -> tuple[nn.Module, Packed]:
        """The finished network and its file, as `Compression.finish`."""
        return self._made().finish()

    def _made(self) -> Compression:
        if self.compression is None:
            raise Prune2OnnxError("there is nothing to finish before trainer.train()")
        return self.compression

    @staticmethod
    def _path(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
