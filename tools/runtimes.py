"""Which onnxruntime versions open a packed file, fold its decoders and give the same answer.

    python tools/runtimes.py runs/digits/model.onnx [--versions 1.17.3,1.20.1,1.32.0]

For each version a virtual environment with nothing but onnxruntime and numpy opens the packed file
and the plain one it unpacks to, saves both optimised graphs, and runs both on the same random
input. Prints a Markdown table; exit status 1 if a version fails. Needs a package index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path

import click
import numpy as np
import onnx

from prune2onnx import unpack
from prune2onnx.pack import load
from prune2onnx.validate import random_inputs, session

VERSIONS = "1.17.3,1.20.1,1.23.2,1.32.0"

CHILD = """
import sys, time
import numpy as np
import onnxruntime as ort
folder = sys.argv[1]
inputs = dict(np.load(folder + "/inputs.npz"))
for name in ("packed", "plain"):
    for level in ("BASIC", "ALL"):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, "ORT_ENABLE_" + level)
        options.optimized_model_filepath = f"{folder}/{name}.{level}.onnx"
        session = ort.InferenceSession(
            f"{folder}/{name}.onnx", options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, inputs)
    np.savez(f"{folder}/{name}.npz", *outputs)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        ort.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
        times.append(1e3 * (time.perf_counter() - start))
    print(np.median(times))
"""


def interpreter(folder: Path, version: str) -> Path:
    """A Python with that onnxruntime and nothing of ours."""
    home = folder / version
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        # wheels before 1.19 were built against numpy 1
        old = tuple(map(int, version.split(".")[:2])) < (1, 19)
        wanted = [f"onnxruntime=={version}", "numpy<2" if old else "numpy"]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def operators(path: Path) -> Counter[str]:
    """How often each operator stands in a graph."""
    return Counter(f"{node.domain}:{node.op_type}" for node in onnx.load(path).graph.node)


@click.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--versions", default=VERSIONS)
@click.option("--environments", type=click.Path(path_type=Path), default=Path("runs/runtimes"))
def main(file: Path, versions: str, environments: Path) -> None:
    """Try FILE with each version and print the table."""
    packed = load(file)
    print("| onnxruntime | opens | folded | largest difference | load, plain | load, packed |")
    print("| --- | --- | --- | --- | --- | --- |")
    failed = False
    for version in versions.split(","):
        python = interpreter(environments.resolve(), version)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            onnx.save(packed, folder / "packed.onnx")
            onnx.save(unpack(packed), folder / "plain.onnx")
            np.savez(folder / "inputs.npz", **random_inputs(session(packed)))
            done = subprocess.run(
                [str(python), "-c", CHILD, str(folder)], capture_output=True, text=True
            )
            if done.returncode:
                failed = True
                print(f"| {version} | no: {done.stderr.strip().splitlines()[-1][:200]} | | | | |")
                continue
            folded = all(
                operators(folder / f"packed.{level}.onnx")
                == operators(folder / f"plain.{level}.onnx")
                for level in ("BASIC", "ALL")
            )
            a, b = (np.load(folder / f"{name}.npz") for name in ("packed", "plain"))
            difference = max(float(np.abs(a[key] - b[key]).max()) for key in a.files)
            failed |= not folded or difference > 0
            slow, fast = (float(line) for line in done.stdout.split())
            print(
                f"| {version} | yes | {'yes' if folded else 'NO'} | {difference:g} "
                f"| {fast:.1f} ms | {slow:.1f} ms |"
            )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
