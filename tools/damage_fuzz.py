"""Damages ONNX files, and gives them to `unpack`, `inspect`, `validate`, `pack` and `shrink`.

    python tools/damage_fuzz.py --files 2000

The files and their damages are those of tests/support/damage.py, by number. Each verb runs through
the command line's own entry, in a worker process with limits of time and memory that is replaced
when it dies. Prints, for each verb, how many files were tried, accepted, refused as they should be
(one line, exit status 1), and what went wrong:

- crashed: a signal, or any exception that is not the project's;
- hung: more than 20 s of CPU time, or 90 s of any;
- memory: more than the limit allows (`unpack` and `inspect` are given 16 MiB);
- badly refused: another exit status than 1 (4 is `validate`'s verdict), or more than one line;
- WRONG: accepted, though a coded weight is not the undamaged file's, which its checksum should
  have shown; `pack` or `shrink` wrote what computes something else than the damaged file does;
  `validate` called equal what is not.

`validate` loads files in its own process here, once, and times 5 inferences; a graph that runs for
more than 3 s on random inputs counts as one that cannot be run (it is 120 s otherwise). Exit status
4 if anything went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import click
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from damage import MODEL, Original, damaged, models_of, originals
from onnx import ModelProto

from prune2onnx.cli.main import main as prune2onnx
from prune2onnx.errors import MismatchError, Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.file import InvalidModelError, load
from prune2onnx.graph.tensors import fingerprint
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.session import load_runnable

VERBS = ("unpack", "inspect", "validate", "pack", "shrink")
MAX_BYTES = 1 << 24  # of `unpack` and `inspect`
MOST_GROWTH = {"unpack": 8 * MAX_BYTES + (1 << 26), "inspect": 8 * MAX_BYTES + (1 << 26)}
ADDRESS_SPACE = 12 << 30
CPU_SECONDS, WALL_SECONDS = 20, 90
BAD = ("crashed", "hung", "memory", "badly refused", "WRONG")
OUT = "out.onnx"


# -- in a worker -------------------------------------------------------------------------------


def work() -> None:
    """Runs the verbs that are asked for on stdin, one JSON object a line, and answers in JSON."""
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    from prune2onnx.runtime import inputs, latency

    inputs._MOST_SECONDS = 3.0
    latency._LOADS, latency._MOST_SECONDS = 1, 0.0
    latency.load_in_fresh_process = lambda path: latency.Opened(1.0, 1.0, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        limit = int(used) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        end, text = outcome(asked["verb"], Path(asked["folder"]), asked["more"])
        print(json.dumps([end, text]), file=answers, flush=True)


def outcome(verb: str, folder: Path, more: list[str]) -> tuple[str, str]:
    """What became of a verb, and the reason."""
    source, target = folder / MODEL, folder / OUT
    given = [verb, str(source), *([str(target)] if verb in ("unpack", "pack", "shrink") else [])]
    if verb in ("unpack", "inspect"):
        given += ["--max-bytes", str(MAX_BYTES)]
    given += ["--json"] if verb != "unpack" else []
    before = _reset_peak()
    result = CliRunner().invoke(prune2onnx, [*given, *more])
    growth = _status("VmHWM") - before
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        return "crashed", "".join(traceback.format_exception(error))
    if growth > MOST_GROWTH.get(verb, ADDRESS_SPACE):
        return "memory", f"{growth:,} bytes"
    if result.exit_code:
        lines = result.stderr.splitlines()
        verdict = verb == "validate" and "report a bug" not in result.stderr
        statuses = (1, 4) if verdict else (1,)
        one_line = len(lines) == 1 and lines[0].startswith("prune2onnx: ")
        if result.exit_code not in statuses or not one_line:
            return "badly refused", f"exit status {result.exit_code}: {result.stderr}"
        if lines[0].startswith("prune2onnx: out of memory: the system gives no more"):
            return "memory", lines[0]
        if "bad_alloc" in lines[0] or "Failed to allocate" in lines[0]:
            return "refused", "onnxruntime: out of memory"
        return "refused", lines[0]
    try:
        return _judged(verb, folder, result.stdout)
    except Prune2OnnxError as error:
        return "WRONG", f"accepted, but what it wrote is refused: {error}"
    except Exception:
        return "crashed", "while judging: " + traceback.format_exc()


def _judged(verb: str, folder: Path, printed: str) -> tuple[str, str]:
    """Whether what was accepted is right."""
    wanted = json.loads((folder.parent / "weights.json").read_text()).get(folder.name.split("-")[0])
    if verb == "inspect":
        rows = {row["name"]: [row["shape"], row["nnz"]] for row in json.loads(printed)["weights"]}
        return _equal({n: rows[n] for n in rows.keys() & wanted["rows"]}, wanted["rows"])
    if verb == "unpack":
        stored = _unpacked(folder).graph.initializer
        found = {tensor.name: fingerprint(tensor).hex() for tensor in stored}
        return _equal({n: found[n] for n in found.keys() & wanted["bits"]}, wanted["bits"])
    with _unlimited_limit(folder):
        if verb == "validate":
            made = unpack(load_runnable(folder / MODEL))
        else:
            made = load_runnable(folder / OUT)
        return _same_outputs(folder / MODEL, made)


def _unpacked(folder: Path) -> ModelProto:
    """What `unpack` wrote; onnx's checker may refuse it only if it refuses the damaged file."""
    try:
        return load(folder / OUT)
    except InvalidModelError as error:
        try:
            load(folder / MODEL)
        except InvalidModelError:
            return error.model
        raise


