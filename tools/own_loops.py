"""Networks in training loops of other libraries, made to fit a size; how much of them is reached.

python tools/own_loops.py trainer      # BERT in transformers' Trainer
python tools/own_loops.py lightning    # a CNN in Lightning
python tools/own_loops.py reach        # timm's MobileNetV3 and ViT-tiny, and others
torchrun --nproc-per-node 2 tools/own_loops.py ranks
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune2onnx import Compression, density, prune
from prune2onnx.errors import PruningWarning
from prune2onnx.training.denormals import denormals
from prune2onnx.training.export import export

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from own_loop import digits, error, network

HEADINGS = "| network | dense bytes | wanted | file | of it | error dense | error | seconds |"


def row(*cells: object) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(
    name: str, dense: int, wanted: int, file: int, was: float, now: float, since: float
) -> None:
    """Prints a network's line."""
    share = f"{100 * file / wanted:.2f} %"
    errors = f"{was:.2f} %", f"{now:.2f} %"
    seconds = round(time.perf_counter() - since)
    print(HEADINGS)
    print(row(name, f"{dense:,}", f"{wanted:,}", f"{file:,}", share, *errors, seconds))


# -- transformers ----------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [count, 16] below 200, and whether those above 100 are the majority."""
    tokens = torch.randint(3, 200, (count, 16), generator=torch.Generator().manual_seed(seed))
    return tokens, ((tokens > 100).float().mean(1) > 0.5).long()


def trainer(wanted: int = 18_000, dense_steps: int = 200, steps: int = 300) -> None:
    """A BERT of one layer with random weights: first trained as it is, then made small."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from prune2onnx import TransformersCallback

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    tokens, labels = sentences(4096, 0)
    ones = torch.ones(16, dtype=torch.int64)
    data: Any = [
        {"input_ids": t, "attention_mask": ones, "labels": y}
        for t, y in zip(tokens, labels, strict=True)
    ]
    held, answers = sentences(1024, 1)
    inputs = {"input_ids": held[:2], "attention_mask": ones.repeat(2, 1)}

    def wrong(one: Any) -> float:
        with torch.no_grad():
            scores = one.eval()(input_ids=held, attention_mask=torch.ones_like(held)).logits
        return 100 * float((scores.argmax(1) != answers).float().mean())

    def run(count: int, callbacks: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=count,
                learning_rate=1e-3,
                per_device_train_batch_size=32,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_steps=count,
                use_cpu=True,
            )
            Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()

    began = time.perf_counter()
    run(dense_steps, [])
    before, dense = wrong(model), export(model, inputs).ByteSize()
    quick = {"prune.threshold_lr": 0.03}  # for as few steps
    callback = TransformersCallback(inputs, target_size=wanted, settings=quick)
    run(steps, [callback])
    small, packed = callback.finish()
    table("BERT, Trainer", dense, wanted, packed.model.ByteSize(), before, wrong(small), began)


# -- lightning -------------------------------------------------------------------------------------


def lightning(wanted: int = 4_000) -> None:
    """A CNN on digits, trained and made small in one run of 40 epochs."""
    import lightning as pl

    from prune2onnx import LightningCallback

    x, y = digits()

    class Digits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.example_input_array = x[:2]

        def forward(self, images: torch.Tensor) -> Any:
            return self.net(images)

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 2e-3)

    examples = torch.utils.data.TensorDataset(x[:1400], y[:1400])

    def run(module: Any, epochs: int, callbacks: list[Any]) -> None:
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(examples, batch_size=64, shuffle=True)
        pl.Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(module, loader)

    began = time.perf_counter()
    torch.manual_seed(0)
    module = Digits()
    run(module, 20, [])
    before, dense = error(module.net, x[1400:], y[1400:]), export(module.net, x[:2]).ByteSize()
    callback = LightningCallback(target_size=wanted)
    run(module, 40, [callback])
    small, packed = callback.finish()
    after = error(small, x[1400:], y[1400:])
    table("CNN, Lightning", dense, wanted, packed.model.ByteSize(), before, after, began)


# -- what is reached -------------------------------------------------------------------------------


def reach() -> None:
    """How many of the parameters of networks as they are used are pruned, and what is not."""
    print("| network | parameters | pruned | of it | matrices that are not |")
    for name, model in _networks():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PruningWarning)
            found = density(prune(model))
        every = found.size + found.others_size
        shapes = {n: p.ndim for n, p in model.named_parameters()}
        left = [f"{o.name} ({o.layer}, {o.size:,})" for o in found.others if shapes[o.name] > 1]
        share = f"{100 * found.size / every:.2f} %"
        print(row(name, f"{every:,}", f"{found.size:,}", share, ", ".join(left) or "none"))


def _networks() -> Any:
    import timm
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    for name in ("mobilenetv3_small_100", "vit_tiny_patch16_224", "convnext_atto"):
        yield f"timm {name}", timm.create_model(name, pretrained=False)
    yield "BERT base, 2 layers", BertModel(BertConfig(num_hidden_layers=2))
    yield "GPT-2, 2 layers", GPT2Model(GPT2Config(n_layer=2))
    yield "torch Transformer", nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
    yield "2-layer LSTM, both ways", nn.LSTM(64, 128, 2, bidirectional=True)


# -- several processes -----------------------------------------------------------------------------


def ranks(wanted: int = 4_000, steps: int = 600) -> None:
    """The CNN in several processes: bytes and zeros on each, its error."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if several else 0
    count = torch.distributed.get_world_size() if several else 1
    x, y = digits()
    for name, make in (("CNN", network), ("MLP", _mlp), ("GRU", _Rows)):
        torch.manual_seed(0)
        model = make()
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model) if several else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        compression = Compression(
            wrapped,
            x[:2],
            steps=steps,
            target_size=wanted,
            phases={"dense": 0.25, "prune": 0.45, "tune": 0.15, "quantize": 0.15},
        )
        drawing = torch.Generator().manual_seed(rank)
        for _ in range(steps):
            wrapped.train()
            batch = torch.randint(0, 1400, (64 // count,), generator=drawing)
            loss = nn.functional.cross_entropy(wrapped(x[batch]), y[batch])
            optimizer.zero_grad()
            (loss + compression.penalty()).backward()
            optimizer.step()
            compression.step()
        small, packed = compression.finish()
        masks = b"".join(
            (p != 0).numpy().tobytes() for _, p in small.named_parameters() if p.ndim > 1
        )
        digest = hashlib.sha256(masks).hexdigest()[:12]
        wrong = error(small, x[1400:], y[1400:])
        line = row(name, f"{rank} of {count}", packed.model.ByteSize(), digest, f"{wrong:.2f} %")
        print(line, flush=True)
    if several:
        torch.distributed.destroy_process_group()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


class _Rows(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> Any:
        return self.out(self.rnn(images[:, 0])[0][:, -1])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with denormals(flushed=True):
        {"trainer": trainer, "lightning": lightning, "reach": reach, "ranks": ranks}[sys.argv[1]]()
