"""Distillation: a network learns the outputs of the dense one, not only the labels.

Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531). The teacher is the
network itself before it was pruned; with a weight of 1 labels are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from prune2onnx.pruning import deep_copy
from prune2onnx.runs.recipe import Recipe


class Teacher:
    """A dense network in evaluation mode, from whose outputs another network learns.

    Args:
        model: the dense network; copied.
        recipe: the weight of its outputs in the loss, and the temperature.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = deep_copy(model).eval().requires_grad_(False)
        self.weight, self.temperature = recipe.distill, recipe.temperature

    def loss(self, x: Tensor, y: Tensor, scores: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar.

        (1 - weight) * cross entropy of the labels + weight * T^2 * KL(teacher || scores), both
        distributions softened by the temperature T.

        Args:
            x: inputs, [n, ...].
            y: labels, int64 [n].
            scores: the network's, [n, classes].
        """
        if not self.weight:
            return functional.cross_entropy(scores, y)
        with torch.no_grad():
            target = self.model(x)
        soft = functional.kl_div(
            functional.log_softmax(scores / self.temperature, 1),
            functional.log_softmax(target.to(scores.dtype) / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = self.weight * self.temperature**2 * soft
        if self.weight < 1:
            loss = loss + (1 - self.weight) * functional.cross_entropy(scores, y)
        return loss
