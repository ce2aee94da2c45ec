"""Packs a model of gigabytes, opens, validates and unpacks it: time, memory, and equal weights.

    python tools/big_model.py [--gigabytes 2.6] [-o FOLDER]

Makes a stack of 24 linear layers with external data: every other one on levels of about 4 bits of
entropy, the others normal float32. Each step is the command, in a process of its own, with its CPU
time, wall time and peak memory. Prints a Markdown table; the exit status is 1 if a weight differs.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from prune2onnx.graph.file import file_nbytes, load
from prune2onnx.graph.tensors import fingerprint

LAYERS = 24


def make(path: Path, nbytes: float) -> None:
    """Writes the model, one layer at a time."""
    width = round((nbytes / 4 / LAYERS) ** 0.5)
    rng = np.random.default_rng(0)
    nodes, tensors, at, offset = [], [], "x", 0
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as stream:
        for layer in range(LAYERS):
            weight = rng.normal(0, 0.02, (width, width)).astype(np.float32)
            if layer % 2:
                step = np.float32(0.02 / 4.13)
                weight = np.rint(weight / step) * step + np.float32(0)
            tensor = TensorProto(name=f"layer{layer}", dims=weight.shape, data_type=1)
            tensor.data_location = TensorProto.EXTERNAL
            entries = (("location", data.name), ("offset", offset), ("length", weight.nbytes))
            for key, value in entries:
                tensor.external_data.add(key=key, value=str(value))
            offset += stream.write(weight.tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [at, tensor.name], [f"h{layer}"]))
            nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]))
            at = f"r{layer}"
    value = helper.make_tensor_value_info
    nodes.append(helper.make_node("Identity", [at], ["y"]))
    graph = helper.make_graph(
        nodes,
        "stack",
        [value("x", TensorProto.FLOAT, ["N", width])],
        [value("y", TensorProto.FLOAT, ["N", width])],
        tensors,
    )
    opset = [helper.make_opsetid("", 18)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    )


def timed(*command: str) -> tuple[float, float, float]:
    """Seconds of CPU, seconds, and peak MB of a process."""
    began = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss / 1e3


def weights(model: ModelProto) -> dict[str, bytes]:
    """A digest of each weight."""
    return {tensor.name: fingerprint(tensor) for tensor in model.graph.initializer}


@click.command()
@click.option("--gigabytes", type=float, default=2.6)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(gigabytes: float, output: Path | None) -> None:
    """Packs, opens, validates and unpacks a model of gigabytes."""
    folder = output or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    dense, packed, back = (folder / f"{name}.onnx" for name in ("dense", "packed", "unpacked"))
    make(dense, gigabytes * 1e9)
    tool = [sys.executable, "-m", "prune2onnx"]
    opened = "import sys, onnxruntime as o; o.InferenceSession(sys.argv[1])"
    steps = {
        "pack": [*tool, "pack", str(dense), str(packed)],
        "open dense": [sys.executable, "-c", opened, str(dense)],
        "open packed": [sys.executable, "-c", opened, str(packed)],
        "unpack": [*tool, "unpack", str(packed), str(back)],
        "validate": [*tool, "validate", str(packed)],
    }
    print("| step | CPU s | s | peak MB |\n| --- | --- | --- | --- |")
    for name, command in steps.items():
        cpu, wall, peak = timed(*command)
        print(f"| {name} | {cpu:.1f} | {wall:.1f} | {peak:,.0f} |", flush=True)
    print(f"\n{file_nbytes(dense):,} bytes dense, {file_nbytes(packed):,} packed")
    same = weights(load(dense, lazily=True)) == weights(load(back, lazily=True))
    print("every weight came back bit for bit" if same else "WEIGHTS DIFFER")
    onnx.checker.check_model(str(packed))
    if output is None:
        shutil.rmtree(folder)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
