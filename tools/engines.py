"""Which engines besides onnxruntime open packed files, in which form, and give the same outputs.

    python tools/engines.py FILE.onnx... [--engines openvino,opencv] [-o FOLDER]

FILE is dense or packed. Each engine gets it in five forms: `dense`; `packed`; `portable`, as of
`pack --portable`; `fast`, the same with `--load fast`; `sparse`, as of `--format
sparse-initializer`. Each engine is installed in its own virtual environment, and opens each file in
a process of its own, with one thread where it can be told so. Outputs on the same random input are
compared with the engine's own of the dense form. "load": median CPU time of three processes, and
peak memory; "folded" (OpenVINO alone tells): the compiled model has the operators of the dense
form's. Prints a Markdown table. Needs a package index.
"""

from __future__ import annotations

import json
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx
from runtimes import run

from prune2onnx import pack, unpack
from prune2onnx.graph.file import load
from prune2onnx.packing.sparse import to_sparse
from prune2onnx.runtime.inputs import random_inputs

ROUNDS = 3

FRAME = """
import json, sys, time
import numpy as np
path, given, made = sys.argv[1:4]
inputs = dict(np.load(given))
operators = None
{imports}
start = time.process_time()
{load}
spent = 1e3 * (time.process_time() - start)
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
{run}
np.savez(made, *[np.asarray(output) for output in outputs])
times = []
for _ in range(9):
    start = time.process_time()
    {again}
    times.append(1e3 * (time.process_time() - start))
print(json.dumps([spent, peak, float(np.median(times)), operators]))
"""


@dataclass(frozen=True)
class Engine:
    """How an engine is installed, and opens and runs a file.

    Attributes:
        packages: from PyPI.
        imports: statements before the clock runs.
        load: statements that open `path`.
        run: statements that compute `outputs` from `inputs`; the first line is timed.
    """

    packages: tuple[str, ...]
    imports: str
    load: str
    run: str

    @property
    def script(self) -> str:
        """The program of a process."""
        again = self.run.splitlines()[0]
        return FRAME.format(imports=self.imports, load=self.load, run=self.run, again=again)


ENGINES: Mapping[str, Engine] = {
    "onnxruntime": Engine(
        ("onnxruntime",),
        "import onnxruntime as ort\noptions = ort.SessionOptions()\n"
        "options.intra_op_num_threads = 1\noptions.log_severity_level = 4",
        "model = ort.InferenceSession(path, options, providers=['CPUExecutionProvider'])",
        "outputs = model.run(None, inputs)",
    ),
    "openvino": Engine(
        ("openvino",),
        "import openvino\ncore = openvino.Core()\ncore.available_devices",
        "model = core.compile_model(path, 'CPU', {'INFERENCE_NUM_THREADS': 1, "
        "'INFERENCE_PRECISION_HINT': 'f32'})",
        "outputs = list(model(inputs).values())\n"
        "operators = sorted(node.get_rt_info()['layerType'].astype(str) "
        "for node in model.get_runtime_model().get_ops())\n"
        "operators = [name for name in operators if name != 'Const']",
    ),
    "onnxruntime-openvino": Engine(
        ("onnxruntime-openvino",),
        "import onnxruntime as ort\noptions = ort.SessionOptions()\n"
        "options.intra_op_num_threads = 1\noptions.log_severity_level = 4",
        "model = ort.InferenceSession(path, options, providers=['OpenVINOExecutionProvider'])\n"
        "assert model.get_providers()[0] == 'OpenVINOExecutionProvider', model.get_providers()",
        "outputs = model.run(None, inputs)",
    ),
    "onnx reference": Engine(
        ("onnx",),
        "from onnx.reference import ReferenceEvaluator",
        "model = ReferenceEvaluator(path)",
        "outputs = model.run(None, inputs)",
    ),
    "opencv": Engine(
        ("opencv-python-headless",),
        "import cv2\ncv2.setNumThreads(1)",
        "model = cv2.dnn.readNetFromONNX(path)",
        "outputs = [model.setInput(value, name) for name, value in inputs.items()] "
        "and model.forward(model.getUnconnectedOutLayersNames())",
    ),
    "onnx2torch": Engine(
        ("onnx2torch", "torch", "setuptools"),
        "import torch\nfrom onnx2torch import convert\ntorch.set_num_threads(1)",
        "model = convert(path).eval()",
        "outputs = model(*[torch.from_numpy(value) for value in inputs.values()])\n"
        "outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]\n"
        "outputs = [output.detach() for output in outputs]",
    ),
    "tinygrad": Engine(
        ("tinygrad",),
        "from tinygrad import Tensor\nfrom tinygrad.nn.onnx import OnnxRunner",
        "model = OnnxRunner(path)",
        "outputs = [value.numpy() for value in "
        "model({name: Tensor(value) for name, value in inputs.items()}).values()]",
    ),
    "tract": Engine(
        ("tract",),
        "import tract",
        "model = tract.onnx().load(path)\n"
        "for at, value in enumerate(inputs.values()):\n"
        "    shape = ','.join(map(str, value.shape))\n"
        "    kind = {'f': 'f', 'i': 'i', 'u': 'u'}[value.dtype.kind] + str(8 * value.itemsize)\n"
        "    model.set_input_fact(at, f'{shape},{kind}')\n"
        "model = model.into_model().into_runnable()",
        "outputs = [value.to_numpy() for value in model.run(list(inputs.values()))]",
    ),
}