@contextlib.contextmanager
def _unlimited_limit(folder: Path) -> Iterator[None]:
    """Time for what is done here is not counted against the verb."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    yield


def _equal(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, str]:
    for name, value in found.items():
        if value != wanted[name]:
            return "WRONG", f"{name}: {value}, expected {wanted[name]}"
    return ("accepted, weights compared" if found else "accepted"), ""


def _same_outputs(path: Path, made: ModelProto) -> tuple[str, str]:
    """Compares a damaged file with what was made of it, as onnxruntime runs them unoptimised."""
    import onnxruntime as ort

    from prune2onnx.runtime.compare import check_outputs, coarsest
    from prune2onnx.runtime.inputs import random_inputs, random_operators, says_something
    from prune2onnx.runtime.session import run, session

    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = unpack(load_runnable(path))
    try:
        opened = session(path, level=level)
        if random_operators(given):
            return "accepted", "random"
        inputs = random_inputs(given, (1, 2), opened=opened)
        wanted = [out for each in inputs for out in run(opened, each)]
    except Prune2OnnxError:
        return "accepted", "does not run"
    if not says_something(wanted):
        return "accepted", "NaN"
    try:
        other = session(made, level=level)
        got = [out for each in inputs for out in run(other, each)]
        for one, want in zip(got, wanted, strict=True):
            check_outputs("m", one, want, coarsest(given))
    except MismatchError as error:
        again = [out for each in inputs for out in run(opened, each)]
        fresh = session(path, level=level)
        again += [out for each in inputs for out in run(fresh, each)]
        try:  # onnxruntime may read memory that nothing has written
            for one, want in zip(again, [*wanted, *wanted], strict=True):
                check_outputs("m", one, want, coarsest(given))
        except MismatchError:
            return "accepted", "differs from itself"
        return "WRONG", str(error)
    except Exception as error:
        return "WRONG", f"does not run: {error}"
    return "accepted, outputs compared", ""


def _reset_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# -- around it ---------------------------------------------------------------------------------


class Worker:
    """A process that runs verbs, and is replaced when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, verb: str, folder: Path, more: list[str]) -> tuple[str, str]:
        """What became of a verb, and the reason."""
        if self._process is None:
            command = [sys.executable, __file__, "--worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        asked = {"verb": verb, "folder": str(folder), "more": more}
        with contextlib.suppress(BrokenPipeError):  # it has died; its end is read below
            print(json.dumps(asked), file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], WALL_SECONDS)
        line = process.stdout.readline() if ready else ""
        if line:
            end, text = json.loads(line)
            return end, text
        if not ready:
            process.kill()
        self.close()
        if not ready or process.returncode == -signal.SIGXCPU:
            return "hung", f"more than {CPU_SECONDS} s"
        if process.returncode < 0:
            return "crashed", signal.Signals(-process.returncode).name
        return "crashed", f"exit status {process.returncode}"

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


def expected(given: Original, folder: Path) -> dict[str, Any]:
    """The coded weights of an undamaged file that its checksum protects: their bits, their rows."""
    from prune2onnx.packing.inspection import inspect

    for name, content in given.files.items():
        (folder / name).write_bytes(content)
    model = load_runnable(folder / MODEL)
    calls = [n for n in model.graph.node if n.domain == DOMAIN and n.op_type == "w"]
    names = {name for node in calls for name in node.output}
    bits = {t.name: fingerprint(t).hex() for t in unpack(model).graph.initializer}
    rows = {row.name: [list(row.shape), row.nnz] for row in inspect(model).rows} if names else {}
    return {"bits": {n: bits[n] for n in names}, "rows": {n: rows[n] for n in names}}


