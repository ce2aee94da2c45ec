"""The penalty in closed form: the same as by differentiation."""

import pytest
import torch
from torch import nn

from prune2onnx.pruning import penalty, pressed, prune, survivors, weigh_by_bits


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 9), nn.ReLU(), nn.Linear(9, 3)
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("thresholds", ["layer", "channel"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_it_is_what_differentiation_gives(granularity, thresholds, weighed):
    models = [
        prune(
            network(),
            granularity=granularity,
            thresholds=thresholds,
            start=0.7,
            importance={"2": 3.0},
        )
        for _ in range(2)
    ]
    for model in models:
        model(torch.ones(2, 1, 8, 8)).square().mean().backward()
        if weighed:
            weigh_by_bits(model)
    expected = penalty(models[0])
    (0.3 * expected).backward()
    found = pressed(models[1])
    found.add(torch.tensor(0.3))
    assert int(found.alive) == int(survivors(models[0]))
    torch.testing.assert_close(found.penalty, expected.detach())
    torch.testing.assert_close(gradients(models[1]), gradients(models[0]))


def test_frozen_weights_get_no_gradient_and_zeros_are_not_moved():
    model = network()
    model[2].weight.requires_grad_(False)
    with torch.no_grad():
        model[4].weight[0] = 0
    prune(model)
    pressed(model).add(torch.tensor(1.0))
    assert model[2].parametrizations.weight.original.grad is None
    assert not model[4].parametrizations.weight.original.grad[0].any()
    assert model[4].parametrizations.weight.original.grad[1].any()


def test_a_convolution_of_one_channel_keeps_its_layout():
    model = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
    strides = model.weight.stride()
    output = model(torch.ones(2, 1, 8, 8)).stride()
    prune(model, thresholds="channel")
    assert model.weight.stride() == strides
    assert model(torch.ones(2, 1, 8, 8)).stride() == output
    model(torch.ones(2, 1, 8, 8)).sum().backward()
    assert model.parametrizations.weight.original.grad is not None
