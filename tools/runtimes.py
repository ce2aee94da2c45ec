"""Which runtimes open packed files, fold their decoders and give the same outputs.

    python tools/runtimes.py FILE.onnx... [--megabytes 1,40,170] [--versions 1.17.3,1.32.0]
        [--web 1.30.0]

With `--megabytes` files are made and packed: stacks of linear layers of so many MB
(`load_cost.py`), and once convolutions with BatchNormalization, and large weights in the bodies of
an If.

Each version of onnxruntime is installed in its own virtual environment, with numpy alone; each
version of onnxruntime-web in its own folder, to run under Node as wasm on one thread (`web.mjs`;
`--web ''` leaves it out). Each opens the packed file and the unpacked one, and runs both on the
same random input. "folded": the optimised graphs of both have the same operators, as many of each,
at the basic and at the full level of optimisation; in onnxruntime-web, which saves no graph, the
same number of nodes. "load": the median of 7 sessions (3 from 8 MB on), dense and packed
interleaved, in a warm process with the default number of threads. "peak": the most MB of a process
of Node that opens and runs the file once. Prints a Markdown table; the exit status is 1 if a
runtime fails. Needs a package index, and npm for the web.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from load_cost import FORMS, stack
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from prune2onnx import pack, unpack
from prune2onnx.runtime.inputs import random_inputs

# The oldest and newest supported versions, and those around the change of constant folding in 1.27.
VERSIONS = "1.17.3,1.20.1,1.23.2,1.24.4,1.25.1,1.26.0,1.27.0,1.28.0,1.32.0"
WEB = "1.20.1,1.30.0"
LOADS = 7
_LARGE = 8_000_000  # bytes of a dense file that is opened less often

CHILD = """
import sys, time
import numpy as np
import onnxruntime as ort
folder, loads = sys.argv[1], int(sys.argv[2])
inputs = dict(np.load(folder + "/inputs.npz"))
names = ("packed", "dense")
for name in names:
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
    del session
times = {name: [] for name in names}
for _ in range(loads):
    for name in names:
        start = time.perf_counter()
        ort.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
        times[name].append(1e3 * (time.perf_counter() - start))
print(*(np.median(times[name]) for name in names))
"""


@dataclass(frozen=True)
class Outcome:
    """Results of one runtime for one file: outputs, load times, and whether decoders are folded."""

    packed: list[NDArray[Any]]
    dense: list[NDArray[Any]]
    folded: bool
    packed_ms: float
    dense_ms: float
    packed_peak: float = 0.0
    dense_peak: float = 0.0

    @property
    def difference(self) -> float:
        """The largest difference of an output; 0 if all are equal bit for bit."""
        pairs = list(zip(self.packed, self.dense, strict=True))
        if all(a.tobytes() == b.tobytes() for a, b in pairs):
            return 0.0
        return max(float(np.abs(a.astype(np.float64) - b).max(initial=0)) for a, b in pairs)


def loads(folder: Path) -> str:
    """How often the files of a folder are opened."""
    return "3" if (folder / "dense.onnx").stat().st_size > _LARGE else str(LOADS)


def _whole(peak: float) -> str:
    """A peak in MB, where it was measured."""
    return f"{peak:.0f}" if peak else ""


def run(*command: str | Path) -> str:
    """A child process's stdout and stderr; RuntimeError with its last line where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [
            line for line in done.stdout.splitlines() if re.search("error|exception", line, re.I)
        ]
        last = (errors or done.stdout.strip().splitlines() or ["killed"])[-1]
        raise RuntimeError(last[:300].replace("|", "/"))
    return done.stdout


