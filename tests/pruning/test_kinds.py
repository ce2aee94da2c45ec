"""Every kind of layer: pruned, baked, put on levels and exported, with its zeros and its name."""

import copy

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from prune2onnx.pruning import bake, deep_copy, density, hold_zeros, penalty, prune
from prune2onnx.runtime.session import session
from prune2onnx.training.export import Template, export
from prune2onnx.training.exporting.arrangement import rearranged
from prune2onnx.training.levels import bake_levels, put_on_levels


class Net(nn.Module):
    """One layer between float inputs [n, 5, 16] and 3 scores."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if isinstance(layer, nn.RNNBase):
            return self.out(layer(x)[0][:, -1])
        if isinstance(layer, nn.RNNCellBase):
            h = layer(x[:, 0])
            return self.out(h[0] if isinstance(h, tuple) else h)
        if isinstance(layer, nn.MultiheadAttention):
            return self.out(layer(x, x, x)[0].mean(1))
        if isinstance(layer, nn.Embedding):
            return self.out(layer((x[..., 0].abs() * 3).long().clamp(max=9)).mean(1))
        if isinstance(layer, nn.Bilinear):
            return self.out(layer(x[:, 0], x[:, 1]))
        return self.out(layer(x).mean(1))


def attention(**sizes: int) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(16, 2, batch_first=True, **sizes)


KINDS = {
    "LSTM": (lambda: nn.LSTM(16, 12, batch_first=True), 12),
    "LSTM, 2 layers, both ways": (
        lambda: nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True),
        16,
    ),
    "LSTM without bias": (lambda: nn.LSTM(16, 12, batch_first=True, bias=False), 12),
    "GRU": (lambda: nn.GRU(16, 12, batch_first=True), 12),
    "RNN": (lambda: nn.RNN(16, 12, batch_first=True), 12),
    "LSTMCell": (lambda: nn.LSTMCell(16, 12), 12),
    "GRUCell": (lambda: nn.GRUCell(16, 12), 12),
    "attention": (attention, 16),
    "attention with own keys": (lambda: attention(kdim=16, vdim=16), 16),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 16),
    "Embedding": (lambda: nn.Embedding(10, 16), 16),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 12), 12),
}
# torch's exporter has no operator for these
NOT_EXPORTED = ("LSTM without bias",)
X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))

every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str) -> Net:
    torch.manual_seed(0)
    make, width = KINDS[kind]
    return Net(make(), width)


def matrices(model: nn.Module) -> set[str]:
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "norm" not in name
    }


@every_kind
def test_every_matrix_is_pruned_and_what_is_baked_computes_the_same(kind):
    model = network(kind)
    names = matrices(model)
    prune(model, start=0.7)
    assert {layer.name for layer in density(model).layers} == names
    assert all(other.name.rpartition(".")[2] in ("bias", *_norm()) or "bias" in other.name
               for other in density(model).others)  # fmt: skip
    before = model(X).detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X).square().sum() + 1e-3 * penalty(model)).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert not torch.equal(model(X), before)  # the trained tensors are those that compute
    model.eval()
    with torch.no_grad():  # torch's fast path of attention, too
        expected = model(X)
    with torch.enable_grad():
        torch.testing.assert_close(model(X), expected)
    masks = bake(model)
    assert masks.keys() == names and not all(mask.all() for mask in masks.values())
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    assert {name for name, _ in model.named_parameters()} >= names


def _norm() -> tuple[str, ...]:
    return ("weight",)  # of LayerNorm


@every_kind
def test_copies_have_weights_of_their_own(kind):
    model = prune(network(kind), start=0.7)
    model(X).sum().backward()
    for copied in (deep_copy(model), copy.deepcopy(model)):
        torch.testing.assert_close(copied(X), model(X), rtol=0, atol=0)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2)
        assert not torch.equal(copied(X), model(X))
    copied = deep_copy(model)
    bake(copied)
    model.double()
    assert model(X.double()).dtype == torch.float64


@every_kind
def test_held_zeros_and_levels_reach_the_graph(kind):
    model = network(kind)
    prune(model, start=0.7)
    masks = bake(model)
    release = hold_zeros(model, masks)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model(X).square().sum().backward()
    optimizer.step()
    release()
    put_on_levels(model, dict.fromkeys(masks, 7))
    torch.testing.assert_close(model(X).sum(), model(X).sum())
    scales = bake_levels(model.eval())
    if kind in NOT_EXPORTED:
        return
    graph = export(model, (5, 16))
    assert Template(model, (5, 16)).exact
    with torch.no_grad():
        expected = model(X).numpy()
    (got,) = session(graph).run(None, {"input": X.numpy()})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    left = sum(int(torch.count_nonzero(model.get_parameter(name))) for name in masks)
    found = [arrays[name] for name in masks if name in arrays]
    assert sum(int(np.count_nonzero(array)) for array in found) == left
    assert sum(array.size for array in found) == sum(mask.numel() for mask in masks.values())
    steps = {float(scale) for scale in scales.values()}
    for array in found:
        values = np.unique(array[array != 0])
        assert any(np.allclose(values / s, np.rint(values / s), atol=1e-3) for s in steps) or (
            len(values) <= 28  # both directions of a layer, each on its scale
        )


@every_kind
def test_a_template_is_filled_as_a_new_export_and_gives_values_back(kind):
    if kind in NOT_EXPORTED:
        pytest.skip("not exported")
    model = network(kind).eval()
    template = Template(model, (5, 16))
    graph = template.filled(model)
    with torch.no_grad():
        expected = model(X).numpy()
    (got,) = session(graph).run(None, {"input": X.numpy()})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    other = deep_copy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    names = {t.name for t in graph.graph.initializer if template.sources(t.name)}
    template.assign(
        other,
        {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer if t.name in names},
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_rows_of_a_table_are_pruned_whole_while_other_weights_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[::2] *= 0.1
    prune(model, granularity={"*": "weight", "0": "channel"}, start=0.5)
    masks = bake(model)
    assert torch.equal(masks["0.weight"], masks["0.weight"][:, :1].expand(40, 8))
    assert not masks["0.weight"][::2].any() and masks["0.weight"][1::2].all()
    assert masks["1.weight"].any() and not masks["1.weight"].all(1).all()


def test_tied_tables_and_heads_are_one_weight():
    table, head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
    head.weight = table.weight
    model = prune(nn.Sequential(table, head), start=0.5)
    assert [layer.name for layer in density(model).layers] == ["0.weight"]
    bake(model)
    assert model[0].weight is model[1].weight


def test_what_cannot_be_pruned_is_left_alone_and_listed():
    model = nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Linear(8, 800))
    prune(model)
    assert [layer.name for layer in density(model).layers] == ["1.weight"]
    assert "0.weight" in {other.name for other in density(model).others}


def test_one_of_equal_values_gives_no_arrangement():
    state = {"a": np.float32([[1, 2], [3, 4]]), "b": np.float32([5, 6])}
    made = {"x": np.float32([[4, 2, 6], [1, 3, 5]]), "other": np.float32([1, 7])}
    found = rearranged(made, state, state)
    assert found.keys() == {"x"} and found["x"].sources == ("a", "b")
    np.testing.assert_array_equal(found["x"].gathered(state), made["x"])
    back = found["x"].scattered(made["x"], {n: np.zeros_like(v) for n, v in state.items()})
    assert all(np.array_equal(back[name], state[name]) for name in state)
    assert rearranged(made, {"a": np.float32([1, 2, 2])}, ["a"]) == {}
