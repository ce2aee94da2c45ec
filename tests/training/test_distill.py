"""Distillation: the loss is Hinton's, the teacher does not change and needs no labels."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from prune2onnx.runs.recipe import Recipe
from prune2onnx.training.distill import Teacher


def teacher(model: nn.Module, **settings: float) -> Teacher:
    return Teacher(model, Recipe(model="m", **settings))


def test_the_loss_of_equal_outputs_is_zero():
    model, x = nn.Linear(5, 3), torch.randn(8, 5)
    one = teacher(model, distill=1.0, temperature=3.0)
    loss = one.loss(x, torch.zeros(8, dtype=torch.int64), model(x))
    assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_mixes_labels_and_softened_outputs(weight):
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    scores = torch.randn(8, 3)
    p, q = (functional.softmax(s / 2, 1) for s in (model(x), scores))
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = weight * 4 * divergence + (1 - weight) * functional.cross_entropy(scores, y)
    found = teacher(model, distill=weight, temperature=2.0).loss(x, y, scores)
    torch.testing.assert_close(found, expected)


def test_the_teacher_does_not_change_and_has_no_dropout():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train()
    one, x = teacher(model, distill=1.0), torch.randn(8, 5)
    y = torch.zeros(8, dtype=torch.int64)
    scores = torch.randn(8, 3, requires_grad=True)
    first = one.loss(x, y, scores)
    first.backward()
    with torch.no_grad():
        model[0].weight.zero_()
    assert one.loss(x, y, scores).item() == first.item()
    assert all(p.grad is None for p in one.model.parameters())
