"""The whole way: one folder with everything in it, repeatable, and continued after kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file

import prune2onnx
from prune2onnx import Prune2OnnxError, RecipeError, compress, load_data, read_recipe, resolve
from prune2onnx.benchmark import Timing
from prune2onnx.onnxfile import load
from prune2onnx.pack import unpack
from prune2onnx.page import page_of
from prune2onnx.pipeline import make_model, recipe_of

ROOT = Path(__file__).parent.parent
QUICK = {
    "model": f"{ROOT / 'models' / 'lenet.py'}:lenet_300_100",
    "dense": {"epochs": 4},
    "prune": {"epochs": 4, "threshold_lr": 0.1},
    "tune": {"epochs": 3},
    "share": {"epochs": 3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the digits, and its report."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    epochs = []
    report = compress(resolve(QUICK), folder, cpu=True, on_epoch=epochs.append)
    assert len(epochs) == 14
    return folder, report


def test_a_run_leaves_result_reference_recipe_report_and_checkpoints(finished):
    folder, report = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "dense.onnx",
        "history.json",
        "model.onnx",
        "recipe.yaml",
        "report.html",
        "report.json",
    ]
    assert json.loads((folder / "report.json").read_text()) == report.to_dict()
    assert report.folded and report.max_abs_diff < 1e-3
    assert report.ratio == (folder / "dense.onnx").stat().st_size / report.compressed.nbytes
    assert report.ratio > 8 and report.density < 0.4
    assert report.dense.macs == 64 * 300 + 300 * 100 + 100 * 10 >= report.compressed.macs


def test_the_page_made_again_is_the_one_that_compress_wrote(finished):
    folder, report = finished
    page = (folder / "report.html").read_text()
    assert page == page_of(folder)
    assert f"{report.compressed.nbytes:,} bytes" in page and "fc1.weight" in page
    paired = report.paired
    assert paired.examples == 359 and paired.added == pytest.approx(report.drop)


def test_the_history_tells_each_epoch_and_weight(finished):
    epochs = json.loads((finished[0] / "history.json").read_text())
    assert [e["phase"] for e in epochs] == [
        *["dense"] * 4,
        *["prune"] * 4,
        *["tune"] * 3,
        *["share"] * 3,
    ]
    first, last = epochs[4], epochs[7]
    assert last["densities"].keys() == {"fc1.weight", "fc2.weight", "fc3.weight"}
    assert all(last["thresholds"][name] > 0 for name in last["densities"])
    assert last["densities"]["fc1.weight"] < first["densities"]["fc1.weight"] <= 1
    assert not epochs[0]["densities"] and not epochs[-1]["thresholds"]


def test_the_report_says_why_zeros_save_no_time(finished):
    (note,) = finished[1].notes
    assert "of dense's time" in note and "zeros alone save none" in note


def test_the_report_says_what_onnxruntime_answers(finished):
    folder, report = finished
    test = load_data("digits").test
    x = np.stack([x.numpy() for x, _ in test])
    y = np.array([int(y) for _, y in test])
    for name, measured in (("dense.onnx", report.dense), ("model.onnx", report.compressed)):
        (scores,) = ort.InferenceSession(folder / name).run(None, {"input": x})
        assert measured.error == pytest.approx(100 * np.mean(scores.argmax(1) != y))


def test_the_files_weights_are_shared_and_counted(finished):
    folder, report = finished
    stored = {t.name: t for t in unpack(load(folder / "model.onnx")).graph.initializer}
    for row in report.weights:
        if row.name in ("fc1.weight", "fc2.weight", "fc3.weight"):
            values = np.frombuffer(stored[row.name].raw_data, np.float32)
            assert row.nnz == np.count_nonzero(values)
            assert np.unique(values[values != 0]).size <= 32


def test_the_recipe_beside_the_result_repeats_it(finished, tmp_path):
    folder, _ = finished
    compress(resolve(read_recipe(folder / "recipe.yaml")), tmp_path / "again", cpu=True)
    for name in ("model.onnx", "dense.onnx", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_with_a_run_is_not_overwritten_unasked(finished):
    folder, _ = finished
    with pytest.raises(RecipeError, match=r"holds a run already .*; continue it with --resume"):
        compress(resolve(QUICK), folder, cpu=True)
    assert recipe_of(folder).prune.epochs == 4
    with pytest.raises(RecipeError, match="no run to continue"):
        recipe_of(folder / "nowhere")
    with pytest.raises(RecipeError, match="a file, expected a folder"):
        compress(resolve(QUICK), folder / "model.onnx", cpu=True)


def test_a_file_of_the_users_own_is_not_overwritten(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(RecipeError, match=r"holds a run already \(model.onnx\)"):
        compress(resolve(QUICK), tmp_path, cpu=True)
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"


def test_a_finished_run_can_be_continued_and_a_model_shared_between_calls_is_not_spoilt(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))\n"
        "def net(): return NET\n"
    )
    recipe = resolve({**QUICK, "model": f"{tmp_path / 'net.py'}:net"})
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert report.density < 0.5
    first = (tmp_path / "run" / "model.onnx").read_bytes()
    again = compress(recipe, tmp_path / "run", cpu=True, resume=True)
    assert (tmp_path / "run" / "model.onnx").read_bytes() == first
    assert again.compressed.error == report.compressed.error


def test_a_model_that_cannot_be_exported_fails_before_training(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.fc = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(1)\n"
        "        return self.fc(x if float(x.sum()) > 0 else -x)\n"
    )
    recipe = resolve({**QUICK, "model": f"{tmp_path / 'net.py'}:Net"})
    with pytest.raises(Prune2OnnxError, match=r"torch.onnx cannot export the model"):
        compress(recipe, tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_overwriting_starts_again_without_old_checkpoints(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    epochs = []
    recipe = resolve(QUICK, {"seed": 3})
    compress(recipe, folder, cpu=True, overwrite=True, on_epoch=epochs.append)
    assert len(epochs) == 14
    assert "seed: 3" in (folder / "recipe.yaml").read_text()


_KILL_IN = """
import os, signal, sys
from prune2onnx import compress, read_recipe, resolve
from prune2onnx.pipeline import recipe_of
folder, phase = sys.argv[1:3]
resume = os.path.exists(folder)
recipe = recipe_of(folder) if resume else resolve(read_recipe(sys.argv[3]))
def kill(step):
    if step.phase == phase and step.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
