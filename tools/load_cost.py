"""What it costs to open packed files: CPU time and peak memory of a session, beside the dense file.

    python tools/load_cost.py [--megabytes 10,40,170] [--rounds 7] [-o FOLDER]

Makes stacks of linear layers of so many MB of float32 weights (768 wide, about four times that in
the middle; normal values, one in a thousand of them five times as large), in several forms: levels
of about 4 bits of entropy, float32, bfloat16 values, int8 behind DequantizeLinear with 7 and with 5
bits of entropy, 10 % and 5 % of the weights on 15 levels. Each is packed for `balanced`, `fast` and
`small`. Every load is a fresh process with one thread, files interleaved, medians; all are checked
to fold, and to give the dense file's outputs bit for bit. Prints a Markdown table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from prune2onnx import pack
from prune2onnx.runtime.folding import folds
from prune2onnx.runtime.latency import load_in_fresh_process
from prune2onnx.runtime.session import session

WIDTH = 768
LOADS = ("balanced", "fast", "small")

Form = Callable[[NDArray[np.float32], np.random.Generator], NDArray[np.generic]]


def levels(deviations: float) -> Form:
    """Multiples of a step; a normal weight deviates by so many of them."""

    def form(weight: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.generic]:
        step = np.float32(weight.std() / deviations)
        return np.rint(weight / step) * step + np.float32(0)

    return form


def sparse(density: float) -> Form:
    """The largest weights, on 15 levels."""

    def form(weight: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.generic]:
        kept = np.abs(weight) >= np.quantile(np.abs(weight), 1 - density)
        level = np.sign(weight) * np.minimum(rng.geometric(0.35, weight.shape), 7)
        return (level * kept * np.float32(weight.std()) + np.float32(0)).astype(np.float32)

    return form


def as_int8(deviations: float) -> Form:
    """int8; a normal weight deviates by so many of its steps."""
    return lambda weight, rng: np.clip(
        np.rint(weight / weight.std() * deviations), -128, 127
    ).astype(np.int8)


FORMS: dict[str, Form] = {
    "4 bits": levels(4.13),
    "float32": lambda weight, rng: weight,
    "bfloat16": lambda weight, rng: (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view("f4"),
    "int8, 7 bits": as_int8(31),
    "int8, 5 bits": as_int8(7.75),
    "10 % dense": sparse(0.1),
    "5 % dense": sparse(0.05),
}


def stack(megabytes: float, form: Form) -> ModelProto:
    """A model: x [N, WIDTH], through pairs of MatMuls with an Add and a Relu."""
    rng = np.random.default_rng(0)
    pairs = max(1, round(megabytes * 1e6 / (32 * WIDTH * WIDTH)))
    width = round(megabytes * 1e6 / (8 * WIDTH * pairs))
    nodes, tensors, at = [], [], "x"

    def store(name: str, array: NDArray[np.generic]) -> str:
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    for number in range(pairs):
        for way, shape in (("up", (WIDTH, width)), ("down", (width, WIDTH))):
            weight = rng.normal(0, 0.02, shape).astype(np.float32)
            weight.reshape(-1)[rng.integers(0, weight.size, weight.size // 1000)] *= 5
            name = f"{way}{number}"
            stored = form(weight, rng)
            matrix = store(name, stored)
            if stored.dtype == np.int8:
                scale = store(f"{name}.scale", np.float32(weight.std() / 31))
                nodes.append(helper.make_node("DequantizeLinear", [name, scale], [f"{name}.f"]))
                matrix = f"{name}.f"
            bias = store(f"{name}.bias", rng.normal(0, 0.02, shape[1]).astype(np.float32))
            nodes.append(helper.make_node("MatMul", [at, matrix], [f"{name}.m"]))
            nodes.append(helper.make_node("Add", [f"{name}.m", bias], [f"{name}.a"]))
            nodes.append(helper.make_node("Relu", [f"{name}.a"], [f"{name}.r"]))
            at = f"{name}.r"
    value = helper.make_tensor_value_info
    nodes.append(helper.make_node("Identity", [at], ["y"]))
    graph = helper.make_graph(
        nodes, "stack", [value("x", 1, ["N", WIDTH])], [value("y", 1, ["N", WIDTH])], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def loaded(path: Path) -> tuple[float, float]:
    """CPU milliseconds and peak MB of a session in a fresh process with one thread."""
    opened = load_in_fresh_process(path)
    return opened.cpu_ms, opened.peak_rss_bytes / 1e6


@click.command()
@click.option("--megabytes", default="10,40,170", show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--forms", default="", help="such as 'float32;4 bits'; default: all")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="keep the files here")
def main(megabytes: str, rounds: int, forms: str, output: Path | None) -> None:
    """Prints the table."""
    loads = " | ".join(LOADS)
    print(f"| MB, form | dense | {loads} | CPU ms, dense | {loads} | peak MB, dense | {loads} |")
    print("| --- " * (4 + 3 * len(LOADS)) + "|")
    x = {"x": np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for size in megabytes.split(","):
            for name in forms.split(";") if forms else FORMS:
                dense = stack(float(size), FORMS[name])
                stem = f"{size}-{name.replace(' ', '').replace('%', '')}"
                paths = [folder / f"{stem}.{kind}.onnx" for kind in ("dense", *LOADS)]
                onnx.save(dense, paths[0])
                (wanted,) = session(paths[0]).run(None, x)
                for kind, path in zip(LOADS, paths[1:], strict=True):
                    packed = pack(dense, load=kind).model
                    onnx.save(packed, path)
                    (got,) = session(path).run(None, x)
                    assert got.tobytes() == wanted.tobytes(), f"{path}: other outputs"
                    assert folds(packed, dense), f"{path}: does not fold"
                runs = np.median([[loaded(path) for path in paths] for _ in range(rounds)], axis=0)
                cells = [f"{path.stat().st_size:,}" for path in paths]
                for column in (0, 1):
                    first = runs[0, column]
                    cells.append(f"{first:.0f}")
                    cells += [f"{own:.0f} ({own / first:.2f}x)" for own in runs[1:, column]]
                print(f"| {size}, {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
