"""Verbs that handle files do not wait for torch, also where they read data."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from networks import model
from onnx import helper

CODE = """
import sys
from prune2onnx.cli.main import main
main(sys.argv[1:], standalone_mode=False)
sys.exit(", ".join({"torch", "accelerate"} & sys.modules.keys()) or 0)
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A linear classifier of the digits, in a file."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(64, 10)).astype(np.float32), "b": np.zeros(10, np.float32)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["y"]),
    ]
    made = model(nodes, weights, {"x": ("n", 1, 8, 8)}, {"y": ("n", 10)})
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    onnx.save(made, path)
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", "{file}", "--data", "digits"],
        ["quantize", "{file}", "{folder}/int8.onnx", "--data", "digits", "--max-drop", "100"],
        ["features", "{file}", "--data", "digits", "-o", "{folder}/features.npz"],
        ["pack", "{file}", "{folder}/small.onnx", "--max-rel-error", "0.1", "--data", "digits"],
        ["inspect", "{file}"],
        ["shrink", "{file}", "{folder}/shrunk.onnx"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_torch_stays_out(arguments, classifier, tmp_path):
    given = [part.format(file=classifier, folder=tmp_path) for part in arguments]
    done = subprocess.run([sys.executable, "-c", CODE, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
