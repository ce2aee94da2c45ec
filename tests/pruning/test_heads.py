"""Attention heads and neurons of transformers go whole, and are removed exactly."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from prune2onnx.errors import PruningWarning
from prune2onnx.pruning import channel_thresholds_of, prunable_weights, prune_channels
from prune2onnx.runtime.session import session
from prune2onnx.shrinking.shrink import multiply_adds, shrink, structure
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.export import export

HEADS, WIDE, INNER, TOKENS = 4, 16, 24, 5
X = (TOKENS, WIDE)


class Encoder(nn.Module):
    """torch's own layer: one matrix for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDE, HEADS, INNER, 0.0, batch_first=True)
        self.last = nn.Linear(WIDE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x).mean(1))


class Attention(nn.Module):
    """MultiheadAttention beside a residual sum, or three projections as transformers has them."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        if apart:
            self.q, self.k, self.v, self.o = (nn.Linear(WIDE, WIDE) for _ in range(4))
        else:
            self.own = nn.MultiheadAttention(WIDE, HEADS, batch_first=True)
        self.norm, self.last = nn.LayerNorm(WIDE), nn.Linear(WIDE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.apart:
            each = (self.q, self.k, self.v)
            q, k, v = (one(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for one in each)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            y = self.o(mixed.transpose(1, 2).flatten(2))
        else:
            y = self.own(x, x, x, need_weights=False)[0]
        return self.last(self.norm(x + y).mean(1))


def ready(model: nn.Module, **settings: object):
    """The thresholds on a network, and its multiply-adds before."""
    graph = export(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        thresholds = prune_channels(
            model,
            structure(graph),
            {},
            speed=1.0,
            chosen=tuple(prunable_weights(model)),
            **settings,
        )
    return thresholds, multiply_adds(graph)


def heads_left(matrix: torch.Tensor) -> list[bool]:
    """Which heads of a projection [k * WIDE, in] have any weight."""
    rows = matrix.detach().view(-1, HEADS, WIDE // HEADS, matrix.shape[1])
    return rows.abs().sum((0, 2, 3)).bool().tolist()


MAKE = {
    "encoder": Encoder,
    "attention": lambda: Attention(False),
    "projections": lambda: Attention(True),
}


@pytest.mark.parametrize("name", MAKE)
def test_heads_and_neurons_are_whole_or_zero_and_removed_exactly(name):
    torch.manual_seed(0)
    model = MAKE[name]()
    for parameter in model.parameters():  # biases that are not zero
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    thresholds, before = ready(model, start=1.0)
    with torch.no_grad():
        thresholds.rho.add_(0.3 * torch.randn(len(thresholds.rho)))
        thresholds.rho[thresholds.count :] = -10.0  # branches stay
    model.eval()
    x = torch.randn(3, *X)
    expected, left = model(x), float(thresholds.macs_left())
    assert 0.1 < left < 1
    thresholds.bake()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)

    kept = {
        "encoder": lambda: model.layer.self_attn.in_proj_weight,
        "attention": lambda: model.own.in_proj_weight,
        "projections": lambda: torch.cat([model.q.weight, model.k.weight, model.v.weight]),
    }[name]()
    alive = heads_left(kept)
    assert 0 < sum(alive) < HEADS
    Deployment(X).propagate_constants(model)
    small = shrink(export(model, X)).model
    assert abs(multiply_adds(small) / before - left) < 1e-6
    (got,) = session(small).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_penalty_prunes_a_head_that_adds_nothing_first():
    torch.manual_seed(0)
    model = Attention(False)
    with torch.no_grad():
        model.own.in_proj_weight.view(3, HEADS, -1)[:, 2] *= 0.5
    thresholds, _ = ready(model, start=0.3)
    optimizer = torch.optim.Adam([thresholds.rho], 0.05)
    while all(heads_left(model.own.in_proj_weight)):
        optimizer.zero_grad()
        (model.train()(torch.randn(3, *X)).sum() * 0 + thresholds.penalty()).backward()
        optimizer.step()
    assert heads_left(model.own.in_proj_weight) == [True, True, False, True]
    assert channel_thresholds_of(model) is thresholds


def test_what_keeps_its_channels_is_named_with_its_share():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.LSTM(8, 16, batch_first=True)
            self.hidden, self.last = nn.Linear(16, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.hidden(self.read(x)[0]).relu())

    model = Reader()
    found = structure(export(model, (3, 8)))
    every = sum(parameter.numel() for parameter in model.parameters())
    message = rf"1,536 of {every:,} parameters keep all their channels.*read\.weight_hh_l0 \(LSTM"
    with pytest.warns(PruningWarning, match=message):
        prune_channels(model, found, {}, speed=1.0, chosen=tuple(prunable_weights(model)))
