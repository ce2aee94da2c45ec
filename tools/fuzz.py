"""Fuzzes `load`, `unpack` and `inspect` with atheris, for hostile files.

    pip install atheris
    python tools/fuzz.py --seconds 3600 [--findings runs/fuzz]

Coverage of prune2onnx guides the search. Seeds are small packed files of every method, element type
and version; the mutator changes the parts of a file (streams, shapes, nodes, functions, notes) and
sometimes its bytes. A finding is any error but Prune2OnnxError, a message of more than one line,
more than 20 seconds, or more memory than `--max-bytes` allows; it is stored, and the search
continues. At the end, libFuzzer's totals and ours are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
with atheris.instrument_imports(include=["prune2onnx"]):
    from prune2onnx import Prune2OnnxError
    from prune2onnx.graph.file import load, save
    from prune2onnx.packing.inspection import inspect
    from prune2onnx.packing.sparse import from_sparse
    from prune2onnx.packing.unpack import unpack

from google.protobuf.message import DecodeError  # noqa: E402
from mutation import mutated, seeds  # noqa: E402
from onnx import ModelProto  # noqa: E402

MAX_BYTES = 1 << 24
MOST_SECONDS = 20.0
MOST_GROWTH = 8 * MAX_BYTES + (1 << 26)


class Target:
    """Runs one file, and stores findings."""

    def __init__(self, findings: Path, scratch: Path) -> None:
        self._findings = findings
        self._file = scratch / "input.onnx"
        self._out = scratch / "output.onnx"
        self.executions = 0
        self.ends = {"not protobuf": 0, "refused": 0, "opened": 0}
        self.found: dict[str, int] = {}
        self.slowest = 0.0

    def __call__(self, data: bytes) -> None:
        """Runs the commands, on the file and on the unchecked model."""
        self.executions += 1
        try:
            model = ModelProto.FromString(data)
        except DecodeError:
            self.ends["not protobuf"] += 1
            return
        before, start = _peak(), time.perf_counter()
        opened = 0
        for step in (self._unpack, self._inspect, self._whole):
            try:
                step(model, data)
                opened += 1
            except Prune2OnnxError as error:
                if "\n" in str(error) or len(str(error)) > 2000:
                    self._note(f"long error from {step.__name__}", data, str(error))
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)
                ours = [line for line in place if "prune2onnx" in line.filename] or place[-1:]
                where = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
                text = traceback.format_exc()
                self._note(f"{type(error).__name__} in {where}", data, text)
        self.ends["opened" if opened == 3 else "refused"] += 1
        taken = time.perf_counter() - start
        self.slowest = max(self.slowest, taken)
        if taken > MOST_SECONDS:
            self._note("slow", data, f"{taken:.1f} s")
        if _peak() - before > MOST_GROWTH:
            self._note("memory", data, f"{(_peak() - before) / 1e6:,.0f} MB")

    def _unpack(self, model: ModelProto, data: bytes) -> None:
        unpack(model, MAX_BYTES)

    def _inspect(self, model: ModelProto, data: bytes) -> None:
        inspect(model, MAX_BYTES)

    def _whole(self, model: ModelProto, data: bytes) -> None:
        self._file.write_bytes(data)
        unpacked = unpack(load(self._file, MAX_BYTES), MAX_BYTES)
        save(from_sparse(unpacked, MAX_BYTES), self._out)

    def _note(self, what: str, data: bytes, text: str) -> None:
        self.found[what] = self.found.get(what, 0) + 1
        if self.found[what] > 3:
            return
        name = hashlib.sha256(data).hexdigest()[:12]
        self._findings.mkdir(parents=True, exist_ok=True)
        (self._findings / f"{name}.onnx").write_bytes(data)
        (self._findings / f"{name}.txt").write_text(f"{what}\n{text}\n")
        print(f"FOUND {what}: {self._findings / name}.onnx", flush=True)

    def __str__(self) -> str:
        ends = ", ".join(f"{count:,} {end}" for end, count in self.ends.items())
        found = ", ".join(f"{count} {what}" for what, count in self.found.items()) or "none"
        return f"{self.executions:,} files: {ends}; slowest {self.slowest:.1f} s; findings: {found}"


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Reads the arguments and runs until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    originals = [model for _, model in seeds()]
    with tempfile.TemporaryDirectory() as folder:
        corpus = options.findings / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, model in enumerate(originals):
            (corpus / f"seed{number}").write_bytes(model.SerializeToString())
        target = Target(options.findings, Path(folder))

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            random = Random(seed)
            try:
                model = ModelProto.FromString(data)
            except DecodeError:
                return bytes(atheris.Mutate(data, most))
            if random.random() < 0.15:
                return bytes(atheris.Mutate(data, most))
            result = mutated(model, random, originals).SerializeToString()
            return result if len(result) <= most else data

        end = time.monotonic() + options.seconds
        shown = 0.0

        def one_input(data: bytes) -> None:
            nonlocal shown
            target(data)
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"{options.seconds - (end - shown):.0f} s: {target}", flush=True)

        arguments = [sys.argv[0], str(corpus), f"-max_total_time={options.seconds}"]
        arguments += ["-max_len=65536", "-len_control=0", "-timeout=120", "-rss_limit_mb=6000"]
        arguments += ["-print_final_stats=1", f"-seed={options.seed}"]
        atheris.Setup(arguments, one_input, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
