"""The CIFAR networks: those of the papers; ResNets under the names of the published weights."""

import numpy as np
import pytest
import torch
from places import MODEL_FILES
from safetensors.torch import load_file

from prune2onnx.callables import call_with, load_callable
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.runtime.session import session
from prune2onnx.training.export import export

RESNET = MODEL_FILES / "resnet_cifar.py"


def build(name: str, **available: object) -> torch.nn.Module:
    spec = f"{RESNET}:{name}"
    return call_with(load_callable(spec), spec, **available)


@pytest.mark.parametrize(
    ("name", "millions", "layers"),
    [("resnet20", 0.27, 20), ("resnet32", 0.46, 32), ("resnet56", 0.85, 56)],
)
def test_sizes_are_those_of_the_paper(name, millions, layers):
    model = build(name)  # table 6 of arXiv 1512.03385
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    assert sum(isinstance(module, kinds) for module in model.modules()) == layers
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_other_images_and_classes():
    model = build("resnet20", input_shape=(1, 9, 14), classes=3)
    assert model(torch.zeros(2, 1, 9, 14)).shape == (2, 3)
    with pytest.raises(Prune2OnnxError, match=r"\[64\]"):
        build("resnet20", input_shape=(64,), classes=3)


def test_the_shortcut_takes_every_second_pixel_and_adds_zero_channels():
    block = build("resnet20").layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 16, 6, 6)
    y = block(x).detach()
    assert y.shape == (1, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_published_weights_load_and_the_export_agrees(real_data):
    file = real_data / "weights" / "resnet20_cifar10.safetensors"
    if not file.exists():
        pytest.skip(f"no {file}")
    model = build("resnet20").eval()
    loaded = model.load_state_dict(load_file(file), strict=False)
    assert not loaded.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    proto = export(model, (3, 32, 32))
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)
    x = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()
    (got,) = session(proto).run(None, {"input": x})
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_vgg16_has_thirteen_convolutions_and_takes_no_small_images():
    spec = f"{RESNET.with_name('vgg.py')}:vgg16"
    model = call_with(load_callable(spec), spec)
    assert sum(p.numel() for p in model.parameters()) == 14_724_042
    kinds = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in kinds] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert model.eval()(torch.zeros(2, 3, 40, 32)).shape == (2, 10)
    with pytest.raises(Prune2OnnxError, match=r"at least 32x32 .* \[3, 28, 28\]"):
        call_with(load_callable(spec), spec, input_shape=(3, 28, 28))
