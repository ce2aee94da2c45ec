"""Packs and unpacks every model that comes with the onnx package, and runs it before and after.

    python tools/backend_models.py

The models of onnx's backend tests: those on disk (light, simple, pytorch-*) and those of the node
tests, which the package makes in memory. Each is packed without loss, for small files and for fast
loads. It must unpack to the normalized model, byte for byte, and give the outputs of the original
model, bit for bit, on random inputs. If onnxruntime cannot run the original (operators of opset 6),
the outputs must be those of the test data.
"""

from __future__ import annotations

import collections
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from prune2onnx import Prune2OnnxError, pack, unpack
from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.file import load
from prune2onnx.graph.normalize import normalize
from prune2onnx.runtime.compare import outputs_of
from prune2onnx.runtime.inputs import random_inputs

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


def models() -> Iterator[tuple[str, str, ModelProto, Path | None]]:
    """All models: (set, name, model, its file)."""
    for path in sorted(DATA.glob("*/**/*.onnx")):
        yield path.relative_to(DATA).parts[0], path.parent.name, load(path), path
    collect = importlib.import_module("onnx.backend.test.case.node").collect_testcases
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect(None):
            if case.model is not None:
                yield "node (in memory)", case.name, case.model, None


def examples(
    path: Path | None, names: list[str]
) -> Iterator[tuple[dict[str, Any], list[NDArray[Any]]]]:
    """Inputs and outputs that come with a model on disk: ({name: array}, arrays)."""
    for folder in sorted(path.parent.glob("test_data_set_*")) if path else ():
        given = [numpy_helper.to_array(t) for t in load_tensors(folder, "input")]
        if len(given) == len(names):
            wanted = [numpy_helper.to_array(t) for t in load_tensors(folder, "output")]
            yield dict(zip(names, given, strict=True)), wanted


def load_tensors(folder: Path, prefix: str) -> list[TensorProto]:
    """The tensors PREFIX_0.pb, PREFIX_1.pb, ... of a folder."""
    files = sorted(folder.glob(f"{prefix}_*.pb"), key=lambda file: int(file.stem.split("_")[1]))
    return [TensorProto.FromString(file.read_bytes()) for file in files]


def agrees(got: Any, expected: NDArray[Any]) -> bool:
    """Whether an output is the one a test expects, with the tests' tolerance."""
    got = np.asarray(got)
    if got.shape != expected.shape or got.dtype.kind not in "fiub":
        return got.shape == expected.shape and got.tolist() == expected.tolist()
    return bool(np.allclose(got, expected, rtol=1e-3, atol=1e-5, equal_nan=True))


def verdict(model: ModelProto, path: Path | None) -> str:
    """The result for one model, in words."""
    try:
        want = normalize(model).model
    except Prune2OnnxError as error:
        return f"refused: {str(error).split('; ')[0][:60]}"
    names = {t.name: numpy_helper.to_array(t).tobytes() for t in want.graph.initializer}
    packed = [pack(model, load=goal).model for goal in ("small", "fast")]
    for each in packed:
        again = unpack(each)
        got = {t.name: numpy_helper.to_array(t).tobytes() for t in again.graph.initializer}
        whole = [m.SerializeToString(deterministic=True) for m in (again, want)]
        if got != names or whole[0] != whole[1]:
            return "UNPACK DIFFERS"
    coded = any(node.domain == DOMAIN for each in packed for node in each.graph.node)
    form = "coded" if coded else "stays dense"
    try:
        inputs = random_inputs(model)
        wanted = outputs_of(model, inputs)
    except Exception:  # of many kinds: operators, types and inputs onnxruntime does not take
        if not (known := list(examples(path, [value.name for value in want.graph.input]))):
            return f"{form}; the original does not run"
        try:
            results = [outputs_of(each, [given]) for each in packed for given, _ in known]
        except Prune2OnnxError:
            return f"{form}; the original does not run"
        for got_, (_, expected) in zip(results, known * len(packed), strict=True):
            for one, other in zip(got_, expected, strict=True):
                if not agrees(one, other):
                    return "OUTPUTS DIFFER"
        return f"{form}; the original does not run; outputs as its test expects"
    for each in packed:
        for one, other in zip(outputs_of(each, inputs), wanted, strict=True):
            if np.asarray(one).tobytes() != np.asarray(other).tobytes():
                return "OUTPUTS DIFFER"
    return f"{form}; equal outputs"


@click.command()
def main() -> None:
    """Print a table of verdicts for each set, and the names of what failed."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failed = []
    for group, name, model, path in models():
        found = verdict(model, path)
        counts[group][found] += 1
        if found.isupper():
            failed.append(f"{group}: {name}: {found}")
    verdicts = sorted({found for counter in counts.values() for found in counter})
    print(f"| models | {' | '.join(verdicts)} |\n|{' --- |' * (len(verdicts) + 1)}")
    for group, counter in counts.items():
        print(f"| {group} | {' | '.join(str(counter[found]) for found in verdicts)} |")
    print("\n".join(failed))


if __name__ == "__main__":
    main()
