"""What thresholds and levels hold, for a state that is saved; and networks without them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning import Learned
from prune2onnx.pruning.computed import unparametrize_own


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """What thresholds and levels hold, by the paths of their modules."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Learned):
            held = {module.learned: module.hide(), **dict(module.named_buffers(recurse=False))}
            bits = getattr(module, "bits", None)
            if isinstance(bits, Tensor):
                held["bits"] = bits
            found |= {f"{path}.{name}": value for name, value in held.items()}
    return found


def load_learned(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Loads what `learned_state` gave, in place.

    Raises:
        Prune2OnnxError: it is that of another network.
    """
    own = learned_state(model)
    for name, value in saved.items():
        path, _, attribute = name.rpartition(".")
        if attribute == "bits":
            module: Any = model.get_submodule(path)
            module.bits = value.to(next(iter(own.values())).device)
        elif name not in own or own[name].shape != value.shape:
            there = list(own[name].shape) if name in own else "nothing"
            raise Prune2OnnxError(
                f"{name}: the saved state has {list(value.shape)}, this network {there}; load it "
                "into a Compression of the same network"
            )
        else:
            with torch.no_grad():
                own[name].copy_(value)


def unparametrize(model: nn.Module) -> None:
    """Takes thresholds off again, and leaves the tensors behind them as they are."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for name in [
            n for n, c in chains.items() if type(c[0]).__module__.startswith("prune2onnx.")
        ]:
            unparametrize_own(module, name)