compress(recipe, folder, cpu=True, resume=resume, on_step=kill)
"""


def test_kill_9_in_each_phase_then_resume_gives_the_same_bytes(finished, tmp_path):
    whole, _ = finished
    folder = tmp_path / "killed"
    # as many threads as here: another split of a sum rounds otherwise
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for phase in ("dense", "prune", "tune", "share"):
        arguments = [str(folder), phase, str(whole / "recipe.yaml")]
        command = [sys.executable, "-c", _KILL_IN, *arguments]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert not (folder / "model.onnx").exists()
    command = [sys.executable, "-m", "prune2onnx", "compress", "--resume", str(folder), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert (folder / "dense.onnx").read_bytes() == (whole / "dense.onnx").read_bytes()


def test_a_network_with_batch_norm_goes_the_whole_way(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),\n"
        "        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),\n"
        "        nn.Flatten(), nn.Linear(256, classes))\n"
    )
    recipe = resolve({**QUICK, "model": f"{tmp_path / 'net.py'}:net"})
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert report.folded and report.max_abs_diff < 1e-2
    coded = [row for row in report.weights if "levels" in row.codec or "codebook" in row.codec]
    assert {"0.weight", "3.weight", "7.weight"} <= {row.name for row in coded}


def weights_file(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def test_weights_come_from_safetensors_or_pt_and_never_from_pickled_objects(tmp_path):
    data = load_data("digits")
    recipe = resolve(QUICK)
    model = make_model(recipe.model_copy(update={"seed": 9}), data)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    paths = {
        "safetensors": str(tmp_path / "w.safetensors"),
        "pt": weights_file(tmp_path / "w.pt", model.state_dict()),
        "nested": weights_file(tmp_path / "n.pt", {"state_dict": model.state_dict(), "epoch": 3}),
    }
    for path in paths.values():
        loaded = make_model(recipe.model_copy(update={"weights": path}), data)
        assert torch.equal(loaded.fc1.weight, model.fc1.weight)
    bad = {
        "no such file": str(tmp_path / "none.pt"),
        "it holds more than tensors": weights_file(tmp_path / "m.pt", model),
        "expected a state_dict": weights_file(tmp_path / "t.pt", torch.ones(3)),
        "does not fit the model": weights_file(tmp_path / "o.pt", {"fc9.weight": torch.ones(3)}),
    }
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:50])
    bad["not readable as weights"] = str(tmp_path / "cut.safetensors")
    for says, path in bad.items():
        with pytest.raises(Prune2OnnxError, match=says):
            make_model(recipe.model_copy(update={"weights": path}), data)


def test_every_public_verb_is_there():
    for name in prune2onnx.__all__:
        assert callable(getattr(prune2onnx, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prune2onnx.nothing  # noqa: B018


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


def test_the_smallest_file_within_a_drop_is_searched_for_and_a_killed_search_goes_on(tmp_path):
    recipe = resolve({**QUICK, "max_drop": 40.0, "trials": 3})
    folder, epochs = tmp_path / "run", []

    class StoppedError(Exception):
        pass

    def stop(epoch):
        epochs.append(epoch)
        if len(epochs) == 4 + 10 + 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        compress(recipe, folder, cpu=True, on_epoch=stop)
    rest: list[object] = []
    report = compress(recipe_of(folder), folder, cpu=True, resume=True, on_epoch=rest.append)
    assert len(epochs) + len(rest) == 4 + 3 * 10
    assert report.density < 0.07 * 0.6  # 40 points leave room for a halving at least
    assert report.validation["error"] - report.validation["dense_error"] == pytest.approx(
        report.budget[0].reached
    )


def test_the_teacher_may_be_another_file_than_the_weights(finished, tmp_path):
    folder, report = finished
    content = {
        **QUICK,
        "start": "tune",
        "weights": str(folder / "checkpoints" / "tune.safetensors"),
        "teacher": str(folder / "checkpoints" / "dense.safetensors"),
        "distill": 1.0,
        "target_density": 0.4,
    }
    again = compress(resolve(content), tmp_path / "run", cpu=True)
    assert again.dense.error == report.dense.error
    assert (tmp_path / "run" / "dense.onnx").read_bytes() == (folder / "dense.onnx").read_bytes()


def measured(ratio: float) -> Timing:
    """An inference that takes so much of the float model's time."""
    return Timing("f", 1, 0, 100, 1.0, 1.0, 1.0, 1.0, ratio, (0.99 * ratio, 1.01 * ratio))