def forms_of(file: Path, folder: Path) -> list[str]:
    """Writes a file in every form, with inputs; the names of the forms."""
    dense = unpack(load(file))
    np.savez(folder / "inputs.npz", **random_inputs(dense)[0])
    made = {
        "dense": dense,
        "packed": pack(dense).model,
        "portable": pack(dense, portable=True).model,
        "fast": pack(dense, portable=True, load="fast").model,
        "sparse": to_sparse(dense)[0],
    }
    for name, model in made.items():
        onnx.save(model, folder / f"{name}.onnx")
    return list(made)


def installed(name: str, engine: Engine, home: Path) -> tuple[Path, str]:
    """The engine's Python, and its version."""
    folder = home / name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "numpy", *engine.packages)
    listed = json.loads(run(*pip, "list", "--format", "json").splitlines()[-1])
    versions = {one["name"].lower(): one["version"] for one in listed}
    return python, versions[engine.packages[0].lower()]


def opened(python: Path, engine: Engine, folder: Path, form: str) -> list[Any]:
    """What one process measured."""
    made = folder / f"{form}.npz"
    arguments = (folder / f"{form}.onnx", folder / "inputs.npz", made)
    seen = run(python, "-c", engine.script, *arguments).strip().splitlines()[-1]
    return list(json.loads(seen))


def difference(folder: Path, form: str) -> float:
    """The largest difference of an output from the dense form's; 0 if all bits are equal."""
    files = [np.load(folder / f"{name}.npz") for name in (form, "dense")]
    worst = 0.0
    for one, other in zip(*(file.values() for file in files), strict=True):
        if one.tobytes() != other.tobytes():
            worst = max(worst, float(np.abs(one.astype(np.float64) - other).max(initial=0)))
    return worst


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--engines", default=",".join(ENGINES), help="names, comma-separated")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/engines"))
def main(files: tuple[Path, ...], engines: str, output: Path) -> None:
    """Try FILES in each engine and print the table."""
    home = output.resolve()
    headings = ("engine", "file", "form", "bytes", "opens", "difference", "load", "run, CPU ms")
    print(f"| {' | '.join(headings)} |")
    print(f"|{' --- |' * len(headings)}")
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(index) for index in range(len(files))]
        for folder in folders:
            folder.mkdir()
        forms = [forms_of(file, folder) for file, folder in zip(files, folders, strict=True)]
        for title in engines.split(","):
            engine = ENGINES[title]
            try:
                python, version = installed(title, engine, home)
            except (RuntimeError, OSError) as error:
                print(f"| {title} | | | | not installed: {error} | | | |", flush=True)
                continue
            for file, folder, listed in zip(files, folders, forms, strict=True):
                plain: Any = None
                for form in listed:
                    size = (folder / f"{form}.onnx").stat().st_size
                    start = f"| {title} {version} | {file.name} | {form} | {size:,} |"
                    try:
                        seen = [opened(python, engine, folder, form) for _ in range(ROUNDS)]
                    except (RuntimeError, OSError) as error:
                        print(f"{start} NO: {str(error)[:160]} | | | |", flush=True)
                        continue
                    spent, peak, latency = (
                        median(column) for column in list(zip(*seen, strict=True))[:3]
                    )
                    plain = seen[0][3] if form == "dense" else plain
                    folded = "" if seen[0][3] == plain else ", NOT folded"
                    print(
                        f"{start} yes{folded} | {difference(folder, form):g} "
                        f"| {spent:.0f} ms, {peak:.0f} MB | {latency:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
