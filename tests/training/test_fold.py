"""BatchNorm folding: same output, zeros kept, and only where it is exact."""

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.training.fold import fold_batch_norm


def warmed(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Gives BatchNorm statistics, scales and signs worth folding."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -1, 1)
    model.train()
    for _ in range(3):
        model(x + torch.randn_like(x))
    return model.eval()


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (4, 8)),
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (4, 8, 8)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6), (4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6), (4, 5, 5)),
        (nn.Linear(5, 7), nn.BatchNorm1d(7), (5,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_output_is_the_same_and_zeros_stay_positive_zero(layer, norm, shape):
    x = torch.randn(4, *shape)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.1] = 0
    model = warmed(nn.Sequential(layer, norm, nn.ReLU()), x)
    zeros, before = layer.weight == 0, model(x)
    assert fold_batch_norm(model, x) == {"1": "0"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert isinstance(model[1], nn.Identity)
    assert torch.equal(model[0].weight == 0, zeros)
    assert not torch.signbit(model[0].weight[zeros]).any()


class Residual(nn.Module):
    """Two uses of one convolution, and a BatchNorm that follows an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.once, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.norm(self.twice(x)) + self.twice(x)
        return self.last(y + self.other(self.once(x)))


def test_what_cannot_be_folded_exactly_is_left():
    x = torch.randn(4, 3, 5, 5)
    model = warmed(Residual(), x)
    before = model(x)
    assert fold_batch_norm(model, x) == {"other": "once"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


class Sequence(nn.Module):
    """BatchNorm1d over the positions of a sequence, as many as the layer has features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.fc(x))


class Stubborn(nn.Conv2d):
    """A layer that ignores its bias."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Sequence(), (6, 5)),
        (nn.Sequential(Stubborn(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (3, 6, 6)),
    ],
    ids=["positions", "subclass"],
)
def test_layers_that_only_look_alike_are_left(model, shape):
    x = torch.randn(4, *shape)
    before = warmed(model, x)(x)
    assert fold_batch_norm(model, x) == {}
    torch.testing.assert_close(model(x), before)


def test_same_padding_is_folded_too():
    x = torch.randn(4, 3, 6, 6)
    model = warmed(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)), x)
    before = model(x)
    assert fold_batch_norm(model, x) == {"1": "0"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_model_without_batch_norm_is_not_traced():
    class Untraceable(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    assert fold_batch_norm(Untraceable(), torch.ones(2, 3)) == {}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_a_layer_that_computes_its_weight_or_bias_takes_no_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(6, 6)),
        nn.BatchNorm1d(6),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
    )
    torch_prune.l1_unstructured(model[2], "bias", 0.5)
    x = torch.randn(16, 6)
    model(x).sum().backward()
    expected = model.eval()(x)
    assert fold_batch_norm(model, x[:2]) == {"5": "4"}
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_traced_says_why():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    with pytest.raises(Prune2OnnxError, match=r"Branch: .*which folding BatchNorm needs: its"):
        fold_batch_norm(Branch(), torch.ones(2, 4))
