"""The processor's mode: set for a while, and put back."""

import pytest
import torch

from prune2onnx.training import denormals


def are_flushed() -> bool:
    return float(torch.tensor(1e-39) * 0.5) == 0


def test_modes_nest_and_are_put_back():
    assert not are_flushed()
    with denormals(flushed=True):
        assert are_flushed()
        with denormals(flushed=False):
            assert not are_flushed()
        assert are_flushed()
    with pytest.raises(ZeroDivisionError), denormals(flushed=True):
        1 / 0  # noqa: B018
    assert not are_flushed()
