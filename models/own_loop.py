"""A training loop of one's own, made to end in a small file: digits, plain PyTorch.

    python models/own_loop.py --target-size 4000 -o small.onnx

Only the lines with `compression` differ from an ordinary loop.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from prune2onnx import Compression


def network() -> nn.Module:
    """A small convolutional network with BatchNorm, 10 classes of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, 8, 8] from 0 to 1, and their classes [n]."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)


def error(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of the examples that a model gets wrong."""
    with torch.no_grad():
        return 100 * float((model.eval()(x).argmax(1) != y).float().mean())


def train(target_size: int, *, dense: int, steps: int) -> tuple[nn.Module, bytes, float, float]:
    """Trains, and makes small: the network, its file, and both errors on held-out examples."""
    torch.manual_seed(0)
    x, y = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    compression = None
    before = 0.0
    for step in range(dense + steps):
        if step == dense:
            before = error(model, x[1400:], y[1400:])
            compression = Compression(model, x[:2], steps=steps, target_size=target_size)
        model.train()
        batch = torch.randint(0, 1400, (64,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        if compression is not None:
            loss = loss + compression.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if compression is not None:
            compression.step()
            if step % 100 == 99:
                print(compression.epoch_end())  # noqa: T201
    assert compression is not None  # there are steps
    small, packed = compression.finish()
    return small, packed.model.SerializeToString(), before, error(small, x[1400:], y[1400:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target-size", type=int, default=4_000)
    parser.add_argument("--dense", type=int, default=400, help="steps before")
    parser.add_argument("--steps", type=int, default=1_200, help="steps of compression")
    parser.add_argument("-o", default="small.onnx")
    given = parser.parse_args()
    _, file, before, after = train(given.target_size, dense=given.dense, steps=given.steps)
    with open(given.o, "wb") as target:  # noqa: PTH123
        target.write(file)
    print(f"{len(file):,} bytes; error {before:.2f} % before, {after:.2f} % after")  # noqa: T201
