"""The effect of other tools on a packed file: kept, inlined, or inflated to dense weights.

    python tools/treatment.py FILE.onnx [-o runs/treatment]

Every tool is run, in a virtual environment of its own, on the packed file and on the unpacked one,
and the two results are compared. First table: whether the result runs, and how far its outputs are
from those of the treated dense file (random input); bytes of the packed and of the dense file after
the treatment; decode calls that are left, and nodes that the packed file has in addition; and a
verdict:

- kept: every decode call is there;
- inflated: no calls are left, nor nodes of their functions, and the weights are dense;
- inlined: calls are replaced by their functions' nodes; the percentage is that of the bytes saved
  by packing that are lost again.

Second table: which marks of a packed file are left, by which a reader could see that the file was
packed once; some are added to the file for this purpose. The last column is the result of
`inspection.inflated`, which uses these marks. Needs a package index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import ModelProto

from prune2onnx import Prune2OnnxError, unpack
from prune2onnx.graph.domain import DOMAIN
from prune2onnx.packing.inspection import constant_nodes, inflated
from prune2onnx.runtime.inputs import random_inputs
from prune2onnx.runtime.session import session

PACKAGES = (
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "onnxscript==0.7.2",
    "onnxslim==0.1.98",
    "onnxsim==0.8.1",
    "onnxconverter-common==1.16.0",
    "sympy",
)

_OPTIMISER = """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_{level}
    options.optimized_model_filepath = after
    onnxruntime.InferenceSession(before, options, providers=["CPUExecutionProvider"])
