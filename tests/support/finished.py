"""The folder of a finished run, and of a sweep, made without training or measuring anything.

With `hostile`, names in it contain HTML that must not run in the reader's browser.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from prune2onnx.packing.pack import pack
from prune2onnx.runs.front import DenseNetwork, Front, Point
from prune2onnx.runs.history import Epoch
from prune2onnx.runs.recipe import resolve
from prune2onnx.runs.report import Goal, Measured, Paired, Report

HOSTILE = "<script>alert(1)</script>"
QUOTES = """my "net's" $x$ & <b>.py:make"""
LEVELS = (-0.2, -0.1, 0.1, 0.2)


def made_run(folder: Path, *, hostile: bool = False, **changes: object) -> Report:
    """Writes a run of two layers into `folder`; `changes` are those of its report."""
    folder.mkdir(parents=True, exist_ok=True)
    first = HOSTILE if hostile else "fc1.weight"
    generator = np.random.default_rng(0)
    dense = {
        first: generator.normal(0, 0.1, (300, 64)).astype(np.float32),
        "fc1.bias": generator.normal(0, 0.1, 300).astype(np.float32),
        "fc2.weight": generator.normal(0, 0.1, (10, 300)).astype(np.float32),
        "fc2.bias": np.linspace(-1, 1, 10, dtype=np.float32),
    }
    sparse = {name: sparsely(array) if array.ndim > 1 else array for name, array in dense.items()}
    (folder / "dense.onnx").write_bytes(network(dense).SerializeToString())
    packed = pack(network(sparse))
    (folder / "model.onnx").write_bytes(packed.model.SerializeToString())
    nbytes = packed.model.ByteSize()
    report = Report(
        version="1.2.3",
        seed=7,
        environment={"onnxruntime": "1.99", "machine": HOSTILE if hostile else "x86_64"},
        dense=Measured(
            network(dense).ByteSize(),
            error=2.0,
            load_ms=9.0,
            peak_rss_bytes=60_000_000,
            latency_ms={"p50": 0.2, "p95": 0.3},
            load_cpu_ms=8.0,
        ),
        compressed=Measured(
            nbytes,
            error=2.5,
            load_ms=11.0,
            peak_rss_bytes=63_000_000,
            latency_ms={"p50": 0.1, "p95": 0.2},
            load_cpu_ms=10.0,
        ),
        folded=True,
        max_abs_diff=1e-6,
        density=0.05,
        weights=packed.rows,
        budget=(Goal("size", 100_000, nbytes), Goal("density", 0.04, 0.05)),
        validation={"dense_error": 1.5, "error": 1.75},
        notes=(HOSTILE,) if hostile else ("zeros alone save no time",),
        paired=Paired(both=385, only_dense=7, only_compressed=5, neither=3),
    )
    report = Report(**{**report.__dict__, **changes})
    model = QUOTES if hostile else "my_net.py:make"
    recipe = resolve({"model": model, "data": "folder:my images", "target_size": "100kB"})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "report.json").write_text(report.to_json())
    (folder / "history.json").write_text(json.dumps([asdict(e) for e in history(first)]))
    return report


def network(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A perceptron with these weights: first layer, its bias, second layer, its bias."""
    one, bias, two, last = weights
    nodes = [
        helper.make_node("Gemm", ["x", one, bias], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", two, last], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def sparsely(array: np.ndarray) -> np.ndarray:
    """The 5 % largest of an array on four levels, zeros elsewhere."""
    limit = np.quantile(np.abs(array), 0.95)
    steps = np.where(np.arange(array.size).reshape(array.shape) % 2, 0.1, 0.2)
    return np.where(np.abs(array) > limit, np.sign(array) * steps, 0).astype(np.float32)


def history(first: str) -> list[Epoch]:
    """Three phases of three epochs."""
    names = (first, "fc2.weight")
    epochs = []
    for i in range(9):
        phase = ("dense", "prune", "quantize")[i // 3]
        left = 1.0 if i < 3 else 1 / (i - 1)
        thresholds = dict.fromkeys(names, 0.03125 * (i - 2)) if phase == "prune" else {}
        densities = {} if i < 3 else dict.fromkeys(names, left)
        epochs += [
            Epoch(phase, i % 3 + 1, 3, 2 / (i + 1), left, 9 - i, 1.0, 1.5, densities, thresholds)
        ]
    return epochs


def made_sweep(folder: Path) -> Front:
    """Writes a sweep of three runs: one done, with its folder; one failed; one waiting."""
    report = made_run(folder / "runs" / "size-100000-seed7")
    done = Point(
        "size", 100_000, 7, "done", report.compressed.nbytes, 2.5, 1.75, 0.5, 0.25, 0.05, 9.0, True
    )
    failed = Point("size", 50, 7, "failed", message=HOSTILE)
    front = Front(
        (done, failed, Point("density", 0.5, 7)),
        (DenseNetwork(7, report.dense.nbytes, 2.0, 1.5),),
    )
    (folder / "front.json").write_text(front.to_json())
    return front
