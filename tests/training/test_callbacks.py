"""The callbacks with the real libraries, on tiny networks."""

import numpy as np
import pytest
import torch
from torch import nn

from prune2onnx import density
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.runtime.session import session

pytestmark = [
    # what the libraries themselves do
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUICK = {"prune.threshold_lr": 0.1}  # for as few steps
STEPS = 16


@pytest.fixture(autouse=True)
def measured_seldom(monkeypatch):
    """A file takes longer to measure than these networks to train."""
    monkeypatch.setattr("prune2onnx.training.compression.compression.MEASURES", 4)


def sentences(count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of which more are above 20 than below, or not."""
    tokens = torch.randint(3, 40, (count, 12), generator=torch.Generator().manual_seed(0))
    return tokens, ((tokens > 20).float().mean(1) > 0.5).long()


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def trainer_of(model, callbacks, folder, **options):
    transformers = pytest.importorskip("transformers")
    tokens, labels = sentences()
    data = [
        {"input_ids": t, "attention_mask": torch.ones_like(t), "labels": y}
        for t, y in zip(tokens, labels, strict=True)
    ]
    chosen = {
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 32,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": STEPS // 2,
        "use_cpu": True,
        "seed": 1,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(chosen | options))
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def inputs() -> dict[str, torch.Tensor]:
    tokens, _ = sentences(2)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_a_bert_in_transformers_trainer_is_pruned_and_resumes(tmp_path):
    pytest.importorskip("transformers")
    from prune2onnx import TransformersCallback

    def run(resume=None):
        callback = TransformersCallback(
            inputs(), target_density=0.3, settings=QUICK, phases={"prune": 0.7, "tune": 0.3}
        )
        with pytest.raises(Prune2OnnxError, match="nothing to finish"):
            callback.finish()
        options = {"save_strategy": "steps", "save_steps": STEPS // 2}
        trainer = trainer_of(bert(), [callback], tmp_path, gradient_accumulation_steps=2, **options)
        trainer.train(resume_from_checkpoint=resume)
        return *callback.finish(), trainer

    small, packed, trainer = run()
    assert 0.2 <= density(small).total <= 0.3  # levels round to zero, too
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["file_bytes"] and {"density", "penalty"} <= line.keys() for line in lines)
    assert {row.name for row in packed.rows} >= {"bert.embeddings.word_embeddings.weight"}
    assert not any("parametrizations" in name for name in trainer.model.state_dict())
    tokens, _ = sentences(8)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = small(**given).logits.numpy()
    (got,) = session(packed.model).run(None, {k: v.numpy() for k, v in given.items()})
    np.testing.assert_allclose(got, expected, atol=1e-4)

    saved = tmp_path / f"checkpoint-{STEPS // 2}"
    assert run(str(saved))[1].model.SerializeToString() == packed.model.SerializeToString()
    (saved / "compression.pt").unlink()
    with pytest.raises(Prune2OnnxError, match=r"compression\.pt: missing"):
        run(str(saved))


def lightning_module():
    lightning = pytest.importorskip("lightning")

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3, stride=2, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, stride=2, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64, 10),
            )
            self.example_input_array = torch.zeros(2, 1, 8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 2e-3)

    torch.manual_seed(0)
    return Digits()


def images():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(
        torch.tensor(x[:256], dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y[:256])
    )
    return torch.utils.data.DataLoader(data, batch_size=32)


def lightning_run(tmp_path, callback, resume=None, **options):
    lightning = pytest.importorskip("lightning")
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    chosen = {
        "max_epochs": 6,
        "callbacks": [callback, checkpoint],
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "gradient_clip_val": 1.0,
    }
    module = lightning_module()
    lightning.Trainer(**(chosen | options)).fit(module, images(), ckpt_path=resume)
    return *callback.finish(), module


def test_a_network_in_lightnings_trainer_fits_its_size_and_resumes(tmp_path):
    pytest.importorskip("lightning")
    from prune2onnx import LightningCallback

    callback = LightningCallback(target_size=2_700, settings=QUICK)
    small, packed, _ = lightning_run(tmp_path, callback)
    assert 2_646 <= packed.model.ByteSize() <= 2_700
    assert [line.phase for line in callback.progress][-1] == "quantize"
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        expected = small(x).numpy()
    (got,) = session(packed.model).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, expected, atol=1e-4)
    callback = LightningCallback(target_size=2_700, settings=QUICK)
    _, again, _ = lightning_run(tmp_path, callback, str(tmp_path / "epoch=2.ckpt"))
    assert again.model.SerializeToString() == packed.model.SerializeToString()


def test_an_attribute_of_a_lightning_module_is_compressed_alone(tmp_path):
    pytest.importorskip("lightning")
    from prune2onnx import LightningCallback

    x = torch.rand(2, 1, 8, 8)
    callback = LightningCallback(x, network="net", target_density=0.5, settings=QUICK)
    small, _, module = lightning_run(tmp_path, callback, max_steps=10)
    assert type(small) is nn.Sequential
    assert callback.compression.model is module.net
    assert density(small).total <= 0.5