"""

# `before` and `after` are paths, `example` a dict of arrays.
TOOLS = {
    "onnxslim": """
        import onnxslim
        onnxslim.slim(before, after)
        """,
    "onnxsim": """
        import onnxsim
        model, sound = onnxsim.simplify(before)
        onnx.save(model, after)
        """,
    "onnxruntime optimiser, BASIC": _OPTIMISER.format(level="BASIC"),
    "onnxruntime optimiser, EXTENDED": _OPTIMISER.format(level="EXTENDED"),
    "onnxruntime optimiser, ALL": _OPTIMISER.format(level="ALL"),
    "onnxruntime quant_pre_process": """
        from onnxruntime.quantization.shape_inference import quant_pre_process
        quant_pre_process(before, after)
        """,
    "onnxruntime quantize_dynamic": """
        from onnxruntime.quantization import quantize_dynamic
        quantize_dynamic(before, after)
        """,
    "onnxruntime quantize_static, QDQ": """
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
        class Reader(CalibrationDataReader):
            left = [example]
            def get_next(self):
                return self.left.pop() if self.left else None
        quantize_static(before, after, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        """,
    "onnxconverter-common float16": """
        from onnxconverter_common.float16 import convert_float_to_float16
        onnx.save(convert_float_to_float16(onnx.load(before), keep_io_types=True), after)
        """,
    "onnxruntime.transformers float16": """
        from onnxruntime.transformers.float16 import convert_float_to_float16
        onnx.save(convert_float_to_float16(onnx.load(before), keep_io_types=True), after)
        """,
    "onnx.version_converter, 21": """
        from onnx import version_converter
        onnx.save(version_converter.convert_version(onnx.load(before), 21), after)
        """,
    "onnx.shape_inference": """
        onnx.save(onnx.shape_inference.infer_shapes(onnx.load(before)), after)
        """,
    "onnx.compose.add_prefix": """
        from onnx import compose
        onnx.save(compose.add_prefix(onnx.load(before), "a_"), after)
        """,
    "onnx.compose.merge_models": """
        from onnx import compose, helper
        first = onnx.load(before)
        starts, ends = ([onnx.ValueInfoProto(name=f"{name}{i}", type=value.type)
                         for i, value in enumerate(first.graph.output)]
                        for name in ("start", "end"))
        nodes = [helper.make_node("Identity", [a.name], [b.name]) for a, b in zip(starts, ends)]
        opset = [o for o in first.opset_import if not o.domain]
        second = helper.make_model(helper.make_graph(nodes, "second", starts, ends),
                                   opset_imports=opset, ir_version=first.ir_version)
        pairs = [(v.name, s.name) for v, s in zip(first.graph.output, starts)]
        onnx.save(compose.merge_models(first, second, io_map=pairs), after)
        """,
    "onnx.inliner": """
        from onnx import inliner
        onnx.save(inliner.inline_local_functions(onnx.load(before)), after)
        """,
    "onnxscript optimizer": """
        from onnxscript import optimizer
        onnx.save(optimizer.optimize(onnx.load(before)), after)
        """,
    "onnx.save, external data": """
        onnx.save(onnx.load(before), after, save_as_external_data=True, size_threshold=0,
                  location="beside.bin")
        """,
}

CHILD = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
import onnx
before, after, inputs = sys.argv[1:4]
example = dict(np.load(inputs))
"""

KEY = "prune2onnx.trial"

# A mark: how it is put into a packed file, and whether a file bears it.
MARKS: dict[str, tuple[Callable[[ModelProto], Any] | None, Callable[[ModelProto], bool]]] = {
    "operator set": (None, lambda m: any(o.domain == DOMAIN for o in m.opset_import)),
    "functions": (None, lambda m: any(f.domain == DOMAIN for f in m.functions)),
    "model metadata": (
        lambda m: m.metadata_props.add(key=KEY, value="1"),
        lambda m: any(p.key == KEY for p in m.metadata_props),
    ),
    "model doc_string": (
        lambda m: setattr(m, "doc_string", KEY),
        lambda m: m.doc_string == KEY,
    ),
    "producer_name": (
        lambda m: setattr(m, "producer_name", KEY),
        lambda m: m.producer_name == KEY,
    ),
    "graph metadata": (
        lambda m: m.graph.metadata_props.add(key=KEY, value="1"),
        lambda m: any(p.key == KEY for p in m.graph.metadata_props),
    ),
    "graph doc_string": (
        lambda m: setattr(m.graph, "doc_string", KEY),
        lambda m: m.graph.doc_string == KEY,
    ),
    "graph name": (
        lambda m: setattr(m.graph, "name", KEY),
        lambda m: KEY in m.graph.name,
    ),
}


def interpreter(home: Path) -> Path:
    """A Python with the tools, without prune2onnx."""
    python = home / "tools" / "bin" / "python"
    if not python.exists():
        venv.create(home / "tools", with_pip=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def treated(python: Path, code: str, before: Path, inputs: Path) -> ModelProto | str:
    """The model that a tool writes for a file, or the last line of its error."""
    after = before.with_suffix(".after.onnx")
    after.unlink(missing_ok=True)
    done = subprocess.run(
        [str(python), "-c", CHILD + textwrap.dedent(code), str(before), str(after), str(inputs)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not after.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return (lines or ["it wrote nothing"])[-1].replace("|", "/")[:200]
    return onnx.load(after)


def calls(model: ModelProto) -> int:
    """Decode calls in the graph."""
    return sum(node.domain == DOMAIN for node in model.graph.node)


def stored_nbytes(model: ModelProto) -> int:
    """Bytes of all initializers and constants of the graph."""
    tensors = list(model.graph.initializer)
    tensors += [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    return sum(tensor.ByteSize() for tensor in tensors)


def verdict(packed: ModelProto, after: ModelProto, dense_after: ModelProto) -> str:
    """The verdict of the first table."""
    if calls(after) == calls(packed):
        return "kept"
    if not constant_nodes(after):
        return "inflated"
    before = stored_nbytes(packed)
    fraction = (stored_nbytes(after) - before) / (stored_nbytes(dense_after) - before)
    return f"inlined, {100 * fraction:.0f} % inflated"


def outputs(model: ModelProto, inputs: dict[str, Any]) -> list[Any]:
    """The outputs of one inference; inputs are given by position, since they may be renamed."""
    opened = session(model)
    names = [value.name for value in opened.get_inputs()]
    return list(opened.run(None, dict(zip(names, inputs.values(), strict=True))))


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/treatment"))
def main(file: Path, output: Path) -> None:
    """Treat FILE with every tool and print both tables."""
    packed = onnx.load(file)
    dense = unpack(packed)
    if not calls(packed):
        sys.exit(f"{file}: not a packed file")
    python = interpreter(output.resolve())
    inputs = random_inputs(dense)[0]
    for put, _ in MARKS.values():
        if put is not None:
            put(packed)
    rows, marks = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "inputs.npz", **inputs)
        for title, model in (("packed", packed), ("dense", dense)):
            onnx.save(model, folder / f"{title}.onnx")
        for tool, code in TOOLS.items():
            one, other = (
                treated(python, code, folder / f"{title}.onnx", folder / "inputs.npz")
                for title in ("packed", "dense")
            )
            if isinstance(one, str):
                both = "; the dense file too" if isinstance(other, str) else ""
                rows.append([tool, f"fails: {one}{both}", "", "", "", "", "", ""])
                continue
            marks.append(
                [tool, *("yes" if has(one) else "" for _, has in MARKS.values()), inflated(one)]
            )
            try:
                got = outputs(one, inputs)
                runs = "yes"
            except Prune2OnnxError as error:
                got, runs = [], f"no: {error}".replace("|", "/")
            difference = ""
            reference = dense if isinstance(other, str) else other
            if got:
                pairs = zip(got, outputs(reference, inputs), strict=True)
                difference = f"{max(float(np.abs(a - b).max(initial=0)) for a, b in pairs):.2g}"
            rows.append(
                [
                    tool,
                    runs,
                    difference,
                    f"{one.ByteSize():,}",
                    f"{reference.ByteSize():,}",
                    f"{calls(one)} of {calls(packed)}",
                    f"{len(one.graph.node) - len(reference.graph.node):+d}",
                    verdict(packed, one, reference),
                ]
            )
    print(f"{file.name}: {packed.ByteSize():,} bytes packed, {dense.ByteSize():,} dense\n")
    headings = ["tool", "result runs", "difference", "packed, after", "dense, after"]
    _table([*headings, "decode calls", "more nodes", "verdict"], rows)
    print()
    _table(["tool", *MARKS, "inflated"], marks)


def _table(headings: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(headings)} |")
    print(f"|{' --- |' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
