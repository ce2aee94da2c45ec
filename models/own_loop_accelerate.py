"""The loop of own_loop.py with accelerate: one or several processes, mixed precision, accumulation.

accelerate launch models/own_loop_accelerate.py -o small.onnx
torchrun --nproc-per-node 2 models/own_loop_accelerate.py -o small.onnx
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from own_loop import digits, error, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prune2onnx import Compression


def train(
    target_size: int, *, epochs: int, accumulate: int = 2, precision: str = "no"
) -> tuple[Accelerator, nn.Module, bytes]:
    """Trains, and makes small from the second epoch on: the network and its file."""
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
    )
    x, y = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=32, shuffle=True)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    steps = -(-len(batches) // accumulate) * epochs
    compression = Compression(
        wrapped,
        x[:2],
        steps=steps,
        target_size=target_size,
        phases={"dense": 0.2, "prune": 0.5, "tune": 0.15, "quantize": 0.15},
        settings={"prune.threshold_lr": 0.03},
    )
    for _ in range(epochs):
        wrapped.train()
        for inputs, labels in batches:
            with accelerator.accumulate(wrapped):
                loss = nn.functional.cross_entropy(wrapped(inputs), labels)
                accelerator.backward(loss + compression.penalty())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    compression.step()
                optimizer.zero_grad()
        accelerator.print(compression.epoch_end())
    small, packed = compression.finish()
    return accelerator, small, packed.model.SerializeToString()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target-size", type=int, default=4_000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("-o", default="small.onnx")
    given = parser.parse_args()
    accelerator, small, file = train(given.target_size, epochs=given.epochs)
    x, y = digits()
    if accelerator.is_main_process:
        Path(given.o).write_bytes(file)
    accelerator.print(f"{len(file):,} bytes; error {error(small, x[1400:], y[1400:]):.2f} %")
    accelerator.end_training()
