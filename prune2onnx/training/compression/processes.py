"""Several processes that train one network: what each has to know to decide alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune2onnx.errors import Prune2OnnxError


def processes() -> int:
    """How many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def average(tensor: Tensor) -> None:
    """Averages a tensor over all processes, in place."""
    if (count := processes()) > 1:
        torch.distributed.all_reduce(tensor)
        tensor /= count


def of_first_process(value: float, device: torch.device) -> float:
    """The first process's value, in all of them."""
    if processes() == 1:
        return value
    shared = torch.tensor(value, device=device, dtype=torch.float64)
    torch.distributed.broadcast(shared, src=0)
    return float(shared)


def share_buffers(model: nn.Module) -> None:
    """Takes the first process's buffers: BatchNorm's statistics are of other examples in each.

    Decisions depend on them, and have to be the same everywhere.
    """
    if processes() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def refuse_sharded(model: nn.Module) -> None:
    """Checks that each process has all of each weight.

    Raises:
        Prune2OnnxError: one is sharded.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise Prune2OnnxError(
                f"{name}: sharded over devices (FSDP), of which none has all of a weight; make the "
                "Compression without FSDP, as with DistributedDataParallel"
            )
