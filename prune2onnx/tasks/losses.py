"""Losses of the built-in tasks, and how far a network's outputs are from the dense one's.

All take a batch's outputs and targets as tensors and return a scalar, the mean. Distances are for
distillation: Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prune2onnx.tasks.metrics import IGNORED


def first(outputs: Any) -> Tensor:
    """The first output of a network."""
    tensor: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return tensor


def _rows(outputs: Any, axis: int) -> Tensor:
    """Scores as [m, classes], a row for each position."""
    scores = first(outputs)
    return scores if scores.ndim == 2 else scores.movedim(axis, -1).flatten(0, -2)


def class_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Cross entropy of scores [n, classes, ...] and classes [n, ...]."""
    return functional.cross_entropy(first(outputs), targets, ignore_index=IGNORED)


def token_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Cross entropy of scores [n, positions, classes] and classes [n, positions]."""
    rows = _rows(outputs, -1)
    return functional.cross_entropy(rows, targets.reshape(-1), ignore_index=IGNORED)


def label_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Binary cross entropy of scores [n, labels] and labels 0 or 1, [n, labels]."""
    scores = first(outputs)
    return functional.binary_cross_entropy_with_logits(scores, targets.to(scores.dtype))


def squared_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Mean squared error; [n] targets belong to [n, 1] outputs."""
    made = first(outputs)
    return functional.mse_loss(made, targets.to(made.dtype).reshape(made.shape))


def absolute_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Mean absolute error; shapes as for the squared one."""
    made = first(outputs)
    return functional.l1_loss(made, targets.to(made.dtype).reshape(made.shape))


def relative_loss(outputs: Any, targets: Any, temperature: float = 1.0) -> Tensor:
    """Squared distance over the squared norm of the targets, over all outputs of a batch."""
    made = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = targets if isinstance(targets, tuple) else (targets,)
    pairs = [(a, b) for a, b in zip(made, wanted, strict=True) if a.is_floating_point()]
    distance = torch.stack([(a - b.to(a.dtype)).square().sum() for a, b in pairs]).sum()
    norm = torch.stack([b.to(a.dtype).square().sum() for a, b in pairs]).sum()
    return distance / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def class_distance(outputs: Any, targets: Any, temperature: float) -> Tensor:
    """KL(dense || network) of scores along axis 1, softened by the temperature."""
    return _kl(_rows(outputs, 1), _rows(targets, 1), temperature)


def token_distance(outputs: Any, targets: Any, temperature: float) -> Tensor:
    """KL(dense || network) of scores along the last axis, softened by the temperature."""
    return _kl(_rows(outputs, -1), _rows(targets, -1), temperature)


def _kl(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    return functional.kl_div(
        functional.log_softmax(scores / temperature, 1),
        functional.log_softmax(target.to(scores.dtype) / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )


def label_distance(outputs: Any, targets: Any, temperature: float) -> Tensor:
    """Binary cross entropy of each label against the dense network's probability, softened."""
    scores = first(outputs) / temperature
    soft = torch.sigmoid(first(targets).to(scores.dtype) / temperature)
    return functional.binary_cross_entropy_with_logits(scores, soft)


def value_distance(outputs: Any, targets: Any, temperature: float) -> Tensor:
    """Mean squared difference of the outputs; the temperature has no meaning here."""
    return squared_loss(outputs, first(targets))


def absolute_distance(outputs: Any, targets: Any, temperature: float) -> Tensor:
    """Mean absolute difference of the outputs; the temperature has no meaning here."""
    return absolute_loss(outputs, first(targets))
