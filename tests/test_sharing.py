"""Codebooks on a module: gradients summed over members, names and ties kept."""

import torch
from torch import nn

from prune2onnx.sharing import bake_codebooks, share


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 0.1] = 0
    return model


def test_a_centroids_gradient_is_the_sum_over_its_members():
    model, x = network(), torch.randn(7, 6)
    share(model, {"0.weight": 3}, pruned=["0.weight"])
    weight = model[0].weight.detach().clone()
    model(x).square().sum().backward()
    centroids = model[0].parametrizations.weight.original
    plain = network()
    with torch.no_grad():
        plain[0].weight.copy_(weight)
    plain(x).square().sum().backward()
    for level, centroid in enumerate(centroids.tolist()):
        expected = plain[0].weight.grad[weight == centroid].sum()
        torch.testing.assert_close(centroids.grad[level], expected)


def test_baking_keeps_names_zeros_and_output():
    model, x = network(), torch.randn(7, 6)
    names, zeros = set(model.state_dict()), model[0].weight == 0
    share(model, {"0.weight": 3, "0.bias": 2, "2.weight": 200}, pruned=["0.weight", "2.weight"])
    assert model[0].bias.unique().numel() == 2
    before = model(x)
    assert set(bake_codebooks(model)) == {"0.weight", "0.bias", "2.weight"}
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert set(model.state_dict()) == names
    assert torch.equal(model[0].weight == 0, zeros)
    assert model[0].weight.unique().numel() == 4
    # 20 values have room in 200 levels: nothing changed
    assert torch.equal(model[2].weight, network()[2].weight)


def test_a_shared_parameter_has_one_codebook():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    share(model, {"0.weight": 2})
    assert sum(p.numel() for n, p in model.named_parameters() if "weight" in n) == 2
    assert bake_codebooks(model) == ("0.weight",)
    assert model[0].weight is model[1].weight


def test_a_weight_pruned_to_nothing_survives():
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    share(model, {"0.weight": 4}, pruned=["0.weight"])
    model(torch.ones(1, 3)).sum().backward()
    bake_codebooks(model)
    assert not model[0].weight.any()
