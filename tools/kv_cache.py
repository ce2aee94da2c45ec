"""A decoder with a KV cache: perplexity, bytes and tokens per second in each type that computes.

    python tools/kv_cache.py [-o OUT] [--seconds 90] [--width 256] [--layers 4]

The network (RMSNorm, rotary positions, two heads a key, gated SiLU) reads bytes; it is trained for
a while on the topics of Python's documentation (pydoc_data), of which every tenth one is held out.
Perplexity is that of a byte, over windows of 128 of held-out text; tokens are made one by one on
one thread, each from the cache of those before, in median CPU time, files interleaved. Examples
that calibrate are windows of the training text.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.file import file_nbytes
from prune2onnx.runs.defaults import InputOptions, PackOptions

WINDOW = 128
HEADS = 8
SHARED = 2  # heads of queries that have a key together
SETTINGS: tuple[dict[str, Any], ...] = (
    {"compute": "float32"},
    {"compute": "int8"},
    {"compute": "int8-weights"},
    {"compute": "int4"},
    {"compute": "int4", "data": True},
    {"compute": "int8", "bits": 4.0},
    {"compute": "int8", "bits": 4.0, "data": True},
)


class Layer(nn.Module):
    """Attention with a cache, then gated neurons."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width // HEADS
        keys = width // SHARED
        self.norm, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k = nn.Linear(width, width, False), nn.Linear(width, keys, False)
        self.v, self.o = nn.Linear(width, keys, False), nn.Linear(width, width, False)
        self.gate, self.up = (nn.Linear(width, 3 * width, False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, False)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """X [batch, tokens, width]; past [batch, 2, keys, tokens before, size]."""
        y = self.norm(x)
        q, k, v = (
            one.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for one in (self.q(y), self.k(y), self.v(y))
        )
        q, k = rotated(q, turn), rotated(k, turn)
        both = torch.cat([past, torch.stack([k, v], 1)], dim=3)
        keys, values = both.repeat_interleave(SHARED, 2).unbind(1)
        scores = q @ keys.transpose(-1, -2) / math.sqrt(self.size) + mask
        x = x + self.o((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y)), both


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Positions [2, tokens, size / 2], cosines and sines, on pairs of x."""
    one, other = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


class Decoder(nn.Module):
    """Logits of the next byte, and the cache, [batch, layers, 2, keys, tokens, size]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, False)
        self.size = width // HEADS

    def forward(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [batch, tokens]."""
        before, now = past.shape[4], ids.shape[1]
        places = torch.arange(before + now)
        angle = torch.outer(
            places[before:].float(), 10000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        )
        turn = torch.stack([angle.cos(), angle.sin()])
        mask = torch.where(places[None, :] > places[before:, None], -1e9, 0.0)
        x, kept = self.table(ids), []
        for layer, own in zip(self.layers, past.unbind(1), strict=True):
            x, both = layer(x, turn, mask, own)
            kept.append(both)
        return self.head(self.norm(x)), torch.stack(kept, 1)


def text() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Training and held-out bytes."""
    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        parts[number % 10 == 0].append(topics[name])
    first, second = (np.frombuffer("\n".join(part).encode(), np.uint8) for part in parts)
    return first, second


def windows(data: NDArray[np.uint8], count: int, seed: int) -> NDArray[np.int64]:
    """[count, WINDOW + 1] bytes from places at random."""
    begins = np.random.default_rng(seed).integers(0, len(data) - WINDOW - 1, count)
    return np.stack([data[at : at + WINDOW + 1] for at in begins]).astype(np.int64)


def trained(model: Decoder, data: NDArray[np.uint8], seconds: float, past: Tensor) -> None:
    """Trains for so many seconds of CPU time; AdamW, cosine by the time spent."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    began, step = time.process_time(), 0
    while (spent := (time.process_time() - began) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * spent))
        batch = torch.from_numpy(windows(data, 16, step))
        logits, _ = model(batch[:, :-1], past.expand(16, -1, -1, -1, -1, -1))
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
    print(f"{step} steps of 16 windows, loss {loss.item():.3f} nat a byte")


def opened(path: Path) -> onnxruntime.InferenceSession:
    """A session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def perplexity(session: Any, held: NDArray[np.int64], past: NDArray[np.float32]) -> float:
    """Of a byte."""
    total = 0.0
    for batch in np.split(held, len(held) // 8):
        own = np.repeat(past, len(batch), axis=0)
        logits = session.run(None, {"ids": batch[:, :-1], "past": own})[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= np.take_along_axis(logs, batch[:, 1:, None], -1).mean() * len(batch)
    return math.exp(total / len(held))


def written(session: Any, first: NDArray[np.int64], past: NDArray[np.float32]) -> Iterator[float]:
    """CPU seconds of each token after the first ones, greedily."""
    ids = first[None]
    while True:
        began = time.process_time()
        logits, past = session.run(None, {"ids": ids, "past": past})
        ids = logits[:, -1:].argmax(-1)
        yield time.process_time() - began


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/kv_cache"))
@click.option("--seconds", type=float, default=90.0, show_default=True, help="of training")
@click.option("--width", type=int, default=256, show_default=True)
@click.option("--layers", type=int, default=4, show_default=True)
def main(output: Path, seconds: float, width: int, layers: int) -> None:
    """Prints a line for each setting."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    output.mkdir(parents=True, exist_ok=True)
    data, held_out = text()
    model = Decoder(width, layers)
    none = torch.zeros(1, layers, 2, HEADS // SHARED, 0, width // HEADS)
    trained(model, data, seconds, none)
    dense = output / "dense.onnx"
    tokens, before = torch.export.Dim("tokens", max=4096), torch.export.Dim("before", max=4096)
    batch = torch.export.Dim("batch", max=64)
    torch.onnx.export(
        copy.deepcopy(model).eval(),
        (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, *none.shape[1:4], 3, none.shape[5])),
        dense,
        input_names=["ids", "past"],
        output_names=["logits", "present"],
        dynamic_shapes={"ids": {0: batch, 1: tokens}, "past": {0: batch, 4: before}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    known, held = windows(data, 256, 10**6), windows(held_out, 64, 0)
    past = none.numpy()
    np.savez(
        output / "known.npz",
        ids=known[:, :-1],
        past=np.repeat(past, 256, axis=0),
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{count:,} weights\n\n| options | bytes | perplexity | tokens a CPU second | of the time |"
    )
    print("| --- | --- | --- | --- | --- |")
    first = opened(dense)
    for setting in SETTINGS:
        own = dict(setting)
        given = f"npz:{output / 'known.npz'}" if own.pop("data", False) else None
        name = ", ".join(f"{key} {value}" for key, value in setting.items())
        target = output / f"{name.replace(' ', '-').replace(',', '')}.onnx"
        options = PackOptions(strip=True, inputs=InputOptions(given), **own)
        pack_file(dense, target, options)
        session = opened(target)
        times = zip(
            written(first, held[0, :32], past), written(session, held[0, :32], past), strict=False
        )
        pairs = np.array([next(times) for _ in range(200)])[1:]
        base, spent = np.median(pairs, axis=0)
        print(
            f"| {name} | {file_nbytes(target):,} | {perplexity(session, held, past):.3f} | "
            f"{1 / spent:,.0f} | {spent / base:.2f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
