"""Weights on levels: LSQ's gradients, exact levels; names, zeros and ties are kept."""

import math

import pytest
import torch
from torch import nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.training.levels import (
    bake_levels,
    coarsen,
    put_on_levels,
    remove_below,
    saliency,
    scales_of,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 0.1] = 0
    return model


def test_values_are_whole_multiples_of_one_scale_and_zeros_stay():
    model, x = network(), torch.randn(7, 6)
    names, zeros = set(model.state_dict()), model[0].weight == 0
    put_on_levels(model, {"0.weight": 3, "0.bias": 5, "2.weight": 127})
    scale = float(scales_of(model)[0].detach())
    before = model.eval()(x)
    assert list(bake_levels(model)) == ["0.weight", "0.bias", "2.weight"]
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert set(model.state_dict()) == names
    weight = model[0].weight.detach()
    assert not weight[zeros].any()
    levels = (weight / scale).round()
    assert levels.abs().max() <= 3
    assert torch.equal(weight, levels * torch.tensor(scale))
    # 127 levels are nearly as good as none
    torch.testing.assert_close(model[2].weight, network()[2].weight, rtol=0, atol=4e-3)


def test_a_common_scale_is_that_of_most_values():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 4), nn.ReLU(), nn.Linear(4, 4)
    )
    with torch.no_grad():  # weights that fit a scale of 0.2, biases that fit a much finer one
        for layer in (model[0], model[2], model[4]):
            levels = torch.randint(1, 3, layer.weight.shape) * torch.randn_like(layer.weight).sign()
            layer.weight.copy_(0.2 * levels + 0.01 * torch.randn_like(layer.weight))
            layer.bias.uniform_(-0.09, 0.09)
    largest = {name: 2 if "weight" in name else 15 for name, _ in model.named_parameters()}
    put_on_levels(model, largest, common=True)
    (scale,) = scales_of(model)
    assert float(scale.detach()) == pytest.approx(0.2, abs=0.01)


def test_the_gradients_are_those_of_learned_step_size_quantization():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.9, -0.4, 9.0, 0.0]]))
    put_on_levels(model, {"0.weight": 2})
    chain = model[0].parametrizations.weight
    with torch.no_grad():
        chain[0].scale.fill_(1.0)
    model(torch.tensor([[1.0, 2.0, 4.0, 8.0]])).sum().backward()
    # straight through within the range, nothing beyond it and nothing for a zero
    assert chain.original.grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]
    expected = (1 - 0.9) * 1 + (0 + 0.4) * 2 + 2 * 4
    assert float(chain[0].scale.grad) == pytest.approx(expected / math.sqrt(3 * 2))


def test_a_tied_parameter_has_one_scale():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    put_on_levels(model, {"0.weight": 2})
    assert len(scales_of(model)) == 1
    assert list(bake_levels(model)) == ["0.weight"]
    assert model[0].weight is model[1].weight


def test_a_weight_pruned_to_nothing_survives():
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    put_on_levels(model, {"0.weight": 4})
    model(torch.ones(1, 3)).sum().backward()
    bake_levels(model)
    assert not model[0].weight.any()


def test_what_fits_no_level_is_named_and_nothing_is_changed():
    model = network()
    with pytest.raises(Prune2OnnxError, match=r"2.bias: largest level 200, expected 1 to 127"):
        put_on_levels(model, {"0.weight": 3, "2.bias": 200})
    with torch.no_grad():
        model[2].bias[0] = math.nan
    with pytest.raises(Prune2OnnxError, match=r"2.bias: NaN or infinite"):
        put_on_levels(model, {"0.weight": 3, "2.bias": 3})
    assert not scales_of(model)


@pytest.mark.parametrize("on_levels", [True, False])
def test_survivors_of_least_saliency_are_removed_for_good(on_levels):
    model = network()
    if on_levels:
        put_on_levels(model, {"0.weight": 7, "0.bias": 7, "2.weight": 7})
    others = int((model[2].weight != 0).sum())
    sensitivity = {"0.weight": torch.ones(5, 6), "2.weight": 100 * torch.ones(4, 5)}
    weights = {"0.weight": model[0].weight.detach(), "2.weight": model[2].weight.detach()}
    found = saliency(weights, sensitivity)
    assert torch.isinf(found["0.weight"][model[0].weight == 0]).all()
    least = float(found["0.weight"][torch.isfinite(found["0.weight"])].median())
    kept = found["0.weight"] >= least
    before = model[0].weight.detach().clone()
    remove_below(model, found, least)
    assert torch.equal(model[0].weight != 0, (before != 0) & kept)
    assert (model[2].weight != 0).sum() > others // 2


def test_biases_are_coarsened_as_far_as_the_error_allows():
    model = network()
    model[0].bias.data += 3.3
    exact = model[0].bias.detach().clone()

    def error() -> float:
        return float((model[0].bias - exact).abs().max())

    assert coarsen(model, ["0.bias"], 15, error, allowed=1.0)[0] == {"0.bias": 15}
    model[0].bias.data.copy_(exact)
    assert coarsen(model, ["0.bias"], 1, error, allowed=0.01) == ({}, ("0.bias",))
    model[0].bias.data.copy_(exact)
    assert coarsen(model, ["0.bias"], 1, error, allowed=0.0) == ({}, ())
    assert torch.equal(model[0].bias, exact)
