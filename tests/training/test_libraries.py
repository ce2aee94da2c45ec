"""Networks of other libraries, by name: made without a download, trained and exported as others."""

import numpy as np
import pytest
import torch

from prune2onnx import Prune2OnnxError, export, fit, load_data, resolve
from prune2onnx.data import Arrays, Data
from prune2onnx.tasks.task import CLASSIFICATION
from prune2onnx.training.model import make_model
from prune2onnx.training.scoring import check_output

WORDS = np.arange(60 * 6).reshape(60, 6) % 50


def words() -> Data:
    def split(part):
        x = {"input_ids": WORDS[part], "attention_mask": np.ones_like(WORDS[part])}
        return Arrays(x, np.arange(60)[part] % 3)

    parts = (slice(0, 40), slice(40, 50), slice(50, 60))
    train, validation, test = map(split, parts)
    return Data("words", train, validation, test, train.shape, 3, {"input_ids": "int64"}, 50)


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with random weights, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model.eval()


def test_a_folder_of_transformers_is_its_model_with_its_weights(folder):
    path, original = folder
    recipe = resolve({"model": f"hf:{path}"})
    assert recipe.first_phase == "prune"
    model = make_model(recipe, words()).eval()
    x = {name: torch.from_numpy(value[:4]) for name, value in words().train.x.items()}
    with torch.no_grad():
        assert torch.equal(model(**x).logits, original(**x).logits)
    check_output(model, words(), CLASSIFICATION)
    graph = export(model, x)
    assert [value.name for value in graph.graph.input] == ["input_ids", "attention_mask"]
    assert "bert.encoder.layer.0.output.dense.weight" in {t.name for t in graph.graph.initializer}


def test_a_folder_of_transformers_is_pruned(folder):
    path, _ = folder
    epochs = {f"{phase}.epochs": 1 for phase in ("dense", "prune", "tune", "quantize")}
    recipe = resolve({"model": f"hf:{path}", "batch_size": 20, "target_density": 0.5}, epochs)
    fitted = fit(make_model(recipe, words()), words(), recipe, start="prune")
    assert fitted.density <= 0.5005


def test_settings_of_a_folder_can_be_changed_and_a_missing_one_is_an_error(folder, tmp_path):
    path, _ = folder
    (path / "model.safetensors").unlink()
    recipe = resolve({"model": f"hf:{path}", "model_args": {"num_labels": 7}, "start": "dense"})
    with torch.no_grad():
        out = make_model(recipe, words()).eval()(torch.from_numpy(WORDS[:2])).logits
    assert out.shape == (2, 7)
    with pytest.raises(Prune2OnnxError, match=r"no config\.json in .*expected the folder of a"):
        make_model(resolve({"model": f"hf:{tmp_path}"}), words())


def test_a_name_of_timm_is_its_model():
    pytest.importorskip("timm")
    data = load_data("digits")
    recipe = resolve({"model": "timm:resnet10t", "model_args": {"width": 8}})
    with pytest.raises(Prune2OnnxError, match="timm:resnet10t: TypeError"):
        make_model(recipe, data)
    model = make_model(resolve({"model": "timm:resnet10t"}), data)
    check_output(model, data)
    with pytest.raises(Prune2OnnxError, match="timm:resnet10t5: "):
        make_model(resolve({"model": "timm:resnet10t5"}), data)


def test_a_library_that_is_missing_is_one_clear_error(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Prune2OnnxError, match=r"timm is not installed .* 'prune2onnx\[timm\]'"):
        make_model(resolve({"model": "timm:resnet10t"}), load_data("digits"))
