"""BatchNorm's statistics, gathered anew for a network whose weights are pruned.

While thresholds are learned, they are those of the soft function, and later a moving average that
the last batches dominate. Folding BatchNorm into layers is in `fold`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prune2onnx.pruning import deep_copy
from prune2onnx.tasks.structure import leaves
from prune2onnx.training.fold import has_batch_norm
from prune2onnx.training.model import outputs_of


def with_own_statistics(model: nn.Module, batches: Iterable[Any]) -> nn.Module | None:
    """A copy of a network in evaluation mode, with the mean statistics of some batches.

    Unlike `torch.optim.swa_utils.update_bn`, Dropout is off, as it is when the network is used.

    Args:
        model: with plain parameters.
        batches: of its inputs, on its device; those of one example are left out.

    Returns:
        None for a network without BatchNorm that keeps statistics.
    """
    if not has_batch_norm(model):
        return None
    fresh = deep_copy(model).eval()
    norms = [
        module
        for module in fresh.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return None
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    with torch.no_grad():
        for x in batches:
            if len(leaves(x)[0]) > 1:  # one has no variance
                outputs_of(fresh, x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return fresh.eval()
