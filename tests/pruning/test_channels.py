"""Channel pruning: thresholds on channel groups, exact, and pressed by what channels cost."""

import copy

import numpy as np
import pytest
import torch
from tiny import tiny_conv, tiny_mlp, tiny_recipe
from torch import nn
from torch.nn import functional

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning import (
    ChannelThresholds,
    channel_thresholds_of,
    prunable_weights,
    prune_channels,
)
from prune2onnx.shrinking.shrink import multiply_adds, shrink, structure
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.export import export
from prune2onnx.training.fit import fit
from prune2onnx.training.fold import fold_batch_norm

IMAGE = (1, 8, 8)


class Residual(nn.Module):
    """A stem, a block that adds to it, and one that doubles the channels by padding with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c1, self.b1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c2, self.b2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c3, self.b3 = nn.Conv2d(6, 10, 3, 2, padding=1, bias=False), nn.BatchNorm2d(10)
        self.last = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        x = functional.relu(x + self.b2(self.c2(functional.relu(self.b1(self.c1(x))))))
        y = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.last(functional.relu(y + self.b3(self.c3(x))).mean((2, 3)))


class Plain(nn.Module):
    """No BatchNorm; a grouped, a depthwise and a transposed convolution, and a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.wide, self.last = nn.Linear(4 * 144, 20), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.depthwise(functional.relu(self.grouped(self.first(x)))))
        x = functional.relu(self.up(x)).flatten(1)
        return self.last(functional.relu(self.wide(x)))


