"""`LightningCallback`: a `Compression` driven by Lightning's Trainer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.packing.pack import Packed
from prune2onnx.training.compression.compression import Compression
from prune2onnx.training.compression.plan import Progress

try:
    from lightning import Callback
except ImportError as error:
    raise Prune2OnnxError(
        "LightningCallback needs lightning; pip install 'prune2onnx[lightning]'"
    ) from error


class LightningCallback(Callback):  # type: ignore[misc]
    """Makes the network of a Lightning Trainer small while it is trained.

        callback = LightningCallback(example_inputs, target_size=100_000)
        Trainer(max_epochs=10, callbacks=[callback]).fit(module, data)
        small, packed = callback.finish()

    The phases follow from the Trainer's steps. Checkpoints hold the state, so `ckpt_path` goes on;
    saved weights have plain names.

    Args:
        example_inputs: a batch of inputs, as for `export`; default: the module's
            `example_input_array`.
        network: attribute of the LightningModule with the network to compress; default: all of it.
        options: of `Compression`: a budget, phases, settings.

    Attributes:
        compression: None before training.
        progress: a line for each epoch.
    """

    def __init__(
        self, example_inputs: Any = None, *, network: str | None = None, **options: Any
    ) -> None:
        self._inputs, self._network, self._options = example_inputs, network, options
        self._saved: dict[str, Any] | None = None
        self._due = False
        self.compression: Compression | None = None
        self.progress: list[Progress] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts thresholds on the network; in a resumed training as they were saved."""
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps) and "steps" not in self._options:
            raise Prune2OnnxError(
                "the Trainer has no end; give it max_epochs or max_steps, or the callback steps"
            )
        inputs = pl_module.example_input_array if self._inputs is None else self._inputs
        if inputs is None:
            raise Prune2OnnxError(
                "no example inputs; give the callback a batch, or the module an example_input_array"
            )
        network = pl_module if self._network is None else getattr(pl_module, self._network)
        options = {"steps": int(steps)} if math.isfinite(steps) else {}
        self.compression = Compression(network, inputs, **(options | self._options))
        if self._saved is not None:
            self.compression.load_state_dict(self._saved)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Adds the penalty's gradients."""
        self._made().add_penalty()
        self._due = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """A step, if the optimizer made one."""
        if self._due:
            self._made().step()
            self._due = False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures the file, and logs it beside the loss, which does not have the penalty."""
        latest = self._made().epoch_end()
        self.progress.append(latest)
        shown = {"density": latest.density, "penalty": latest.penalty}
        pl_module.log_dict(shown | {"file_bytes": float(latest.nbytes)})

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {} if self.compression is None else self.compression.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._saved = state_dict or None

    def finish(self) -> tuple[nn.Module, Packed]:
        """The finished network and its file, as `Compression.finish`."""
        return self._made().finish()

    def _made(self) -> Compression:
        if self.compression is None:
            raise Prune2OnnxError("there is nothing to finish before trainer.fit()")
        return self.compression
