"""What torch puts around or into a network: wrappers, copies, weights that layers compute."""

import copy
import io

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.optim.swa_utils import AveragedModel

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning import (
    bake,
    deep_copy,
    density,
    hold_zeros,
    penalty,
    prune,
    with_plain_parameters,
)
from prune2onnx.training.fold import fold_batch_norm
from prune2onnx.training.levels import bake_levels, put_on_levels

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

every_wrapper = pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, AveragedModel, lambda m: torch.compile(m, backend="eager")],
    ids=["DataParallel", "AveragedModel", "compile"],
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def moved(model: nn.Module, masks: dict[str, torch.Tensor]) -> int:
    """How many pruned elements are no longer zero after some training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return sum(int((model.get_parameter(n)[~mask] != 0).sum()) for n, mask in masks.items())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@every_wrapper
def test_in_a_wrapper_names_are_those_of_the_plain_network(wrap):
    wrapped = wrap(network())
    assert prune(wrapped, start=0.9) is wrapped
    (wrapped(X).sum() + 1e-3 * penalty(wrapped)).backward()
    assert [layer.name for layer in density(wrapped).layers] == ["0.weight", "2.weight"]
    wrapped.eval()
    before = wrapped(X)
    masks = bake(wrapped)
    torch.testing.assert_close(wrapped(X), before, rtol=0, atol=0)
    assert list(masks) == ["0.weight", "2.weight"]
    hold_zeros(wrapped, masks)
    inner = getattr(wrapped, "_orig_mod", getattr(wrapped, "module", None))
    assert moved(inner, masks) == 0
    put_on_levels(wrapped, {"0.weight": 7})
    assert list(bake_levels(wrapped)) == ["0.weight"]


@pytest.fixture
def one_process(tmp_path):
    path = (tmp_path / "meet").as_uri()
    torch.distributed.init_process_group("gloo", init_method=path, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_would_leave_ddp_with_the_wrong_parameters_is_refused(one_process):
    inner = prune(network())
    wrapped = nn.parallel.DistributedDataParallel(inner)
    wrapped(X).sum().backward()
    assert density(wrapped).size == 8 * 16 + 16 * 2
    within = nn.Sequential(wrapped)
    for verb in (
        lambda: bake(wrapped),
        lambda: bake(within),
        lambda: prune(wrapped),
        lambda: put_on_levels(wrapped, {"0.bias": 3}),
        lambda: bake_levels(wrapped),
        lambda: fold_batch_norm(wrapped, X),
    ):
        with pytest.raises(Prune2OnnxError, match=r"DataParallel cannot.*\(its \.module"):
            verb()
    bake(inner)
    wrapped = nn.parallel.DistributedDataParallel(inner)
    wrapped(X).sum().backward()
    assert inner[0].weight.grad.any()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, saved_and_loaded, lambda m: AveragedModel(m).module, deep_copy],
    ids=["deepcopy", "file", "AveragedModel", "deep_copy"],
)
def test_copies_of_a_held_model_hold_their_zeros(copied):
    model = prune(network(), start=1.0)
    masks = bake(model)
    release = hold_zeros(model, masks)
    other = copied(model)
    release()
    assert moved(other, masks) == 0
    assert moved(model, masks) > 0  # released, which the copy was not


def test_a_held_model_may_be_put_on_levels_and_copied():
    model = prune(network(), start=1.0)
    masks = bake(model)
    hold_zeros(model, masks)
    put_on_levels(model, {"0.weight": 7})
    other = copy.deepcopy(model)
    other(X).square().sum().backward()
    grad = other[0].parametrizations.weight.original.grad
    assert grad.any() and not grad[~masks["0.weight"]].any()


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"module.0.weight": torch.ones(16, 8, dtype=torch.bool)}, "not a parameter"),
        ({"0.weight": torch.ones(8, 16, dtype=torch.bool)}, r"shape \[8, 16\].*\[16, 8\]"),
        ({"0.weight": torch.ones(16, 8)}, r"torch\.float32, expected"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(masks, says):
    with pytest.raises(Prune2OnnxError, match=says):
        hold_zeros(network(), masks)
    with pytest.raises(Prune2OnnxError, match=r"fc9: not a parameter"):
        put_on_levels(network(), {"fc9": 3})


def test_what_is_done_to_a_deep_copy_leaves_the_model_as_it_was():
    model = prune(network(), start=0.9).eval()
    before = model(X)
    other = copy.deepcopy(model)
    bake(other)
    put_on_levels(other, {"0.weight": 7, "0.bias": 7})
    put_on_levels(copy.deepcopy(model), {"0.bias": 7})
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    average = AveragedModel(model)
    average.update_parameters(model)
    bake(average)
    torch.testing.assert_close(average(X), before)
    assert density(model).nnz == density(average).nnz and bake(model)


OLD = "ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning"


def old_weight_norm() -> nn.Sequential:
    model = network()
    torch.nn.utils.weight_norm(model[0])
    return model


def old_spectral_norm() -> nn.Sequential:
    model = network()
    nn.utils.spectral_norm(model[0])
    return model


def new_weight_norm() -> nn.Sequential:
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def new_spectral_norm() -> nn.Sequential:
    model = network()
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def masked() -> nn.Sequential:
    model = network()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[0], "weight", 0.5)  # a container of two masks
    return model


COMPUTED = {
    old_weight_norm: r"under weight_norm; remove it with torch\.nn\.utils\.remove_weight_norm",
    old_spectral_norm: "remove_spectral_norm",
    new_weight_norm: "already parametrized.*remove_parametrizations",
    new_spectral_norm: "already parametrized",
    masked: r"masked by torch\.nn\.utils\.prune;.*prune\.remove\(layer, 'weight'\)",
}


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize(("network", "says"), COMPUTED.items(), ids=[f.__name__ for f in COMPUTED])
def test_a_computed_weight_is_refused_with_its_remedy_and_stays_when_excluded(network, says):
    model = network()
    model(X).sum().backward()
    with pytest.raises(Prune2OnnxError, match=rf"0\.weight: .*{says}.*or exclude the layer"):
        prune(model)
    prune(model, exclude=["0"], start=0.9)
    model(X).sum().backward()
    assert list(bake(model)) == ["2.weight"]
    expected = model.eval()(X)
    model.train()(X)  # the weight has a gradient's history, which deepcopy refuses
    for other in (deep_copy(model), with_plain_parameters(model)):
        torch.testing.assert_close(other.eval()(X), model.eval()(X), rtol=1e-5, atol=1e-6)
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} == set(other.state_dict())
    torch.testing.assert_close(model.eval()(X), expected, rtol=0.2, atol=0.2)


def test_plain_parameters_are_shared_as_the_computed_ones_were():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    prune(model, function="soft-threshold", start=0.7).eval()
    x = torch.ones(2, 6)
    plain = with_plain_parameters(model)
    assert plain[0].weight is plain[1].weight
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
    assert with_plain_parameters(plain) is plain


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.places = nn.LSTM(8, 64), nn.Parameter(torch.ones(500, 64))
        self.norm, self.scale, self.out = nn.LayerNorm(64), nn.Parameter(torch.ones(64)), None
        self.out = nn.Linear(64, 2)


def test_pruning_says_what_it_leaves_alone():
    model = Recurrent()
    every = sum(p.numel() for p in model.parameters())
    with pytest.warns(
        Warning, match=r"32,000 of 51,266 parameters.*: places \(Recurrent, 32,000\)$"
    ):
        prune(model)
    found = density(model)
    assert found.size == 4 * 64 * (8 + 64) + 64 * 2 and found.size + found.others_size == every
    kinds = {other.name: other.layer for other in found.others}
    assert kinds["rnn.bias_hh_l0"] == "LSTM"
    assert (kinds["scale"], kinds["norm.weight"], kinds["out.bias"]) == (
        "Recurrent",
        "LayerNorm",
        "Linear",
    )
    assert not any("rho" in name or "original" in name for name in kinds)
    assert found.whole == pytest.approx((found.nnz + found.others_size) / every)
    bake(model)
    assert density(model).others == found.others


@pytest.mark.filterwarnings(OLD)
def test_each_parameter_counts_once_whatever_computes_the_weight():
    for make in COMPUTED:
        model = make()
        found = density(model)
        assert {other.name for other in found.others} == {"0.bias", "2.bias"}
        prune(model, exclude=["0"])
        put_on_levels(model, {"2.bias": 7})
        others = density(model).others
        assert {other.layer for other in others} == {"Linear"}
        held = sum(p.numel() for n, p in model.named_parameters() if n.startswith("0."))
        assert sum(other.size for other in others) == held + 2


def test_biases_and_norms_alone_are_no_reason_to_warn():
    prune(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2)))


def test_hooks_on_a_weights_gradient_stay():
    model, called = network(), []
    weight = model[0].weight
    accumulates = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulates.register_hook(lambda *_: called.append(1))  # as DistributedDataParallel does
    prune(model)
    model(X).sum().backward()
    bake(model)
    put_on_levels(model, {"0.weight": 7})
    model(X).sum().backward()
    bake_levels(model)
    model(X).sum().backward()
    assert len(called) == 3 and model[0].weight is weight
