"""Text as bytes: a transformer that classifies it, and one that continues it.

The text is the documentation strings of Python's standard library, which comes with Python.
"""

import ast
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

PACKAGES = ("asyncio", "email", "unittest", "multiprocessing", "xml", "importlib")
LENGTH = 64
"""Bytes of an example."""


def docstrings(package: str) -> list[str]:
    """The documentation strings of a package, in the order of its files, whitespace collapsed."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    found = []
    for path in files:
        if {"test", "tests"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                found.append(" ".join(text.split()))
    return found


def as_bytes(text: str, length: int) -> np.ndarray:
    """The first bytes of a text, ASCII alone, as int64 `[length]`; padded with 0."""
    codes = text.encode("ascii", "replace")[:length]
    return np.frombuffer(codes.ljust(length, b"\0"), np.uint8).astype(np.int64)


def packages(length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Documentation strings, int64 `[n, length]`, and the number of the package of each."""
    x, y = [], []
    for number, package in enumerate(PACKAGES):
        texts = [text for text in docstrings(package) if len(text) >= 24]
        x += [as_bytes(text, length) for text in texts]
        y += [number] * len(texts)
    return np.stack(x), np.array(y)


def prose(length: int = LENGTH, examples: int = 4000) -> np.ndarray:
    """Pieces of documentation strings, int64 `[n, length + 1]`, without labels."""
    names = (*PACKAGES, "http", "json", "logging", "urllib", "argparse", "subprocess", "typing")
    text = "\n".join(line for name in names for line in docstrings(name))
    codes = as_bytes(text, len(text))
    pieces = codes[: len(codes) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    return pieces[:examples]


class Block(nn.Module):
    """Self-attention and two linear layers, normalised before each (GPT-2's order)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, positions, width]` to the same."""
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Embedded bytes and positions, up to `LENGTH` of them, blocks, and a score for each class."""

    def __init__(self, tokens: int, classes: int, width: int, layers: int, *, causal: bool) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(tokens, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=causal) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.causal = causal

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[batch, positions]` to scores `[batch, classes]`, or one row for each position."""
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.norm(self.blocks(x))
        return self.head(x if self.causal else x.mean(1))


def classifier(classes: int, vocab_size: int = 128, width: int = 64, layers: int = 2) -> nn.Module:
    """Scores `[batch, classes]` of int64 bytes `[batch, positions]`."""
    return Transformer(vocab_size, classes, width, layers, causal=False)


def language_model(vocab_size: int = 128, width: int = 64, layers: int = 2) -> nn.Module:
    """Scores `[batch, positions, vocab_size]` of the byte that follows each."""
    return Transformer(vocab_size, vocab_size, width, layers, causal=True)
