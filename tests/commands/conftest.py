"""A finished run, shared by the tests of `compress`."""

import pytest
from quick import QUICK

from prune2onnx import compress, resolve
from prune2onnx.runs.history import Callbacks


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run on the digits, and its report."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    epochs = []
    report = compress(resolve(QUICK), folder, cpu=True, callbacks=Callbacks(on_epoch=epochs.append))
    assert len(epochs) == 14
    return folder, report
