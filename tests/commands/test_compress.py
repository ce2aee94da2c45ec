"""`compress`: one folder with everything in it, repeatable, and continued after kill -9."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from quick import QUICK
from safetensors.torch import save_file

import prune2onnx
from prune2onnx import Prune2OnnxError, RecipeError, compress, load_data, read_recipe, resolve
from prune2onnx.graph.file import load
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.folder import recipe_of
from prune2onnx.runs.pages.page import page_of
from prune2onnx.training.model import make_model


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


def test_the_history_has_each_epoch_and_weight(finished):
    epochs = json.loads((finished[0] / "history.json").read_text())
    assert [e["phase"] for e in epochs] == [
        *["dense"] * 4,
        *["prune"] * 4,
        *["tune"] * 3,
        *["quantize"] * 3,
    ]
    first, last = epochs[4], epochs[7]
    assert last["densities"].keys() == {"fc1.weight", "fc2.weight", "fc3.weight"}
    assert all(last["thresholds"][name] > 0 for name in last["densities"])
    assert last["densities"]["fc1.weight"] < first["densities"]["fc1.weight"] <= 1
    assert not epochs[0]["densities"] and not epochs[-1]["thresholds"]


def test_the_report_says_why_zeros_save_no_time(finished):
    (note,) = finished[1].notes
    assert "of the dense network's time" in note and "zeros alone save no time" in note


def test_the_report_is_what_onnxruntime_computes(finished):
    folder, report = finished
    test = load_data("digits").test
    x = np.stack([x for x, _ in test])
    y = np.array([int(y) for _, y in test])
    for name, measured in (("dense.onnx", report.dense), ("model.onnx", report.compressed)):
        (scores,) = ort.InferenceSession(folder / name).run(None, {"input": x})
        assert measured.error == pytest.approx(100 * np.mean(scores.argmax(1) != y))


def test_the_files_weights_are_quantized_and_counted(finished):
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


def test_a_network_with_batch_norm_is_compressed(tmp_path):
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
        library = name.removesuffix("Callback").lower()
        if library != name.lower() and importlib.util.find_spec(library) is None:
            continue  # an extra that is not there; its own tests say so
        assert callable(getattr(prune2onnx, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prune2onnx.nothing  # noqa: B018


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
