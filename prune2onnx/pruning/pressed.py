"""The penalty with its gradients in closed form, for a training loop that is the project's own.

`penalty` in `weights` is a node of the autograd graph, which serves any loop. Differentiating that
takes twice as long as the equations here, which share what survivors, penalty and gradients need:

    gate = sigma(beta (|w| - t))         penalty = sum cost gate
    slope = cost beta gate (1 - gate)    d penalty / dw = slope sign(w), d penalty / dt = -sum slope
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune2onnx.pruning.channels import channel_thresholds_of
from prune2onnx.pruning.weights import LearnedThreshold, learned_sites


@dataclass(frozen=True)
class Pressed:
    """What is left of a model, what that costs, and where pruning would take the parameters.

    Attributes:
        alive: number of survivors; while channels are pruned, the fraction of their cost that is
            left. A scalar.
        penalty: a scalar.
        gradients: of the penalty, for the parameters that it depends on.
    """

    alive: Tensor
    penalty: Tensor
    gradients: tuple[tuple[Tensor, Tensor], ...]

    def add(self, factor: Tensor) -> None:
        """Adds the gradients of `factor * penalty` to those that the parameters have.

        DistributedDataParallel does not notice. So a penalty may reach weights that forward did not
        use, which that wrapper refuses where it looks for unused parameters. Its gradient is the
        same in all processes, so nothing has to be averaged.
        """
        with torch.no_grad():
            for parameter, gradient in self.gradients:
                if parameter.grad is None:
                    parameter.grad = gradient * factor
                else:
                    parameter.grad.addcmul_(gradient, factor.to(gradient.dtype))


def pressed(model: nn.Module) -> Pressed:
    """Survivors, penalty and gradients of a model with learned thresholds on weights or channels.

    Raises:
        Prune2OnnxError: the model has no learned threshold.
    """
    if (channels := channel_thresholds_of(model)) is not None:
        return _by_autograd(channels.left(), channels.penalty(), [channels.rho])
    parts = [_of_weight(site.threshold, site.original) for site in learned_sites(model)]
    return Pressed(
        torch.stack([part.alive for part in parts]).sum(),
        torch.stack([part.penalty for part in parts]).sum(),
        tuple(pair for part in parts for pair in part.gradients),
    )


def _of_weight(learned: LearnedThreshold, w: nn.Parameter) -> Pressed:
    if learned.gone is not None:
        alive = learned.alive(w).sum().to(torch.float32)
        penalty = learned.importance * learned.survivors(w)
        return _by_autograd(alive, penalty, [w, learned.rho])
    with torch.no_grad():
        beta = learned.beta / learned.scale
        over = w.abs().sub_(learned.threshold())
        alive = over.sign().clamp_min_(0).sum(dtype=torch.float32)
        gate = over.mul_(beta).sigmoid_()
        cost, importance = learned.bits, learned.importance
        if cost is None:
            penalty = gate.sum() * importance
        else:
            importance /= 8
            penalty = (gate * cost).sum() * importance
        slope = gate.addcmul_(gate, gate, value=-1)
        if cost is not None:
            slope.mul_(cost)
        of_rho = -importance * learned.beta * torch.sigmoid(learned.rho)  # d t / d rho has scale
        gradients = [(learned.rho, slope.sum_to_size(learned.rho.shape) * of_rho)]
        if w.requires_grad:
            gradients.append((w, slope.mul_(w.sign()).mul_(beta * importance)))
    return Pressed(alive, penalty, tuple(gradients))


def _by_autograd(alive: Tensor, penalty: Tensor, parameters: list[nn.Parameter]) -> Pressed:
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = torch.autograd.grad(penalty, wanted, allow_unused=True)
    pairs = [(p, g) for p, g in zip(wanted, found, strict=True) if g is not None]
    return Pressed(alive.detach(), penalty.detach(), tuple(pairs))