def native(version: str, home: Path) -> Callable[[Path], Outcome]:
    """One version of onnxruntime, in its own virtual environment."""
    python = home / version / "bin" / "python"
    if not python.exists():
        venv.create(home / version, with_pip=True)
    # wheels before 1.19 were built against numpy 1
    old = tuple(map(int, version.split(".")[:2])) < (1, 19)
    wanted = (f"onnxruntime=={version}", "numpy<2" if old else "numpy")
    run(python, "-m", "pip", "install", "--disable-pip-version-check", *wanted)

    def outcome(folder: Path) -> Outcome:
        times = run(python, "-c", CHILD, folder, loads(folder)).strip().splitlines()[-1].split()
        graphs = [
            operators(folder / f"{name}.{level}.onnx")
            for level in ("BASIC", "ALL")
            for name in ("packed", "dense")
        ]
        folded = graphs[0] == graphs[1] and graphs[2] == graphs[3]
        packed, dense = (
            [file[f"arr_{index}"] for index in range(len(file.files))]
            for file in (np.load(folder / f"{name}.npz") for name in ("packed", "dense"))
        )
        return Outcome(packed, dense, folded, float(times[0]), float(times[1]))

    return outcome


def web(version: str, home: Path) -> Callable[[Path], Outcome]:
    """One version of onnxruntime-web, in its own folder, under Node."""
    packages = home / f"web-{version}"
    packages.mkdir(parents=True, exist_ok=True)
    (packages / "package.json").write_text("{}")
    run("npm", "install", "--prefix", packages, "--no-audit", f"onnxruntime-web@{version}")
    script = Path(__file__).with_name("web.mjs")

    def outcome(folder: Path) -> Outcome:
        node_counts, found = [], []
        for name in ("packed", "dense"):
            log = run("node", script, folder, name, packages, loads(folder))
            node_counts.append(re.findall(r"Number of nodes: (\d+)", log))
            found.append(json.loads((folder / f"{name}.json").read_text()))
        packed, dense = (
            [
                np.frombuffer(base64.b64decode(output["data"]), output["type"])
                for output in result["outputs"]
            ]
            for result in found
        )
        folded = bool(node_counts[0]) and node_counts[0] == node_counts[1]
        times = (result["load_ms"] for result in found)
        peaks = (result["peak_mb"] for result in found)
        return Outcome(packed, dense, folded, *times, *peaks)

    return outcome


def operators(path: Path) -> Counter[str]:
    """How often each operator occurs in a graph."""
    return Counter(f"{node.domain}:{node.op_type}" for node in onnx.load(path).graph.node)


def prepare(file: Path, folder: Path) -> None:
    """Writes packed.onnx, dense.onnx, and one example for onnxruntime and onnxruntime-web."""
    packed = onnx.load(file)
    inputs = random_inputs(unpack(packed))[0]
    onnx.save(packed, folder / "packed.onnx")
    onnx.save(unpack(packed), folder / "dense.onnx")
    np.savez(folder / "inputs.npz", **inputs)
    example = [
        {
            "name": name,
            "type": str(value.dtype),
            "dims": value.shape,
            "data": base64.b64encode(value.tobytes()).decode(),
        }
        for name, value in inputs.items()
    ]
    (folder / "inputs.json").write_text(json.dumps(example))


