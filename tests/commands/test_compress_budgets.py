"""`compress` to a budget: of bytes, of multiply-adds; int8 where it pays."""

import io
import json

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto
from quick import QUICK
from rich.console import Console
from rich.table import Table

from prune2onnx import compress, load_data, resolve
from prune2onnx.cli.tables import report_table
from prune2onnx.errors import RecipeError
from prune2onnx.graph.file import load
from prune2onnx.graph.tensors import array_of
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.history import Callbacks
from prune2onnx.runtime.benchmark import Timing
from prune2onnx.runtime.calibration import error_on


def printed(table: Table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_size_is_met_within_two_percent_and_never_exceeded(precision, tmp_path):
    recipe = resolve(
        {
            **QUICK,
            "target_size": "9KB",
            "distill": 1,
            "prune": {"epochs": 8},
            "precision": precision,
        }
    )
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert 0.98 * 9000 < report.compressed.nbytes <= 9000
    (goal,) = report.budget
    assert goal.met and goal.reached == report.compressed.nbytes and not report.missed


def test_a_size_that_cannot_be_reached_is_reported_with_the_best_file(tmp_path):
    recipe = resolve({**QUICK, "target_size": 300})
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert [goal.what for goal in report.missed] == ["size"]
    assert 300 < report.compressed.nbytes < 6000
    ort.InferenceSession(tmp_path / "run" / "model.onnx")


def measured(ratio: float) -> Timing:
    """A timing with this ratio to the float model's."""
    return Timing("f", 1, 0, 100, 1.0, 1.0, 1.0, 1.0, ratio, (0.99 * ratio, 1.01 * ratio))


def test_int8_is_taken_where_it_is_faster_and_within_the_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.runtime.int8_choice.timed", lambda *_: measured(0.5))
    recipe = resolve({**QUICK, "int8": True, "target_size": "15KB", "max_drop": 40.0})
    report = compress(recipe, tmp_path / "run", cpu=True)
    note, speed = report.notes
    assert note.startswith("computes in int8, in 0.50 of the time")
    assert "of its multiply-adds, in int8" in speed
    assert {row.dtype for row in report.weights if row.name.endswith("_quantized")} >= {"int8"}
    assert 10_000 < report.compressed.nbytes <= 15_000 and report.folded and not report.missed
    data = load_data("digits")
    x, y = (np.stack([np.asarray(one[i]) for one in data.validation]) for i in (0, 1))
    (scores,) = ort.InferenceSession(tmp_path / "run" / "model.onnx").run(None, {"input": x})
    assert report.validation["error"] == pytest.approx(100 * np.mean(scores.argmax(1) != y))
    # a budget that int8 does not meet gives float32
    dear = resolve({**QUICK, "int8": True, "target_size": 300})
    note, _ = compress(dear, tmp_path / "dear", cpu=True).notes
    assert note.startswith("computes in float32: in int8 it would take")


def test_the_fewest_multiply_adds_within_a_loss_are_searched_for(tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.runtime.int8_choice.timed", lambda *_: measured(0.5))
    fast = {"goal": "latency", "channels": {"epochs": 3}, "max_drop": 60.0, "trials": 2}
    recipe = resolve({**QUICK, **fast, "prune": {"epochs": 3}})
    trials = []
    report = compress(
        recipe, tmp_path / "run", cpu=True, callbacks=Callbacks(on_trial=trials.append)
    )
    assert [str(trial) for trial in trials] == [
        "trial 1 of at most 2, multiply-adds 50 %",
        "trial 2 of at most 2, multiply-adds 25 %",
    ]
    assert report.notes[0].startswith("computes in int8") and not report.missed
    # the second trial aims at a quarter
    assert 0.1 < report.compressed.macs / report.dense.macs <= 0.25
    assert report.density > 0.05  # zeros save no time
    pruned, others = report.parameters["pruned"], report.parameters["others"]
    assert f"counts {pruned:,} of {pruned + others:,} parameters" in printed(report_table(report))
    epochs = json.loads((tmp_path / "run" / "history.json").read_text())
    phases = ["dense"] * 4 + ["channels"] * 3 + ["prune"] * 3 + ["tune"] * 3 + ["quantize"] * 3
    assert [epoch["phase"] for epoch in epochs] == phases


def test_int8_that_is_slower_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.runtime.int8_choice.timed", lambda *_: measured(1.2))
    report = compress(resolve({**QUICK, "int8": True}), tmp_path / "run", cpu=True)
    assert report.notes[0] == (
        "computes in float32: int8 takes 1.20 times as long as float32 on this machine"
    )
    assert {row.dtype for row in report.weights} == {"float32"}
    assert report.max_abs_diff < 1e-3 and "int8 takes 1.20" in str(report_table(report).caption)


ONCE = {phase: {"epochs": 1} for phase in ("dense", "prune", "tune", "quantize")}
MODEL = {"model": QUICK["model"]}


@pytest.fixture(scope="module")
def in_int8(tmp_path_factory):
    """A short run whose matrices compute in int8."""
    folder = tmp_path_factory.mktemp("int8") / "run"
    asked = {"compute": "int8", "target_density": 0.5}
    return compress(resolve({**MODEL, **ONCE, **asked}), folder, cpu=True), folder


def test_matrices_compute_in_int8_on_the_levels_of_training(in_int8):
    report, folder = in_int8
    assert (folder / "model.onnx").stat().st_size == report.compressed.nbytes and report.folded
    first, second, last = report.layers
    assert first.compute == second.compute == "int8"
    assert last.compute == "float32" and "fewer than 1024" in last.reason
    facts = json.loads((folder / "report.json").read_text())
    assert [layer["compute"] for layer in facts["layers"]] == ["int8", "int8", "float32"]
    assert any(note.startswith("2 of 3 matrices compute in int8") for note in report.notes)
    plain = unpack(load(folder / "model.onnx"))
    assert [node.op_type for node in plain.graph.node].count("MatMulInteger") == 2
    levels = [array_of(t) for t in plain.graph.initializer if t.data_type == TensorProto.INT8]
    assert len(levels) == 2 and all(np.abs(array).max() <= 7 for array in levels)  # as trained


def test_the_error_is_that_of_the_file_in_int8(in_int8):
    report, folder = in_int8
    found = error_on(load_data("digits"))(load(folder / "model.onnx"))  # in the same batches
    assert report.validation["error"] == pytest.approx(found)


def test_auto_takes_what_is_faster_within_the_accuracy_loss(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(
        "prune2onnx.runtime.int8_choice.timed", lambda *_: timed.append(1) or measured(0.5)
    )
    asked = {"compute": "auto", "max_drop": 90.0, "target_density": 0.5}
    report = compress(resolve({**MODEL, **ONCE, **asked}), tmp_path / "run", cpu=True)
    assert [layer.compute for layer in report.layers] == ["int8", "int8", "float32"]
    assert len(timed) == 3 and report.notes[0].startswith("int8: 0.50 of the time")
    kept = json.loads((tmp_path / "run" / "checkpoints" / "compute.json").read_text())
    assert kept["compute"] == "int8"


def test_int4_has_room_for_the_levels():
    with pytest.raises(RecipeError, match=r"levels -7 \.\.\. 7.*quantize.levels is 15"):
        resolve({**QUICK, "compute": "int4", "quantize": {"levels": 15}})
