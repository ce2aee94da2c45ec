"""`compress` for other tasks than classification: from one file of code to a validated file."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from prune2onnx import RecipeError, compress, load_data, load_task, resolve
from prune2onnx.cli.main import main
from prune2onnx.errors import Prune2OnnxError

CODE = """
import numpy as np, torch
from torch import nn

class Rated(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 16)
        self.up, self.down = nn.Linear(16 + 3, width), nn.Linear(width, 1)
    def forward(self, words, facts):
        x = torch.cat([self.embed(words).mean(1), facts], 1)
        return self.down(torch.relu(self.up(x)))[:, 0]

def rated(vocab_size, width=8):
    return Rated(vocab_size, width)

def ratings():
    drawn = np.random.default_rng(0)
    words, facts = drawn.integers(0, 9, (400, 5)), drawn.standard_normal((400, 3))
    return {"words": words, "facts": facts}, 100 + 20 * facts.sum(1) + 5 * (words == 3).sum(1)

def speaker(vocab_size=9):
    return nn.Sequential(nn.Embedding(vocab_size, 24), nn.Linear(24, 48), nn.ReLU(),
                         nn.Linear(48, vocab_size))

def sentences():
    return (np.cumsum(np.ones((300, 9), int), 1) + np.arange(300)[:, None]) % 9

def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5))

def unlabelled():
    return np.random.default_rng(2).standard_normal((300, 6))
"""

SHORT = {
    "dense": {"epochs": 6, "lr": 1e-2},
    "prune": {"epochs": 4, "threshold_lr": 0.1},
    "tune": {"epochs": 2},
    "quantize": {"epochs": 2},
    "batch_size": 20,
}


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_two_inputs_and_a_regression(code, tmp_path):
    recipe = resolve(
        {
            "model": f"{code}:rated",
            "data": f"{code}:ratings",
            "task": "regression",
            "model_args": {"width": 64},
            "target_density": 0.4,
            "max_drop": "400%",
            **SHORT,
        }
    )
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert (report.task, report.metric.name) == ("regression", "RMSE")
    assert report.dense.error is None and report.paired is None
    drop = next(goal for goal in report.budget if goal.what == "drop")
    dense, compressed = report.on_validation
    assert drop.limit == pytest.approx(4 * dense) and drop.reached == pytest.approx(
        compressed - dense
    )
    data = load_data(recipe.data, task=load_task("regression"))
    opened = ort.InferenceSession(str(tmp_path / "run" / "model.onnx"))
    x, y = data.test.x, data.test.y
    assert {value.name: value.type for value in opened.get_inputs()} == {
        "words": "tensor(int64)",
        "facts": "tensor(float)",
    }
    made = opened.run(None, x)[0]
    rmse = float(np.sqrt(np.mean(np.square(made - y))))
    assert report.compressed.metrics["RMSE"] == pytest.approx(rmse, rel=1e-4)
    assert report.dense.metrics["RMSE"] < y.std()  # it has learned something
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Test RMSE" in page and "Test error" not in page
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history[-1]["validation_error"] is None and set(history[-1]["metrics"]) == {"RMSE", "R2"}
    files = ["run/model.onnx", "--reference", "run/dense.onnx"]
    options = ["--data", recipe.data, "--task", "regression", "--json"]
    shown = CliRunner().invoke(main, ["validate", *files, *options])
    again = json.loads(shown.stdout)["compressed"]["metrics"]
    assert again["RMSE"] == pytest.approx(rmse, rel=1e-4)


@pytest.mark.parametrize("form", ["sparse-initializer", "dense"])
def test_a_language_model_in_another_form(code, tmp_path, form):
    recipe = resolve(
        {
            "model": f"{code}:speaker",
            "data": f"{code}:sentences",
            "task": "language-modelling",
            "format": form,
            "target_density": 0.1,
            "target_size": 12_000,
            **SHORT,
        }
    )
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert 1 <= report.dense.metrics["perplexity"] < 3
    written = onnx.load(tmp_path / "run" / "model.onnx")
    assert bool(written.graph.sparse_initializer) == (form == "sparse-initializer")
    size = next(goal for goal in report.budget if goal.what == "size")
    assert size.reached == (tmp_path / "run" / "model.onnx").stat().st_size == written.ByteSize()


def test_a_network_learns_its_own_outputs_without_targets(code, tmp_path):
    from safetensors.torch import save_file
    from torch import nn

    network = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    settings = {
        "model": f"{code}:student",
        "data": f"{code}:unlabelled",
        "task": "distillation",
        "target_density": 0.6,
        **SHORT,
    }
    with pytest.raises(RecipeError, match="learns the outputs of a trained network, and none is"):
        compress(resolve(settings), tmp_path / "none", cpu=True)
    recipe = resolve({**settings, "weights": str(tmp_path / "w.safetensors")})
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert report.dense.metrics == {"output error": 0.0}
    assert 0 < report.compressed.metrics["output error"] < 60


@pytest.mark.parametrize(
    ("options", "says", "status"),
    [
        (["--task", "segmentaton"], "did you mean segmentation", 2),
        (["--model-args", "depth=3"], "takes no argument 'depth'", 2),
        (["--model-args", "depth"], "is not NAME=VALUE", 2),
        (["--task", "classification"], "needs integers from 0", 1),
        (["--format", "dense", "--portable"], "portable writes out a decoder", 2),
        (["--max-drop", "little"], "'little' is not a number, such as 0.5, or 5%", 2),
        (["--resize", "8"], "resize and crop are for folder:DIR", 2),
        (["--task", "multi-label"], "needs 0 or 1 for each label", 1),
    ],
)
def test_what_does_not_fit_is_one_clear_error(code, options, says, status):
    task = [] if "--task" in options else ["--task", "regression"]
    arguments = ["compress", f"{code}:rated", "--data", f"{code}:ratings", "-o", "run", *task]
    result = CliRunner().invoke(main, [*arguments, *options])
    message = str(result.exception) + result.output
    assert says in " ".join(message.split())
    found = result.exception
    assert (found.exit_status if isinstance(found, Prune2OnnxError) else found.code) == status
    assert not Path("run").exists()
