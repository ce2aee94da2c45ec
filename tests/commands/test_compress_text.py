"""`--data text:FILE`: a language model, and a sentence encoder that learns its own outputs."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sentences import lines, tokenizer

from prune2onnx import Prune2OnnxError, RecipeError, load_data, load_task
from prune2onnx.cli.main import main
from prune2onnx.runtime.session import session

QUICK = [f"--{phase}-epochs=1" for phase in ("dense", "prune", "tune", "quantize")]

MODEL = """
import torch
from torch import nn


class Next(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.read = nn.Embedding(vocab_size, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, vocab_size)

    def forward(self, tokens):
        return self.last(self.read(self.embed(tokens)).relu())


class Encoder(nn.Module):
    def __init__(self, fixed=False):
        super().__init__()
        self.embed, self.mix, self.fixed = nn.Embedding(40, 12), nn.Linear(12, 12), fixed

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        if self.fixed:
            mask = mask.reshape(-1, 9, 1)
        return (self.mix(self.embed(input_ids)) * mask).sum(1) / mask.sum(1)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "lines.txt").write_text("\n".join(lines(200)))
    tokenizer(tmp_path / "tokenizer.json", most=9)
    return tmp_path


def compressed(folder, model, *options):
    arguments = [
        "compress", f"{folder}/net.py:{model}", f"--data=text:{folder}/lines.txt",
        f"--tokenizer={folder}/tokenizer.json", "-o", f"{folder}/run", "--target-density=0.5",
        "--prune-threshold-lr=0.3", *QUICK, *options,
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return session(folder / "run" / "model.onnx"), result.output


def test_a_language_model_is_trained_on_pieces_and_takes_any_length(folder):
    opened, _ = compressed(folder, "Next", "--task=language-modelling", "--length=20")
    (scores,) = opened.run(None, {"input": np.ones((3, 7), np.int64)})
    size = load_data(
        f"text:{folder}/lines.txt",
        task=load_task("language-modelling"),
        tokenizer=folder / "tokenizer.json",
    ).tokens
    assert scores.shape == (3, 7, size)
    report = json.loads((folder / "run" / "report.json").read_text())
    assert "perplexity" in json.dumps(report)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_sentence_encoder_learns_its_own_outputs(folder, fixed, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    import importlib

    net = importlib.import_module("net")
    torch.manual_seed(0)
    torch.save(net.Encoder().state_dict(), folder / "weights.pt")
    opened, said = compressed(
        folder,
        "Encoder",
        "--task=distillation",
        f"--weights={folder}/weights.pt",
        f"--model-args=fixed={fixed}",
    )
    assert ("texts of 9 tokens and no other length" in said) == fixed
    length = 9 if fixed else 5
    feeds = {name: np.ones((2, length), np.int64) for name in ("input_ids", "attention_mask")}
    assert opened.run(None, feeds)[0].shape == (2, 12)


def test_text_is_padded_for_distillation_and_cut_into_pieces_for_the_next_token(folder):
    spec, own = f"text:{folder}/lines.txt", folder / "tokenizer.json"
    data = load_data(spec, task=load_task("distillation"), tokenizer=own)
    x, _ = data.train[0]
    assert x["input_ids"].shape == x["attention_mask"].shape == (9,)
    assert x["input_ids"][0] == 2 and ((x["input_ids"] != 0) == x["attention_mask"]).all()
    data = load_data(spec, task=load_task("language-modelling"), tokenizer=own, length=6)
    x, y = data.train[0]
    assert x.shape == y.shape == (6,) and (x[1:] == y[:-1]).all()
    words = sum(len(line.split()) + 2 for line in (folder / "lines.txt").read_text().splitlines())
    assert sum(map(len, (data.train, data.validation, data.test))) == words // 7  # no line is cut
    assert data.tokens == data.classes == len(json.loads(own.read_text())["model"]["vocab"])


def test_what_is_missing_is_said(folder):
    spec, own, task = (
        f"text:{folder}/lines.txt", folder / "tokenizer.json", load_task("language-modelling")
    )  # fmt: skip
    with pytest.raises(RecipeError, match="no tokenizer; give --tokenizer"):
        load_data(spec, task=task)
    with pytest.raises(RecipeError, match="task regression needs them; train with --task"):
        load_data(spec, task=load_task("regression"), tokenizer=own)
    with pytest.raises(Prune2OnnxError, match=r"tokens, expected at least 10,010: 10 pieces"):
        load_data(spec, task=task, tokenizer=own, length=1000)
    arguments = ["compress", "net.py:Next", "--length=4", "-o", str(folder / "run")]
    result = CliRunner().invoke(main, arguments)
    assert "tokenizer and length are for data text:FILE" in result.output
    assert result.exit_code != 0 and not (folder / "run").exists()