class Before(nn.Module):
    """BatchNorm before the convolutions, as in later residual networks: none can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.b1, self.c1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.b2, self.last = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.c1(functional.relu(self.b1(x)))
        return self.last(functional.relu(self.b2(x)).mean((2, 3)))


def ready(model: nn.Module, alike: bool = False, **settings: object):
    """A network with thresholds on its channels, BatchNorm statistics not those of a new one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not alike:
            nn.init.uniform_(module.weight, 0.2, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    model.train()
    model(torch.randn(32, *IMAGE))
    plain = copy.deepcopy(model)
    norms = fold_batch_norm(plain, torch.zeros(2, *IMAGE))
    found = structure(export(plain, IMAGE))
    chosen = settings.pop("chosen", tuple(prunable_weights(model)))
    return prune_channels(model, found, norms, speed=1.0, chosen=chosen, **settings), found


def finished(model: nn.Module) -> nn.Module:
    """The network without thresholds, BatchNorm folded, and dead parts set to zero."""
    channel_thresholds_of(model).bake()
    fold_batch_norm(model, torch.zeros(2, *IMAGE))
    Deployment(IMAGE).propagate_constants(model)
    return model


def test_multiply_adds_are_those_of_a_hand_count():
    model = Plain()
    by_hand = 36 * 8 * 9 + 36 * 8 * 4 * 9 + 36 * 8 * 9 + 36 * 8 * 4 * 4 + 576 * 20 + 60
    assert multiply_adds(export(model, IMAGE)) == by_hand
    assert multiply_adds(export(Residual(), IMAGE)) == 64 * 54 + 2 * 64 * 324 + 16 * 540 + 30


def test_a_residual_sum_couples_the_layers_that_it_adds():
    _, found = ready(Residual())
    rows = {layer.weight: layer.rows for layer in found.layers}
    assert np.array_equal(rows["stem.weight"], rows["c2.weight"])
    assert np.array_equal(rows["c3.weight"][2:8], rows["stem.weight"])
    assert not set(rows["c1.weight"]) & set(rows["stem.weight"])
    assert len(set(rows["c3.weight"])) == 10
    assert found.fixed[rows["last.weight"]].all() and not found.fixed[rows["c3.weight"]].any()


@pytest.mark.parametrize("make", [Residual, Plain, Before])
@pytest.mark.parametrize("threshold", [0.9, 3.0])
def test_what_is_left_is_what_the_shrunk_graph_has(make, threshold):
    model = make()
    before = multiply_adds(export(copy.deepcopy(model), IMAGE))
    thresholds, _ = ready(model, start=threshold)
    with torch.no_grad():  # no group like another, and all branches alive
        thresholds.rho.add_(0.5 * torch.randn(len(thresholds.rho)))
        thresholds.rho[thresholds.count :] = -10.0
    model.eval()
    x = torch.randn(5, *IMAGE)
    expected = model(x)
    left = float(thresholds.macs_left())
    assert left < 1
    model = finished(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    graph = shrink(export(model, IMAGE)).model
    # a channel that is left may turn out to be constant for another reason
    assert 0.98 * before * left < multiply_adds(graph) <= before * left + 0.5


def test_a_channel_is_whole_or_zero_in_training_too_and_pruned_ones_do_not_come_back():
    model = Residual()
    thresholds, found = ready(model, start=0.9)
    model(torch.randn(4, *IMAGE))
    gone = thresholds.gone.clone()
    assert 0 < gone.sum() < len(gone)
    rows = torch.tensor(found.layers[0].rows)
    assert torch.equal(model.bn.weight == 0, gone[rows])
    assert torch.equal(model.bn.bias == 0, gone[rows])
    thresholds.scale_thresholds(0.01)
    model(torch.randn(4, *IMAGE))
    assert torch.equal(thresholds.gone, gone)
    assert not thresholds.alive()[gone].any()


def test_each_layer_keeps_a_channel():
    model = Residual()
    thresholds, found = ready(model, start=50.0)
    alive = thresholds.alive().numpy()
    assert all(alive[layer.rows].any() for layer in found.layers)
    assert float(thresholds.macs_left()) < 0.1
    assert finished(model)(torch.randn(2, *IMAGE)).isfinite().all()


def test_the_penalty_moves_thresholds_only_and_costly_ones_more():
    model = Residual()
    thresholds, found = ready(model, alike=True)
    thresholds.penalty().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("rho"))
    pressed = thresholds.rho.grad.neg()
    rows = {layer.weight: torch.tensor(layer.rows) for layer in found.layers}
    assert (pressed[rows["c1.weight"]] > 0).all()
    # a channel of the sum is in every layer of the first stage, one of c3 alone in nearly none
    assert pressed[rows["stem.weight"]].mean() > 5 * pressed[rows["c3.weight"][:2]].mean()
    assert not pressed[: thresholds.count][torch.tensor(found.fixed)].any()


def test_the_penalty_is_the_cost_where_thresholds_are_clear():
    model = tiny_mlp()
    x = torch.zeros(2, 1, 6, 6)
    found = structure(export(model, (1, 6, 6)))
    thresholds = prune_channels(
        model, found, {}, speed=0.0, chosen=("1.weight", "3.weight"), start=1e-3
    )
    assert float(thresholds.penalty().detach()) == pytest.approx(1.0, abs=0.01)
    assert float(thresholds.left()) == 1.0 and model(x).shape == (2, 3)


def test_channels_of_weights_that_are_not_chosen_stay():
    model = Residual()
    thresholds, found = ready(model, start=50.0, chosen=("c1.weight", "c2.weight", "last.weight"))
    alive = thresholds.alive().numpy()
    rows = {layer.weight: layer.rows for layer in found.layers}
    assert alive[rows["stem.weight"]].all()  # so does what is added to them
    assert alive[rows["c1.weight"]].sum() == 1


def test_a_network_without_a_channel_to_prune_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    found = structure(export(model, IMAGE))
    with pytest.raises(Prune2OnnxError, match=r"no channel can be pruned.*--channels-epochs"):
        prune_channels(model, found, {}, speed=1.0, chosen=("1.weight",))


def test_tied_layers_are_gated_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 3)
            self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(self.first(x.flatten(1)).relu()).relu()
            return self.last(self.two(x).relu())

    model = Twice()
    found = structure(export(model, IMAGE))
    before = multiply_adds(export(model, IMAGE))
    chosen = tuple(prunable_weights(model))
    thresholds = prune_channels(model, found, {}, speed=1.0, chosen=chosen, start=0.99)
    x = torch.randn(3, *IMAGE)
    expected = model.eval()(x)
    left = float(thresholds.macs_left())
    torch.testing.assert_close(finished(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert multiply_adds(shrink(export(model, IMAGE)).model) <= before * left + 0.5


def test_a_branch_is_pruned_whole_and_its_channels_cost_nothing_then():
    model = Residual()
    before = multiply_adds(export(copy.deepcopy(model), IMAGE))
    thresholds, found = ready(model, start=0.01)
    ends = [branch.last for branch in found.branches]
    assert ends == ["c2.weight", "c3.weight"]
    assert [branch.layers for branch in found.branches] == [(1, 2), (3,)]
    assert float(thresholds.macs_left()) == 1.0
    with torch.no_grad():
        thresholds.rho[len(found.fixed)] = 50.0  # its threshold is out of reach
    model.eval()
    x = torch.randn(4, *IMAGE)
    expected = model(x)
    without = 1 - (found.layers[1].macs + found.layers[2].macs) / found.macs
    assert float(thresholds.macs_left()) == pytest.approx(without)
    assert thresholds.densities()["c1.weight"] == thresholds.densities()["c2.weight"] == 0
    model = finished(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    graph = shrink(export(model, IMAGE)).model
    assert "c1.weight" not in {t.name for t in graph.graph.initializer}
    assert multiply_adds(graph) == pytest.approx(before * without)


def test_a_pruned_branch_does_not_come_back_while_the_rest_is_trained(tiny_data, monkeypatch):
    bake = ChannelThresholds.bake

    def without_the_first_branch(thresholds):
        with torch.no_grad():
            thresholds.rho[thresholds.count] = 50.0
        return bake(thresholds)

    monkeypatch.setattr(ChannelThresholds, "bake", without_the_first_branch)
    recipe = tiny_recipe(goal="latency", target_macs=0.9, **{"channels.epochs": 2})
    deployment = Deployment(tiny_data.input_shape)
    fitted = fit(Residual(), tiny_data, recipe, deployment=deployment)
    layers = {name for name, _ in fitted.model.named_parameters() if name.endswith("weight")}
    assert layers == {f"{name}.weight" for name in ("stem", "c1", "c2", "c3", "last")}
    graph = deployment.shrunk(fitted.model).graph
    left = {tensor.name for tensor in graph.initializer} & layers
    # c3 may go, too: a shortcut leads past it
    assert left | {"c3.weight"} == layers - {"c1.weight", "c2.weight"}


def rows_left(thresholds: ChannelThresholds) -> dict[str, tuple[int, int]]:
    """Output channels of each layer: how many are left, and of how many."""
    alive = thresholds.alive()[: thresholds.count].float()
    counts = zip(thresholds.rows @ alive, thresholds.rows.sum(1), strict=True)
    return {n: (int(a), int(b)) for n, (a, b) in zip(thresholds.names, counts, strict=True)}


def test_as_many_channels_as_a_kernel_computes_share_a_threshold_weak_ones_with_weak():
    model = Residual()
    thresholds, found = ready(model, multiple=2)
    scales = model.b1.parametrizations.weight.original.abs()
    pairs = thresholds.producers[1].groups
    assert all((pairs == one).sum() == 2 for one in set(pairs.tolist()))
    firsts = [int(pairs[place]) for place in scales.argsort()]
    assert firsts[0] == firsts[1] and firsts[2] == firsts[3] and firsts[4] == firsts[5]
    # the stem's channels and those that c3 adds have other producers: no block has both
    of_c3 = thresholds.producers[3].groups
    assert set(of_c3[2:8].tolist()) == set(thresholds.producers[0].groups.tolist())
    assert not set(of_c3[2:8].tolist()) & {*of_c3[:2].tolist(), *of_c3[8:].tolist()}
    assert thresholds.count == 3 + 3 + 2 + sum(found.fixed)


def test_a_layer_of_no_more_channels_than_a_block_is_removed_only_with_its_branch():
    model = Residual()
    thresholds, _ = ready(model, multiple=16, start=50.0)
    model(torch.randn(4, *IMAGE))
    left = rows_left(thresholds)
    assert left["stem.weight"] == (6, 6) and left["c1.weight"] == (6, 6)
    assert (
        thresholds.densities()["c1.weight"] == 0
        and not thresholds.alive()[thresholds.count :].any()
    )


def test_what_cannot_be_pruned_is_not_penalized():
    model = Residual()
    thresholds, _ = ready(model, multiple=4, start=0.1)
    inside = thresholds.rows[thresholds.names.index("c1.weight")]
    first, second = (int(one) for one in inside.nonzero().flatten())
    thresholds.penalty().backward()
    assert thresholds.rho.grad[first] < 0 and thresholds.rho.grad[second] < 0
    thresholds.rho.grad = None
    thresholds.gone[second] = True
    thresholds.penalty().backward()
    assert thresholds.rho.grad[first] == 0
    assert (thresholds.rho.grad[thresholds.count :] < 0).all()


@pytest.mark.parametrize("multiple", [2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_layers_keep_a_multiple_or_all(multiple, seed):
    model = Residual()
    thresholds, _ = ready(model, multiple=multiple, start=0.01)
    torch.manual_seed(seed)
    with torch.no_grad():  # blocks of all sizes are pruned, strong ones, too
        thresholds.rho[torch.rand(len(thresholds.rho)) < 0.5] = 20.0
        thresholds.rho[thresholds.count :] = -10.0
    thresholds.scale_thresholds(1.0)
    for name, (left, whole) in rows_left(thresholds).items():
        assert left % multiple == 0 or left == whole or name == "last.weight", name
    model.eval()
    x = torch.randn(4, *IMAGE)
    expected = model(x)
    torch.testing.assert_close(finished(model)(x), expected, rtol=1e-3, atol=1e-4)


def test_expensive_layers_are_penalized_more():
    model = Residual()
    plain = copy.deepcopy(model)
    norms = fold_batch_norm(plain, torch.zeros(2, *IMAGE))
    found = structure(export(plain, IMAGE))
    prices = {layer.weight: 1e-6 for layer in found.layers} | {"c1.weight": 1.0}
    chosen = tuple(prunable_weights(model))
    thresholds = prune_channels(model, found.priced(prices), norms, speed=1.0, chosen=chosen)
    thresholds.penalty().backward()
    pressed = thresholds.rho.grad.neg()
    rows = {layer.weight: torch.tensor(layer.rows) for layer in found.layers}
    assert pressed[rows["c1.weight"]].min() > 100 * pressed[rows["c3.weight"][:2]].max()


@pytest.mark.parametrize("goal", ["latency", "balanced"])
def test_fit_meets_a_budget_of_multiply_adds(goal, tiny_data):
    recipe = tiny_recipe(
        **{"goal": goal, "target_macs": 0.6, "channels.epochs": 12, "target_density": None},
        **{"prune.threshold_lr": 0.05, "channels.multiple": 2},
    )
    deployment = Deployment(tiny_data.input_shape)
    fitted = fit(tiny_conv(), tiny_data, recipe, deployment=deployment)
    before = multiply_adds(export(tiny_conv(), tiny_data.input_shape))
    left = multiply_adds(deployment.shrunk(fitted.model)) / before
    assert 0.3 < left <= 0.6
    assert 0.05 < fitted.density < 0.6  # few zeros: they bring no speed
    assert fitted.error < 20


def test_channel_pruning_needs_a_deployment(tiny_data):
    recipe = tiny_recipe(goal="latency", **{"channels.epochs": 2})
    with pytest.raises(Prune2OnnxError, match="give fit a deployment"):
        fit(tiny_mlp(), tiny_data, recipe)


def test_gradients_are_those_of_finite_differences_and_may_be_gathered_over_batches():
    model = Residual()
    thresholds, found = ready(model, start=0.9)
    model.eval()  # whole or zero: the same function as in training
    thresholds.train()
    x = torch.randn(4, *IMAGE)
    scale = model.bn.parametrizations.weight.original
    model(x).square().sum().backward()
    first = scale.grad.clone()
    model(x).square().sum().backward()  # a second batch before the step
    torch.testing.assert_close(scale.grad, 2 * first)
    assert copy.deepcopy(model)(x).shape == (4, 3)
    alive = thresholds.alive()
    channel = int(alive[torch.tensor(found.layers[0].rows)].nonzero()[0])
    with torch.no_grad():
        changes = []
        for step in (1e-3, -2e-3):
            scale[channel] += step
            changes.append(float(model(x).square().sum()))
        scale[channel] += 1e-3
    assert float(first[channel]) == pytest.approx((changes[0] - changes[1]) / 2e-3, rel=0.03)
