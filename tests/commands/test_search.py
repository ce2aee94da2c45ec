"""A search: what it draws, whom it calls best, and that a folder holds one search."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from sweep_worker import REPORT

from prune2onnx import Prune2OnnxError, RecipeError, resolve, search
from prune2onnx.cli.main import main
from prune2onnx.commands import search as searching
from prune2onnx.runs.history import Epoch
from prune2onnx.runs.recipe import read_recipe
from prune2onnx.runs.report import Goal
from prune2onnx.runs.tuning import Range, Tried

RECIPE = resolve(
    {"model": "net.py:net", "data": "digits", "target_size": 9000, "weights": "w.safetensors"}
)
VARY = ("prune.lr=1e-4..1e-2", "quantize.levels=1..7", "distill=0,0.5")


@pytest.fixture
def made(monkeypatch):
    """`compress` is a function: levels above 4 miss the budget; the best rate is 1e-3."""
    asked = []

    def compress(recipe, directory, **options):
        asked.append(recipe)
        error = abs(recipe.prune.lr / 1e-3 - 1) + recipe.quantize.levels / 100
        for number in range(1, 6):
            epoch = Epoch("prune", number, 5, 1.0, 1.0, error + 5 - number, 0.1, 1.0, {}, {})
            options["callbacks"].on_epoch(epoch)
        goals = [Goal("size", 9000.0, 9000.0 + 100 * (recipe.quantize.levels > 4))]
        known = {"dense_error": 1.0, "error": error}
        return dataclasses.replace(REPORT, validation=known, budget=tuple(goals))

    monkeypatch.setattr(searching, "compress", compress)
    monkeypatch.setattr(searching, "prepared", lambda recipe: None)
    return asked


def test_the_best_run_within_its_budget_is_found(made, tmp_path):
    found = search(RECIPE, tmp_path, vary=VARY, runs=30)
    done = [one for one in found.tried if one.state == "done"]
    assert len(found.tried) == 30 and any(one.state == "ended early" for one in found.tried)
    assert found.best.met and found.best.value == min(one.value for one in done if one.met)
    assert found.best.value < 0.5 and found.best.settings["quantize.levels"] <= 4
    assert any(not one.met and "missed" in one.message for one in done)
    for recipe in made:
        assert 1e-4 <= recipe.prune.lr <= 1e-2 and recipe.distill in (0, 0.5)
        assert recipe.quantize.levels in range(1, 8)
    best = resolve(read_recipe(tmp_path / "best.yaml"))
    assert best.prune.lr == found.best.settings["prune.lr"]
    assert best == resolve(RECIPE.model_dump(mode="json"), found.best.settings)
    kept = json.loads((tmp_path / "search.json").read_text())
    assert kept["best"] == found.best.number and len(kept["runs"]) == 30


def test_the_same_command_continues(made, tmp_path):
    first = search(RECIPE, tmp_path, vary=VARY, runs=3)
    assert search(RECIPE, tmp_path, vary=VARY, runs=3).tried == first.tried
    again = search(RECIPE, tmp_path, vary=VARY, runs=5)
    assert again.tried[:3] == first.tried and len(again.tried) == len(made) == 5
    with pytest.raises(RecipeError, match="holds a search with other settings"):
        search(RECIPE, tmp_path, vary=VARY[:1], runs=5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(RecipeError, match="holds other files"):
        search(RECIPE, tmp_path / "other", vary=VARY, runs=5)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    search(RECIPE, tmp_path / "one", vary=VARY, runs=1, storage=url)
    with pytest.raises(RecipeError, match="choose another folder with -o, or another name"):
        search(RECIPE, tmp_path / "two", vary=VARY[:2], runs=2, storage=url)


def test_runs_that_fail_are_told(made, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise Prune2OnnxError("the loss became NaN")

    monkeypatch.setattr(searching, "compress", fails)
    found = search(RECIPE, tmp_path, vary=VARY, runs=2)
    assert [one.state for one in found.tried] == ["failed"] * 2 and found.best is None
    assert found.tried[0].message == "the loss became NaN"


def test_less_within_no_budget_is_no_search(tmp_path):
    with pytest.raises(RecipeError, match="no budget"):
        search(resolve({"model": "net.py:net", "data": "digits"}), tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prune.lr", "expected SETTING=LOW..HIGH"),
        ("prune.rate=1..2", "'prune.rate' is no setting"),
        ("seed=1,2", "'seed' is no setting"),
        ("prune.lr=2e-3..1e-3", "LOW is not below HIGH"),
        ("prune.lr=a..b", "expected SETTING=LOW..HIGH"),
        ("prune.lr=0..1", "prune.lr"),
        ("prune.function=threshold-linear,other", "prune.function"),
        ("tune.lr=1e-3", "one value is no choice"),
    ],
)
def test_ranges_that_do_not_fit(text, says):
    with pytest.raises(RecipeError, match=says):
        Range.of(text, RECIPE)


def test_a_search_of_the_digits(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(\n"
        "    nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))\n"
    )
    epochs = [f"--{phase}-epochs=1" for phase in ("dense", "prune", "tune", "quantize")]
    command = ["search", f"{tmp_path / 'net.py'}:net", "--data", "digits", *epochs]
    command += ["-o", str(tmp_path / "best"), "--target-size", "9KB", "--runs", "2", "--json"]
    result = CliRunner().invoke(main, [*command, "--vary", "tune.lr=1e-4..1e-2"])
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [one["state"] for one in runs] == ["done"] * 2 and all(one["met"] for one in runs)
    assert (tmp_path / "best" / "dense" / "dense.safetensors").exists()
    assert (tmp_path / "best" / "runs" / "0001" / "model.onnx").stat().st_size == runs[1]["nbytes"]
    known = Tried(**runs[0])
    assert 1e-4 <= known.settings["tune.lr"] <= 1e-2
