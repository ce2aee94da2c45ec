"""Bytes of packed files against other ways to store the same weights, and against their entropy.

    PRUNE2ONNX_DATA=DIR python tools/sizes.py [--only resnet20] [-o runs/sizes] [FILE.onnx ...]

Cases: ResNet-20 and -32 (trained weights, BatchNorm folded) and slim320.onnx from PRUNE2ONNX_DATA,
LeNet-300-100 and LeNet-5 as initialised with seed 0, one 4096 x 4096 weight, and every given file
with its weights as they are (a packed one is unpacked first). Weights of convolutions and matrix
products are pruned by magnitude, to the same density each or (--scope network) by one threshold
per network. The remaining elements are quantized to L levels, k times a step, k = -L/2 ... L/2
without 0, where L/2 steps are the largest magnitude of that weight. Biases and other vectors are
rounded to float16. The 4096 x 4096 weight has 5 % nonzeros at random positions, on 15 levels of a
Gaussian.

All columns start from one dense file, normalized and stripped of everything that inference does not
need (notes, default attributes, long internal names). Columns: `dense`; `sparse`, ONNX's
sparse_initializer where that is smaller; gzip -9, zstd -19, xz -9 and xz -9e of the dense file;
`entropy`, zero-order, per tensor: of the positions of nonzeros (n H(density) bits) and of their
values; tensors of one axis as they are (2 bytes per value where float16 is exact), and nothing for
the graph; `ours`, the packed file, with unpacked weights that equal the dense ones, bit for bit;
`ours / best` of gzip -9, zstd -19 and xz -9; `coded / entropy` of the pruned weights: their streams
with tables and codebooks over the bound; the seconds that pack takes.

Needs the package zstandard. With -o the dense, sparse and packed files are kept.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import lzma
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
import zstandard
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx import Prune2OnnxError, export, fold_batch_norm, pack, unpack
from prune2onnx.callables import load_callable
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.strip import strip
from prune2onnx.packing import codecs
from prune2onnx.packing.inline import outlined
from prune2onnx.packing.sparse import to_sparse

MODELS = Path(__file__).parent.parent / "models"
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
DATA = Path(os.environ.get("PRUNE2ONNX_DATA", "data"))


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: of the network or file.
        settings: density and levels, for people.
        build: makes the dense model, not yet stripped.
    """

    name: str
    settings: str
    build: Callable[[], ModelProto]


def cases(scope: str) -> Iterator[Case]:
    """The cases, in the table's order."""
    for name, densities, sizes in (
        ("lenet_300_100", (0.05,), (16, 32)),
        ("lenet5", (0.05, 0.02), (16, 32)),
        ("resnet20", (0.5, 0.2, 0.1, 0.05), (16, 32)),
        ("resnet32", (0.5, 0.2, 0.1, 0.05), (16, 32)),
        ("slim320", (0.1,), (32,)),
    ):
        make = detector if name == "slim320" else network
        for density, levels in itertools.product(densities, sizes):
            yield Case(
                name,
                f"{100 * density:g} %, {levels}",
                lambda make=make, name=name, d=density, n=levels: pruned(make(name), d, n, scope),
            )
    yield Case("4096 x 4096", "5 %, 15", synthetic)


def network(name: str) -> ModelProto:
    """A network of models/, exported; the ResNets with their trained weights."""
    return ModelProto.FromString(_exported(name))


@functools.cache
def _exported(name: str) -> bytes:
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(0)
    file = "resnet_cifar" if name.startswith("resnet") else "lenet"
    input_shape = (3, 32, 32) if file == "resnet_cifar" else (1, 28, 28)
    model = load_callable(f"{MODELS / file}.py:{name}")(input_shape, 10)
    if file == "resnet_cifar":
        model.load_state_dict(load_file(_data(f"weights/{name}_cifar10.safetensors")))
        fold_batch_norm(model, torch.zeros(2, *input_shape))
    return export(model, input_shape).SerializeToString()


def detector(name: str) -> ModelProto:
    """A detector of 2019: opset 9, weights listed as inputs of the graph."""
    return onnx.load(_data(f"onnx/{name}.onnx"))