def convolutions() -> ModelProto:
    """Three convolutions, each with BatchNormalization, of float32 and of few levels."""
    rng = np.random.default_rng(0)
    nodes, tensors, at = [], [], "x"
    for number, form in enumerate(("float32", "4 bits", "10 % dense")):
        weight = rng.normal(0, 0.03, (256, 256 if number else 3, 3, 3)).astype(np.float32)
        factors = {n: rng.uniform(0.5, 1.5, 256).astype(np.float32) for n in "gbmv"}
        names = [f"{name}{number}" for name in ("w", *factors)]
        arrays = (FORMS[form](weight, rng), *factors.values())
        for name, array in zip(names, arrays, strict=True):
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        conv = helper.make_node("Conv", [at, names[0]], [f"c{number}"], pads=[1, 1, 1, 1])
        norm = helper.make_node("BatchNormalization", [f"c{number}", *names[1:]], [f"n{number}"])
        at = f"r{number}"
        nodes += [conv, norm, helper.make_node("Relu", [f"n{number}"], [at])]
    value = helper.make_tensor_value_info
    given, made = value("x", 1, ["N", 3, 16, 16]), value(at, 1, ["N", 256, 16, 16])
    graph = helper.make_graph(nodes, "convolutions", [given], [made], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def branches() -> ModelProto:
    """A large weight in each body of an If, which the sum of the input chooses."""
    rng = np.random.default_rng(0)
    value = helper.make_tensor_value_info
    bodies = {}
    for name, form in (("then_branch", "float32"), ("else_branch", "4 bits")):
        weight = FORMS[form](rng.normal(0, 0.03, (800, 900)).astype(np.float32), rng)
        node = helper.make_node("MatMul", ["x", f"w.{name}"], [f"y.{name}"])
        bodies[name] = helper.make_graph(
            [node],
            name,
            [],
            [value(f"y.{name}", 1, ["N", 900])],
            [numpy_helper.from_array(np.ascontiguousarray(weight), f"w.{name}")],
        )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], **bodies),
    ]
    given, made = value("x", 1, ["N", 800]), value("y", 1, ["N", 900])
    graph = helper.make_graph(nodes, "branches", [given], [made])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def made_files(sizes: str, folder: Path) -> list[Path]:
    """Packed files: stacks of so many MB, convolutions, branches."""
    models = {"convolutions": convolutions(), "branches": branches()} if sizes else {}
    for size in filter(None, sizes.split(",")):
        for form in ("4 bits", "float32", "10 % dense"):
            models[f"{size}MB-{form.replace(' ', '').replace('%', '')}"] = stack(
                float(size), FORMS[form]
            )
    paths = []
    for name, model in models.items():
        paths.append(folder / f"{name}.onnx")
        onnx.save(pack(model).model, paths[-1])
    return paths


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--megabytes", default="", help="sizes of files to make, such as 1,40,170")
@click.option("--versions", default=VERSIONS, help="versions of onnxruntime, comma-separated")
@click.option(
    "--web", "web_versions", default=WEB, help="versions of onnxruntime-web, comma-separated"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/runtimes"))
def main(
    files: tuple[Path, ...], megabytes: str, versions: str, web_versions: str, output: Path
) -> None:
    """Try FILES with each version and print the table."""
    home = output.resolve()
    home.mkdir(parents=True, exist_ok=True)
    files = (*files, *made_files(megabytes, home))
    listed = [
        (f"{package} {version}", make, version)
        for package, make, given in (
            ("onnxruntime", native, versions),
            ("onnxruntime-web", web, web_versions),
        )
        for version in given.split(",")
        if version
    ]
    headings = ("file", "runtime", "opens", "folded", "largest difference", "load, dense")
    headings += ("load, packed", "peak, dense", "peak, packed")
    print(f"| {' | '.join(headings)} |")
    print(f"|{' --- |' * len(headings)}")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(index) for index in range(len(files))]
        for file, folder in zip(files, folders, strict=True):
            folder.mkdir()
            prepare(file, folder)
        for title, make, version in listed:
            try:
                opened = make(version, home)
            except (RuntimeError, OSError) as error:
                failed = True
                print(f"| | {title} | not installed: {error} |{' |' * 6}", flush=True)
                continue
            for file, folder in zip(files, folders, strict=True):
                start = f"| {file.name} | {title} |"
                try:
                    seen = opened(folder)
                except (RuntimeError, OSError) as error:
                    failed = True
                    print(f"{start} NO: {error} |{' |' * 6}", flush=True)
                    continue
                failed |= not seen.folded or seen.difference > 0
                print(
                    f"{start} yes | {'yes' if seen.folded else 'NO'} | {seen.difference:g} "
                    f"| {seen.dense_ms:.1f} ms | {seen.packed_ms:.1f} ms "
                    f"| {_whole(seen.dense_peak)} | {_whole(seen.packed_peak)} |",
                    flush=True,
                )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
