"""The time of a pruning step against a dense training step, and whether it grows during pruning.

    python tools/step_cost.py [lenet5 | resnet20] [--threads 2] [--steps 60] [--epochs 20]

Batch 128, random data; the pruning step is that of `fit`, clamp included. First both steps are
timed interleaved: medians and their ratio. Then a pruning run follows, with rising thresholds, and
every five epochs its steps are timed again, interleaved with dense ones: weights that decay into
denormals would make them slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import numpy as np
import torch
from torch import nn

from prune2onnx import density, prune
from prune2onnx.callables import load_callable
from prune2onnx.pruning import pressed, thresholds_of, weigh_by_bits
from prune2onnx.training.compression.course import step_with_clamp
from prune2onnx.training.cpu.allocator import keep_freed_memory

PRESSURE, DENSITY = 5.0, 0.015
STEPS_PER_EPOCH = 100
NETWORKS = {
    "lenet5": ("models/lenet.py:lenet5", (1, 28, 28)),
    "resnet20": ("models/resnet_cifar.py:resnet20", (3, 32, 32)),
}
"""Name -> its function, and the shape of an example."""


def make_step(
    model: nn.Module, shape: tuple[int, ...], *, pruned: bool, lr: float = 1e-3
) -> Callable[[], None]:
    """A training step on one fixed batch."""
    generator = torch.Generator().manual_seed(0)
    model.to(memory_format=torch.channels_last)
    x = torch.rand(128, *shape, generator=generator)
    y = torch.randint(0, 10, (128,), generator=generator)
    if pruned:
        prune(model, thresholds="channel")
        weigh_by_bits(model)
    size = density(model).size
    thresholds = thresholds_of(model)
    known = {id(p) for p in thresholds}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known]}]
    groups += [{"params": thresholds}] if pruned else []
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        if not pruned:
            optimiser.step()
            return
        found = pressed(model)
        above = found.alive / (size * DENSITY) - 1
        found.add(PRESSURE / size * (above / 0.25).clamp(0, 1))
        step_with_clamp(optimiser, thresholds, above)

    return step


def interleaved(steps: list[Callable[[], None]], count: int) -> list[float]:
    """Median milliseconds of each step, measured interleaved."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(count):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(taken)) for taken in times]


@click.command()
@click.argument("network", type=click.Choice(list(NETWORKS)), default="lenet5")
@click.option("--threads", default=2)
@click.option("--steps", default=60)
@click.option("--epochs", default=20)
def main(network: str, threads: int, steps: int, epochs: int) -> None:
    """Time the steps and print the table."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    function, shape = NETWORKS[network]
    make = load_callable(function)
    torch.manual_seed(0)
    dense = make_step(make(), shape, pruned=False)
    pruning = make_step(make(), shape, pruned=True)
    interleaved([dense, pruning], 5)
    print("| after | dense step | pruning step | ratio |")
    print("| --- | --- | --- | --- |")
    a, b = interleaved([dense, pruning], steps)
    print(f"| start | {a:.1f} ms | {b:.1f} ms | {b / a:.2f} |")
    for epoch in range(1, epochs + 1):
        for _ in range(STEPS_PER_EPOCH):
            pruning()
        if epoch % 5 == 0:
            a, b = interleaved([dense, pruning], max(10, steps // 3))
            print(f"| epoch {epoch} | {a:.1f} ms | {b:.1f} ms | {b / a:.2f} |")


if __name__ == "__main__":
    main()