def synthetic() -> ModelProto:
    """One MatMul."""
    rng = np.random.default_rng(0)
    size = 4096
    # 15 levels, 0.43 apart: 3.3 bits per value; none of them is 0
    k = np.clip(np.round(rng.normal(size=(size, size)) / 0.43), -7, 7)
    weight = (k * 0.43 + 0.01).astype(np.float32)
    weight[rng.random(weight.shape) >= 0.05] = 0
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name in "xy"
    )
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "main", [x], [y], [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _data(path: str) -> Path:
    if not (DATA / path).exists():
        raise FileNotFoundError(f"{path}: not in {DATA}; set PRUNE2ONNX_DATA")
    return DATA / path


def weights_of(model: ModelProto) -> dict[str, TensorProto]:
    """The weights that are pruned: those of convolutions and matrix products in float32."""
    nodes = [node for node in model.graph.node if node.op_type in LAYERS]
    used = {node.input[1] for node in nodes}
    return {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.name in used and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1
    }


def pruned(model: ModelProto, density: float, levels: int, scope: str) -> ModelProto:
    """Prunes the weights of a model and quantizes them to levels, in place."""
    arrays = {
        tensor.name: np.array(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    weights = weights_of(model)
    everything = np.concatenate([arrays[name].reshape(-1) for name in weights])
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            array = arrays[tensor.name]
            magnitudes = np.abs(everything if scope == "network" else array.reshape(-1))
            threshold = np.sort(magnitudes)[-max(1, round(density * magnitudes.size))]
            step = max(float(np.abs(array).max()), 1e-30) / (levels // 2)
            codes = np.clip(np.round(np.abs(array) / step), 1, levels // 2) * np.sign(array)
            array = (codes * (np.abs(array) >= threshold) * step).astype(np.float32) + np.float32(0)
        elif tensor.name in arrays and len(tensor.dims) < 2:
            array = arrays[tensor.name].astype(np.float16).astype(np.float32)
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def entropy_nbytes(tensor: TensorProto) -> float:
    """The bound for one tensor; tensors of one axis, and integers, count as they are."""
    array = numpy_helper.to_array(tensor)
    if array.ndim < 2 or array.dtype != np.float32:
        exact = array.dtype == np.float32 and np.array_equal(
            array.astype(np.float16).astype(np.float32), array
        )
        return array.nbytes / 2 if exact else array.nbytes
    return codecs.entropy_nbytes(array)


def line(case: Case, output: Path | None) -> str:
    """Measures one case, for a line of the table."""
    dense = strip(normalize(case.build()).model).model
    content = dense.SerializeToString()
    began = time.perf_counter()
    packed = pack(dense, short_names=True)
    seconds = time.perf_counter() - began
    again = {t.name: numpy_helper.to_array(t) for t in unpack(packed.model).graph.initializer}
    for tensor in dense.graph.initializer:
        if numpy_helper.to_array(tensor).tobytes() != again[tensor.name].tobytes():
            raise SystemExit(f"{case.name}: {tensor.name}: unpack gives other bits")
    compressed = (
        len(gzip.compress(content, 9, mtime=0)),
        len(zstandard.ZstdCompressor(level=19).compress(content)),
        len(lzma.compress(content, preset=9)),
        len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
    )
    weights = weights_of(dense)
    size = sum(int(np.prod(t.dims)) for t in weights.values())
    coded = [row for row in packed.rows if row.codec != "dense" and row.name in weights]
    bound = sum(entropy_nbytes(weights[row.name]) for row in coded)
    streams = {name for node in outlined(packed.model).graph.node[:1] for name in node.input}
    stored = sum(len(t.raw_data) for t in packed.model.graph.initializer if t.name in streams)
    stored -= sum(r.nbytes for r in packed.rows if r.codec != "dense" and r.name not in weights)
    ratio = stored / bound if bound else float("nan")
    ours = packed.model.ByteSize()
    sparse, _ = to_sparse(dense)
    if output is not None:
        stem = f"{case.name}-{case.settings}".replace(" %, ", "-").replace(" ", "")
        output.mkdir(parents=True, exist_ok=True)
        for form, model in (("dense", dense), ("sparse", sparse), ("packed", packed.model)):
            onnx.save(model, output / f"{stem.rstrip('-')}.{form}.onnx")
    figures = [len(content), sparse.ByteSize(), *compressed]
    figures.append(round(sum(map(entropy_nbytes, dense.graph.initializer))))
    cells = [case.name, case.settings, f"{size:,}", *(f"{figure:,}" for figure in figures)]
    cells += [f"**{ours:,}**", f"{ours / min(compressed[:3]):.3f}", f"{ours / compressed[3]:.3f}"]
    cells += [f"{ratio:.3f}", f"{seconds:.1f}"]
    return f"| {' | '.join(cells)} |"


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--only", multiple=True, help="run this case, by name; may be repeated")
@click.option(
    "--scope",
    type=click.Choice(["network", "weight"]),
    default="weight",
    show_default=True,
    help="one pruning threshold per network or per weight",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="keep the files in a folder")
def main(files: tuple[Path, ...], only: tuple[str, ...], scope: str, output: Path | None) -> None:
    """Print the table: FILES, then the cases; with FILES and no --only, the FILES alone."""
    given = [Case(path.stem, "", lambda path=path: unpack(onnx.load(path))) for path in files]
    built = [case for case in cases(scope) if (case.name in only if only or files else True)]
    headings = ["network", "density, levels", "weights", "dense", "sparse", "gzip -9", "zstd -19"]
    headings += ["xz -9", "xz -9e", "entropy", "ours", "ours / best", "ours / xz -9e"]
    headings += ["coded / entropy", "pack, s"]
    print(f"| {' | '.join(headings)} |")
    print(f"|{' --- |' * len(headings)}")
    for case in (*given, *built):
        try:
            print(line(case, output), flush=True)
        except (FileNotFoundError, Prune2OnnxError) as error:
            print(f"| {case.name} | {case.settings} | {error} |", flush=True)


if __name__ == "__main__":
    main()
