"""`prune2onnx benchmark`: files measured side by side, and which differences are noise."""

import importlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from networks import model
from onnx import helper

from prune2onnx import benchmark
from prune2onnx.cli.main import main
from prune2onnx.errors import Prune2OnnxError, RecipeError

module = importlib.import_module("prune2onnx.runtime.benchmark")  # the name means the function too


def layer(path: Path, width: int, batch: str | int = "N") -> Path:
    """y = x W, W [width, width]."""
    weight = np.ones((width, width), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"])]
    made = model(nodes, {"W": weight}, {"x": [batch, width]}, {"y": [batch, width]})
    onnx.save(made, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, Path]:
    """One, the same again, and one that does 100 times the work."""
    folder = tmp_path_factory.mktemp("files")
    small, large = (layer(folder / f"{width}.onnx", width) for width in (60, 600))
    return small, layer(folder / "same.onnx", 60), large


@pytest.fixture(autouse=True)
def few_loads(monkeypatch):
    monkeypatch.setattr("prune2onnx.runtime.latency._LOADS", 1)


def test_work_takes_time_and_the_same_work_the_same(files):
    found = benchmark(files, batches=(8,), threads=(1,), seconds=1.0)
    first, same, large = found.timings
    assert first.ratio is None and first.runs == large.runs > 100
    assert first.p50_ms <= first.p95_ms <= first.p99_ms
    assert same.is_noise
    assert large.ratio > 3 and not large.is_noise
    assert large.interval[0] <= large.ratio <= large.interval[1]
    assert first.throughput > 0 and large.throughput > 0  # means: a pause of the machine is in them
    sizes = [load.nbytes for load in found.loads]
    assert sizes == [path.stat().st_size for path in files]
    assert all(load.load_ms > 0 and load.peak_rss_bytes > 1e7 for load in found.loads)


def test_throughput_is_examples_over_all_the_time_they_took():
    timing = module._timing("f", 8, 1, np.array([[1.0], [3.0]]), 0)  # 16 examples in 4 ms
    assert timing.throughput == 4000 and timing.p50_ms == 2


def test_each_batch_and_number_of_threads_is_measured(files):
    found = benchmark(files[:2], batches=(1, 4), threads=(1, 2), seconds=0.05, profile=True)
    settings = [(t.threads, t.batch, Path(t.file).name) for t in found.timings]
    names = ("60.onnx", "same.onnx")
    assert settings == [(t, b, name) for t in (1, 2) for b in (1, 4) for name in names]
    assert {(o.name, o.kernels, o.share) for o in found.operators} == {("MatMul", 1, 1.0)}
    assert len(found.operators) == len(found.timings)


def test_indistinguishable_files_differ_by_noise():
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 2, 400)  # the machine slows down meanwhile
    first = drift * rng.lognormal(0, 0.1, 400)
    ratio, (low, high) = module._ratio(1.2 * drift * rng.lognormal(0, 0.1, 400), first)
    assert low < 1.2 < high and high / low < 1.1 and ratio == pytest.approx(1.2, rel=0.05)
    assert module._ratio(first[:8], first[:8]) == (1.0, None)
    for interval, noise in (((0.9, 1.01), True), ((0.5, 0.6), False), ((1.01, 1.02), True)):
        assert module.Timing("f", 1, 0, 9, 1, 1, 1, 1, 1.0, interval).is_noise is noise


def test_people_get_tables_and_programs_json(files):
    arguments = ["benchmark", *map(str, files), "--batch", "1,2", "--seconds", "0.05", "--profile"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and not result.stdout
    for text in ("same.onnx", "examples/s", "peak memory", "MatMul"):
        assert text in result.stderr
    facts = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert len(facts["timings"]) == 6 and {"noise", "p99_ms"} <= facts["timings"][0].keys()
    assert facts["environment"]["onnxruntime"]


def test_what_cannot_be_measured_is_named(files, tmp_path):
    fixed = layer(tmp_path / "fixed.onnx", 4, batch=3)
    assert benchmark([fixed], batches=(3,), seconds=0.01).timings[0].batch == 3
    assert [t.batch for t in benchmark([files[0], fixed], seconds=0.01).timings] == [3, 3]
    with pytest.raises(Prune2OnnxError, match=r"input x always has 3 examples, expected 1; export"):
        benchmark([files[0], fixed], batches=(1,), seconds=0.01)
    with pytest.raises(Prune2OnnxError, match=r"none\.onnx: no such file"):
        benchmark([tmp_path / "none.onnx"])
    for wrong in ({"batches": (0,)}, {"threads": (-1,)}, {"seconds": 0.0}, {"warm_up": -1}):
        with pytest.raises(RecipeError, match="expected"):
            benchmark(files, **wrong)
    result = CliRunner().invoke(main, ["benchmark", str(fixed), "--batch", "1;2"])
    assert result.exit_code == 2 and "1,16" in result.stderr