class Tally:
    """Counts ends, and keeps files of those that are bad."""

    def __init__(self, findings: Path) -> None:
        self.ends: dict[str, Counter[str]] = {verb: Counter() for verb in VERBS}
        self.kinds: Counter[str] = Counter()
        self.slowest = (0.0, "", 0)
        self._findings = findings
        self._lock = threading.Lock()

    def add(
        self, verb: str, number: int, end: str, text: str, seconds: float, files: dict[str, bytes]
    ) -> None:
        """One run."""
        with self._lock:
            self.ends[verb][end] += 1
            self.slowest = max(self.slowest, (seconds, verb, number))
            if end not in BAD:
                return
            kind = f"{verb}: {end}: {text.strip().splitlines()[-1][:150] if text.strip() else ''}"
            self.kinds[kind] += 1
            if self.kinds[kind] > 2:
                return
            folder = self._findings / f"{number}-{verb}-{end.replace(' ', '-')}"
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            (folder / "why.txt").write_text(text)
            print(f"{kind}\n  {folder}", flush=True)

    def table(self) -> str:
        """The counts, in Markdown."""
        names = sorted({end for ends in self.ends.values() for end in ends} | set(BAD))
        names = [name for name in names if name not in BAD] + list(BAD)
        lines = [f"| verb | tried | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
        for verb, ends in self.ends.items():
            counts = [f"{ends[name]:,}" for name in names]
            lines.append(f"| {verb} | {ends.total():,} | {' | '.join(counts)} |")
        return "\n".join(lines)

    @property
    def bad(self) -> int:
        """How many runs went wrong."""
        return sum(ends[name] for ends in self.ends.values() for name in BAD)


def fuzz(
    count: int, first: int, jobs: int, findings: Path, given: list[Original], verbs: tuple[str, ...]
) -> Tally:
    """Damages files and runs the verbs on them.

    Args:
        count: how many damaged files.
        first: the number, and so the seed, of the first one.
        jobs: worker processes.
        findings: an existing folder for files that make a verb go wrong.
        given: the undamaged files.
        verbs: those to run.
    """
    tally = Tally(findings)
    lent = models_of(given)
    local = threading.local()
    workers: list[Worker] = []

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = {str(n): expected(each, folder) for n, each in enumerate(given)}
        (folder / "weights.json").write_text(json.dumps(weights))

        def one(number: int) -> None:
            if not hasattr(local, "worker"):
                local.worker = Worker()
                workers.append(local.worker)
            random = Random(number)
            index = random.randrange(len(given))
            _, files = damaged(given[index], random, lent)
            more = {"shrink": ["--multiple", "1"]}
            more["pack"] = random.choice(([], [], ["--strip"], ["--shrink"], ["--load", "fast"]))
            with tempfile.TemporaryDirectory(prefix=f"{index}-", dir=folder) as place:
                for verb in verbs:
                    for name, content in files.items():
                        (Path(place) / name).write_bytes(content)
                    began = time.perf_counter()
                    end, text = local.worker.run(verb, Path(place), more.get(verb, []))
                    tally.add(verb, number, end, text, time.perf_counter() - began, files)
                    (Path(place) / OUT).unlink(missing_ok=True)

        with ThreadPoolExecutor(jobs) as pool:
            for done, _ in enumerate(pool.map(one, range(first, first + count)), 1):
                if done % 500 == 0:
                    print(f"{done:,} files", flush=True)
        for worker in workers:
            worker.close()
    return tally


@click.command()
@click.option("--files", default=2000, show_default=True, help="damaged files")
@click.option("--first", default=0, show_default=True, help="the number of the first one")
@click.option("--jobs", default=2, show_default=True, help="worker processes")
@click.option("--verb", "verbs", multiple=True, type=click.Choice(VERBS), default=VERBS)
@click.option("--findings", type=click.Path(path_type=Path), default=Path("runs/damage"))
@click.option("--worker", is_flag=True, hidden=True)
def main(
    files: int, first: int, jobs: int, verbs: tuple[str, ...], findings: Path, worker: bool
) -> None:
    """Damage so many files."""
    if worker:
        work()
        return
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    findings.mkdir(parents=True, exist_ok=True)
    given = list(originals())
    print(f"{len(given)} undamaged files", flush=True)
    tally = fuzz(files, first, jobs, findings, given, verbs)
    print(tally.table())
    for kind, number in tally.kinds.most_common():
        print(f"{number:5} {kind}")
    print("slowest: {:.1f} s, {} of file {}".format(*tally.slowest))
    sys.exit(4 if tally.bad else 0)


if __name__ == "__main__":
    main()
