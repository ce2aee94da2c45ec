"""What every test is given: one thread, a process of its own to accelerate, data sets."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import blobs

from prune2onnx.data import Data

torch.set_num_threads(1)  # the networks are tiny


@pytest.fixture(autouse=True)
def one_precision_per_test() -> None:
    """accelerate keeps one precision per process; every test is a process of its own to it."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where there is none."""
    folder = os.environ.get("PRUNE2ONNX_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PRUNE2ONNX_DATA names no folder with the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_data() -> Data:
    """Three classes of [1, 6, 6] examples."""
    return Data("blobs", blobs(240, 1), blobs(60, 2), blobs(90, 3), (1, 6, 6), 3)