def test_int8_is_taken_where_it_is_faster_and_within_the_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.quantizing.timed", lambda before, after: measured(0.5))
    recipe = resolve({**QUICK, "int8": True, "target_size": "15KB", "max_drop": 40.0})
    report = compress(recipe, tmp_path / "run", cpu=True)
    note, told = report.notes
    assert note.startswith("computes in int8, in 0.50 of the time")
    assert "of its multiply-adds, in int8" in told
    assert {row.dtype for row in report.weights if row.name.endswith("_quantized")} >= {"int8"}
    assert 10_000 < report.compressed.nbytes <= 15_000 and report.folded and not report.missed
    data = load_data("digits")
    x, y = (np.stack([np.asarray(one[i]) for one in data.validation]) for i in (0, 1))
    (scores,) = ort.InferenceSession(tmp_path / "run" / "model.onnx").run(None, {"input": x})
    assert report.validation["error"] == pytest.approx(100 * np.mean(scores.argmax(1) != y))
    # what does not fit in int8 is float32
    dear = resolve({**QUICK, "int8": True, "target_size": 300})
    note, _ = compress(dear, tmp_path / "dear", cpu=True).notes
    assert note.startswith("computes in float32: in int8 it would take")


def test_the_fewest_multiply_adds_within_a_drop_are_searched_for(tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.quantizing.timed", lambda before, after: measured(0.5))
    fast = {"goal": "latency", "narrow": {"epochs": 3}, "max_drop": 60.0, "trials": 2}
    recipe = resolve({**QUICK, **fast, "prune": {"epochs": 3}})
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert report.notes[0].startswith("computes in int8") and not report.missed
    # the second trial asks for a quarter
    assert 0.1 < report.compressed.macs / report.dense.macs <= 0.25
    assert report.density > 0.05  # zeros bring no speed
    epochs = json.loads((tmp_path / "run" / "history.json").read_text())
    phases = ["dense"] * 4 + ["narrow"] * 3 + ["prune"] * 3 + ["tune"] * 3 + ["share"] * 3
    assert [epoch["phase"] for epoch in epochs] == phases


def test_int8_that_is_slower_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.quantizing.timed", lambda before, after: measured(1.2))
    report = compress(resolve({**QUICK, "int8": True}), tmp_path / "run", cpu=True)
    assert report.notes[0] == (
        "computes in float32: int8 takes 1.20 times as long as float32 on this machine"
    )
    assert {row.dtype for row in report.weights} == {"float32"}
    assert report.max_abs_diff < 1e-3 and "int8 takes 1.20" in str(report.table().caption)
