"""The processor's mode is set for a while, then restored."""

import pytest
import torch

from prune2onnx.training.denormals import denormals


def are_flushed() -> bool:
    return float(torch.tensor(1e-39) * 0.5) == 0


def test_modes_nest_and_are_restored():
    assert not are_flushed()
    with denormals(flushed=True):
        assert are_flushed()
        with denormals(flushed=False):
            assert not are_flushed()
        assert are_flushed()
    with pytest.raises(ZeroDivisionError), denormals(flushed=True):
        1 / 0  # noqa: B018
    assert not are_flushed()
