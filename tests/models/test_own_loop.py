"""The example programs of training loops run, and end in files that hold their size."""

import sys

import numpy as np
import onnx
import torch
from places import ROOT

from prune2onnx.runtime.session import session


def loop(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "models"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


def check(small: torch.nn.Module, file: bytes, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected = small(images[:8]).numpy()
    opened = session(onnx.load_model_from_string(file))
    (got,) = opened.run(None, {"input": images[:8].numpy()})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_plain_loop_ends_in_its_size(monkeypatch, capsys):
    own = loop("own_loop", monkeypatch)
    small, file, before, after = own.train(4_000, dense=150, steps=300)
    assert 3_920 <= len(file) <= 4_000 and after <= before + 5
    check(small, file, own.digits()[0])
    assert "quantize" in capsys.readouterr().out


def test_a_loop_with_accelerate_ends_in_its_size(monkeypatch, capsys):
    own = loop("own_loop_accelerate", monkeypatch)
    _, small, file = own.train(4_000, epochs=8, precision="bf16")
    assert 3_920 <= len(file) <= 4_000
    check(small, file, own.digits()[0])
