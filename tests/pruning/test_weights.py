"""Learned thresholds: the functions, their gradients and limits, and prune / penalty / bake."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.pruning import (
    FUNCTIONS,
    bake,
    density,
    hold_zeros,
    penalty,
    prune,
    scale_thresholds,
    thresholds_of,
    weigh_by_bits,
)
from prune2onnx.pruning.functions import differentiable, survivor_gate
from prune2onnx.pruning.rate import VALUE_BITS, survivor_bits
from prune2onnx.runs.sections import Prune

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def away_from_kinks(t: float) -> torch.Tensor:
    w = torch.linspace(-2, 2, 81, dtype=torch.float64)
    return w[((w.abs() - t).abs() > 1e-3) & (w.abs() > 1e-3)].requires_grad_()


@every_function
@pytest.mark.parametrize("t", [0.05, 0.6])
def test_gradients_are_those_of_finite_differences(name, t):
    w, threshold = away_from_kinks(t), torch.tensor([t], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, t: differentiable(FUNCTIONS[name], w, t, 5.0), (w, threshold)
    )
    assert torch.autograd.gradcheck(
        lambda w, t: differentiable(survivor_gate, w, t, 5.0), (w, threshold)
    )


@every_function
def test_threshold_gradient_sums_over_its_channel(name):
    w = torch.randn(3, 7, dtype=torch.float64).requires_grad_()
    t = torch.full((3, 1), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, t: differentiable(FUNCTIONS[name], w, t, 4.0), (w, t))


def test_threshold_linear_is_the_papers_equation():
    w, t, beta = torch.linspace(-3, 3, 61, dtype=torch.float64), torch.tensor(0.7), 3.0
    expected = (
        torch.relu(w - t)
        + t * torch.sigmoid(beta * (w - t))
        - torch.relu(-w - t)
        - t * torch.sigmoid(beta * (-w - t))
    )
    value = differentiable(FUNCTIONS["threshold-linear"], w, t, beta)
    torch.testing.assert_close(value, expected)


@every_function
def test_functions_are_odd_and_keep_large_weights(name):
    w, t = torch.randn(1000, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    v = differentiable(FUNCTIONS[name], w, t, 8.0)
    torch.testing.assert_close(differentiable(FUNCTIONS[name], -w, t, 8.0), -v)
    assert differentiable(FUNCTIONS[name], torch.zeros(1), t, 8.0) == 0
    far = torch.tensor([1e6], dtype=torch.float64)
    torch.testing.assert_close(differentiable(FUNCTIONS[name], far, t, 8.0), far, rtol=1e-6, atol=0)


@every_function
def test_limits_of_threshold_and_sharpness(name):
    w = torch.tensor([-2.0, -0.6, -0.4, 0.4, 0.6, 2.0], dtype=torch.float64)
    small = torch.tensor(1e-9, dtype=torch.float64)
    torch.testing.assert_close(differentiable(FUNCTIONS[name], w, small, 1e3), w)
    half = torch.tensor(0.5, dtype=torch.float64)
    hard = w * (w.abs() > 0.5) - (
        0.5 * w.sign() * (w.abs() > 0.5) if name == "soft-threshold" else 0
    )
    torch.testing.assert_close(differentiable(FUNCTIONS[name], w, half, 1e4), hard)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2), nn.Flatten(), nn.Linear(150, 5)
    )


X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@every_function
@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("thresholds", ["layer", "channel"])
def test_bake_keeps_evaluation_output_names_and_gives_exact_zeros(name, granularity, thresholds):
    model = network().eval()
    names = set(model.state_dict())
    prune(model, function=name, granularity=granularity, thresholds=thresholds, start=0.9)
    before, counted = model(X), density(model)
    masks = bake(model)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    assert set(model.state_dict()) == names
    assert not parametrize.is_parametrized(model[0])
    assert 0 < counted.total < 1
    assert density(model).nnz == counted.nnz == sum(int(m.sum()) for m in masks.values())
    for key, mask in masks.items():
        weight = model.state_dict()[key]
        assert not torch.signbit(weight[~mask]).any() and not weight[~mask].any()
    if granularity == "channel":
        for key, axis in (("0.weight", 0), ("2.weight", 1), ("4.weight", 0)):
            mask = masks[key].movedim(axis, 0).flatten(1)
            assert (mask.all(1) | ~mask.any(1)).all()


def test_penalty_counts_survivors_and_pushes_thresholds_up():
    model = prune(network(), beta=1e4, start=0.5)
    assert penalty(model).item() == pytest.approx(density(model).nnz, rel=0.02)
    penalty(prune(model := network())).backward()
    for module in (model[0], model[2], model[4]):
        assert module.parametrizations.weight[0].rho.grad < 0  # descent raises the threshold


def test_importance_and_balance_scale_a_layers_penalty():
    plain = penalty(prune(network()))
    doubled = penalty(prune(network(), importance={"4": 2.0}))
    linear_only = penalty(prune(network(), include=["4"]))
    torch.testing.assert_close(doubled, plain + linear_only)
    # 36, 96 and 750 weights: with balance 1 the small layers count for 36/750 and 96/750.
    balanced = penalty(prune(network(), balance=1.0))
    parts = [penalty(prune(network(), include=[n])) for n in ("0", "2", "4")]
    torch.testing.assert_close(balanced, parts[0] * 36 / 750 + parts[1] * 96 / 750 + parts[2])


def test_thresholds_learn_and_stay_positive():
    model = prune(network(), start=0.05)
    optimizer = torch.optim.Adam(thresholds_of(model), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (model(X).square().mean() + 1e-2 * penalty(model)).backward()
        optimizer.step()
    final = density(model)
    assert final.total < 0.5
    assert all(layer.threshold > 0 for layer in final.layers)


def test_include_exclude_choose_by_layer_or_weight_name():
    kept = [layer.name for layer in density(prune(network(), include=["0", "4.weight"])).layers]
    assert kept == ["0.weight", "4.weight"]
    assert [x.name for x in density(prune(network(), exclude=["[02]"])).layers] == ["4.weight"]


def test_a_shared_weight_is_pruned_and_baked_once():
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    alone = penalty(prune(nn.Sequential(copy.deepcopy(tied[0])), start=0.7))
    prune(tied, start=0.7).eval()
    torch.testing.assert_close(penalty(tied), alone)
    before = tied(torch.ones(2, 6))
    masks = bake(tied)
    assert list(masks) == ["0.weight"] and tied[0].weight is tied[1].weight
    torch.testing.assert_close(tied(torch.ones(2, 6)), before, rtol=0, atol=0)


def test_a_table_that_is_also_the_weight_of_a_linear_layer_is_pruned_once():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embed"].weight
    prune(model)
    with torch.no_grad():
        model["embed"].parametrizations.weight.original[0] = 0
    assert not model["head"].weight[0].any()
    assert torch.equal(model["head"].weight, model["embed"].weight)
    bake(model)
    assert model["head"].weight is model["embed"].weight


def test_a_weight_that_another_type_of_layer_uses_is_refused():
    model = nn.ModuleDict({"norm": nn.LayerNorm((7, 4)), "head": nn.Linear(4, 7)})
    model["head"].weight = model["norm"].weight
    with pytest.raises(Prune2OnnxError, match=r"head\.weight: shared with norm, a LayerNorm"):
        prune(model)


def test_weight_norm_is_refused_unless_it_is_excluded():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(Prune2OnnxError, match=r"0\.weight: already parametrized"):
        prune(model)
    prune(model, exclude=["0"])
    assert [layer.name for layer in density(model).layers] == ["1.weight"]


def test_bake_keeps_dtype_identity_and_an_optimizer_goes_on():
    model = network().double()
    weight = model[4].weight
    prune(model, start=0.8)
    bake(model)
    assert model[4].weight is weight and weight.dtype == torch.float64


def test_held_zeros_stay_zero_while_survivors_move():
    model = prune(network(), start=0.9)
    masks = bake(model)
    before = model[4].weight.detach().clone()
    lift = hold_zeros(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert not model[4].weight[~masks["4.weight"]].any()
    assert (model[4].weight != before)[masks["4.weight"]].any()
    lift()
    model(X).square().mean().backward()
    assert model[4].weight.grad[~masks["4.weight"]].any()


def test_an_all_zero_weight_is_pruned_without_division_by_zero():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    for granularity in ("weight", "channel"):
        pruned = prune(copy.deepcopy(model), granularity=granularity)
        (penalty(pruned) + pruned(torch.ones(1, 4)).sum()).backward()
        grad = pruned[0].parametrizations.weight.original.grad
        assert torch.isfinite(grad).all()
        assert not bake(pruned)["0.weight"].any()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"include": ["conv*"]}, RecipeError, "'conv\\*' matches no prunable weight.*0.weight"),
        ({"exclude": ["fc9"]}, RecipeError, "exclude pattern 'fc9'"),
        ({"importance": {"fc9": 2.0}}, RecipeError, "importance pattern 'fc9'"),
        ({"exclude": ["*"]}, RecipeError, "leave no weight"),
        ({"function": "treshold-linear"}, RecipeError, "did you mean 'threshold-linear'"),
        ({"granularity": "filter"}, RecipeError, "not one of weight, channel"),
        ({"thresholds": "row"}, RecipeError, "not one of layer, channel"),
        ({"beta": 0.0}, RecipeError, "beta is 0.0"),
        ({"balance": float("nan")}, RecipeError, "balance is nan"),
        ({"importance": {"0": -1.0}}, RecipeError, "importance of '0' is -1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, says):
    model = network()
    with pytest.raises(error, match=says):
        prune(model, **arguments)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_weights_that_cannot_be_pruned_are_named_and_nothing_is_changed():
    model = network()
    nn.init.constant_(model[4].weight, float("nan"))
    with pytest.raises(Prune2OnnxError, match=r"4\.weight: 750 of 750 values are NaN"):
        prune(model)
    assert not parametrize.is_parametrized(model[0])
    prune(model, exclude=["4"])
    with pytest.raises(Prune2OnnxError, match=r"0\.weight: already parametrized"):
        prune(model)
    with pytest.raises(Prune2OnnxError, match="no layer to prune"):
        prune(nn.Sequential(nn.ReLU()))
    with pytest.raises(Prune2OnnxError, match="call prune"):
        penalty(nn.Linear(2, 2))
    with pytest.raises(Prune2OnnxError, match="call prune"):
        bake(nn.Linear(2, 2))
    with pytest.raises(Prune2OnnxError, match="lazy layer"):
        prune(nn.Sequential(nn.LazyLinear(3)))


def test_a_survivor_costs_less_where_others_are():
    alive = torch.zeros(8, 8, dtype=torch.bool)
    alive[0], alive[:, 0] = True, True
    bits = survivor_bits(alive)
    assert bits[0, 0] < bits[0, 5] < bits[5, 5]
    assert torch.allclose(bits, bits.T)
    even = survivor_bits(torch.ones(4, 4, 3, 3, dtype=torch.bool))
    assert even.shape == (4, 4, 1, 1)
    assert torch.allclose(even, torch.tensor(VALUE_BITS), atol=0.6)
    assert survivor_bits(torch.zeros(5, dtype=torch.bool)).shape == (5,)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_the_penalty_counts_bytes_on_request(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30))
    prune(model, granularity=granularity, beta=1e4)
    count = penalty(model)
    weigh_by_bits(model)
    nbytes = penalty(model)
    # nearly all survive, so a position costs next to nothing and a value its bits
    assert float(nbytes.detach()) == pytest.approx(float(count.detach()) * VALUE_BITS / 8, rel=0.2)
    nbytes.backward()
    assert model[0].parametrizations.weight[0].rho.grad is not None


@pytest.mark.parametrize("factor", [0.5, 1.0, 40.0])
def test_thresholds_are_multiplied_by_one_factor(factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    prune(model, thresholds="channel", start=0.3)
    before = [layer.threshold for layer in density(model).layers]
    scale_thresholds(model, factor)
    after = [layer.threshold for layer in density(model).layers]
    assert after == pytest.approx([factor * t for t in before], rel=1e-5)


def test_defaults_are_those_of_the_recipe():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(prune).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    recipe = Prune().model_dump()
    assert defaults.pop("importance") is None and not recipe["importance"]
    # one a layer, as in the paper; for short runs of compress one a channel was better
    assert (defaults.pop("thresholds"), recipe["thresholds"]) == ("layer", "channel")
    assert defaults == {name: recipe[name] for name in defaults}
