"""Distillation: a network learns the outputs of the dense one, not only the targets.

Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531). The teacher is the
network itself before it was pruned; with a weight of 1 targets are not used. How far outputs are
from the teacher's is up to the task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prune2onnx.pruning import deep_copy
from prune2onnx.runs.recipe import Recipe
from prune2onnx.tasks.losses import value_distance
from prune2onnx.tasks.task import CLASSIFICATION, Task
from prune2onnx.training.model import outputs_of


class Teacher:
    """A dense network in evaluation mode, from whose outputs another network learns.

    Args:
        model: the dense network; copied.
        recipe: the weight of its outputs in the loss, and the temperature.
        task: the loss, and the distance of outputs.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, task: Task = CLASSIFICATION) -> None:
        self.model = deep_copy(model).eval().requires_grad_(False)
        self.task, self.temperature = task, recipe.temperature
        # a task without targets has nothing else to learn from
        self.weight = 1.0 if task.targets == "outputs" else recipe.distill or 0.0

    def loss(self, x: Any, y: Any, outputs: Any) -> Tensor:
        """Mean loss of a batch, a scalar.

        (1 - weight) * loss of the targets + weight * distance of the outputs from the teacher's. In
        classification the distance is T^2 * KL(teacher || scores), both distributions softened by
        the temperature T.

        Args:
            x: the model's inputs.
            y: targets.
            outputs: the network's.
        """
        if not self.weight:
            return self.task.loss(outputs, y)
        with torch.no_grad():
            target = outputs_of(self.model, x)
        distance = self.task.distance or value_distance
        factor = self.weight * self.temperature**2 if self.task.softened else self.weight
        loss = factor * distance(outputs, target, self.temperature)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * self.task.loss(outputs, y)
        return loss
