"""Presses Ctrl-C at random moments of pack, compress and sweep, and looks at what is left.

"calibrate" is `pack --bits 3 --data npz:FILE`.

    python tools/interrupts.py --moments 50

Each run is a fresh process in a session of its own, and each process of it gets the signal, as from
a terminal. Checked: it ends within 5 s with status 130, prints no traceback, and leaves no
temporary and no half file; then it is continued (or started again, where it had not begun), and its
files must be those of a run that was never interrupted, byte for byte. Prints a row per verb, and a
line for each moment at which something did not hold; then the exit status is 1.

A signal that arrives before our first line, or while Python takes itself down, ends the process in
the system's or in Python's own way; a shell says 130 then, too, in all but the few milliseconds in
which Python sets up its path. Such moments are counted in a column of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MOST_SECONDS = 5.0
BEFORE = b"what was there before"
NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
"""
SHORT = [f"--{phase}-epochs=1" for phase in ("dense", "prune", "tune", "quantize")]


@dataclass(frozen=True)
class Verb:
    """How to run a verb in a folder, continue it, and tell its results.

    Attributes:
        settings: the file that says that a run has begun; "" where there is nothing to continue.
        results: patterns of the files that must be the same after all.
        replaces: one of them that is there before.
    """

    start: Callable[[Path], list[str]]
    settings: str
    results: tuple[str, ...]
    replaces: str = ""

    def continued(self, folder: Path) -> list[str]:
        """The command after an interruption."""
        if self.settings and (folder / self.settings).exists():
            return [self.start(folder)[0], "--resume", str(folder), "--cpu"]
        return self.start(folder)

    def files(self, folder: Path) -> dict[str, bytes]:
        """The results that are there, by their paths in the folder."""
        found = (path for pattern in self.results for path in folder.glob(pattern))
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@dataclass
class Row:
    """What came of one verb; `usual` is what libraries leave in the folder of temporaries."""

    seconds: float
    usual: set[str]
    moments: int = 0
    by_system: int = 0
    begun: int = 0
    ends: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def network(path: Path, size: int) -> None:
    """Three layers of `size` to `size` on 200 levels, half of them zeros."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for layer in range(3):
        values = (rng.integers(-100, 101, (size, size)) / 512).astype(np.float32)
        values[rng.random(values.shape) < 0.5] = 0
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"y{layer}"]))
        name = f"y{layer}"
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size])] for n in ("x", name)]
    graph = helper.make_graph(nodes, "large", *ends, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def verbs(scratch: Path, size: int = 1600) -> dict[str, Verb]:
    """The verbs, on a network and a file made in `scratch`; 1600 takes some seconds to pack."""
    (scratch / "net.py").write_text(NET)
    net, large = f"{scratch / 'net.py'}:net", scratch / "large.onnx"
    network(large, size)
    small, examples = scratch / "small.onnx", scratch / "examples.npz"
    network(small, size // 4)
    made = np.random.default_rng(0).normal(size=(400, size // 4)).astype(np.float32)
    np.savez(examples, x=made)
    return {
        "pack": Verb(
            lambda folder: ["pack", str(large), str(folder / "out.onnx")],
            "",
            ("out.onnx",),
            "out.onnx",
        ),
        "calibrate": Verb(
            lambda folder: [
                *("pack", str(small), str(folder / "out.onnx"), "--bits", "3"),
                *("--data", f"npz:{examples}"),
            ],
            "",
            ("out.onnx",),
            "out.onnx",
        ),
        "compress": Verb(
            lambda folder: ["compress", net, "-o", str(folder), "--cpu", *SHORT],
            "recipe.yaml",
            ("model.onnx", "dense.onnx"),
        ),
        "sweep": Verb(
            lambda folder: [
                *("sweep", net, "-o", str(folder), "--cpu", *SHORT),
                *("--sizes", "2.5KB", "--seeds", "0"),
            ],
            "sweep.yaml",
            ("runs/*/model.onnx", "runs/*/dense.onnx"),
        ),
    }


def process(arguments: list[str], temporaries: Path) -> subprocess.Popen[str]:
    """Starts the command line as a terminal does: in a group of its own, Ctrl-C not ignored."""
    temporaries.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "prune2onnx", *arguments],
        # as many threads each time: sums that are split differently round differently
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporaries)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupted(
    verb: Verb, row: Row, whole: dict[str, bytes], moment: float, folder: Path
) -> list[str]:
    """What did not hold at one moment; adds to the row, unless the process ended by itself."""
    temporaries = folder.with_name(f"{folder.name}-tmp")
    if verb.replaces:
        folder.mkdir()
        (folder / verb.replaces).write_bytes(BEFORE)
    running = process(verb.start(folder), temporaries)
    time.sleep(moment)
    if running.poll() is not None:
        running.communicate()  # closes its pipe
        return []
    begun = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)
    faults = []
    try:
        said, _ = running.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        said, _ = running.communicate()
        faults.append("goes on for a minute")
    row.moments += 1
    row.ends.append(time.monotonic() - begun)
    if row.ends[-1] > MOST_SECONDS:
        faults.append(f"ends after {row.ends[-1]:.1f} s")
    traceback = "Traceback" in said or "Exception ignored" in said
    if traceback and "/prune2onnx/" not in said:  # no line of ours has run
        row.by_system += 1
    else:
        row.by_system += running.returncode == -signal.SIGINT
        if running.returncode not in (130, -signal.SIGINT):
            faults.append(f"status {running.returncode}: {said.strip()[-300:]}")
        if traceback:
            faults.append(f"a traceback: {said.strip()[-1500:]}")
    faults += half_files(verb, row, whole, folder, temporaries)
    if verb.settings and (folder / verb.settings).exists():
        row.begun += 1
    rest = process(verb.continued(folder), temporaries)
    said, _ = rest.communicate()
    if rest.returncode:
        faults.append(f"continued, status {rest.returncode}: {said.strip()[-600:]}")
    elif verb.files(folder) != whole:
        faults.append("continued, it gives other files")
    return faults


def half_files(
    verb: Verb, row: Row, whole: dict[str, bytes], folder: Path, temporaries: Path
) -> list[str]:
    """Temporaries, and results that are neither what was there before nor what shall be there."""
    left = [path for path in temporaries.iterdir() if path.name not in row.usual]
    kept = (path for end in ("partial", "calibration") for path in folder.rglob(f"*.{end}"))
    faults = [f"left {path}" for path in [*kept, *left]]
    for name, content in verb.files(folder).items():
        if content != whole[name] and not (name == verb.replaces and content == BEFORE):
            faults.append(f"{name} is not whole")
    return faults


def try_verb(verb: Verb, moments: int, rng: Random, scratch: Path, first: float = 1.0) -> Row:
    """Interrupts a verb at so many moments of its time, or of the first part of it."""
    began = time.monotonic()
    whole_run = process(verb.start(scratch / "whole"), scratch / "tmp")
    said, _ = whole_run.communicate()
    if whole_run.returncode:
        raise click.ClickException(f"uninterrupted, status {whole_run.returncode}: {said[-600:]}")
    row = Row(time.monotonic() - began, {path.name for path in (scratch / "tmp").iterdir()})
    whole = verb.files(scratch / "whole")
    while row.moments < moments:
        moment = rng.uniform(0, first * row.seconds)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for fault in interrupted(verb, row, whole, moment, Path(folder) / "run"):
                row.faults.append(f"at {moment:.2f} of {row.seconds:.1f} s: {fault}")
                print(row.faults[-1], flush=True)
    return row


@click.command()
@click.argument("names", nargs=-1, metavar="[pack] [calibrate] [compress] [sweep]")
@click.option("--moments", default=50, show_default=True, help="of each verb")
@click.option("--first", default=1.0, show_default=True, help="in this part of its time, 0-1")
@click.option("--seed", default=0, show_default=True, help="of the moments")
def main(names: tuple[str, ...], moments: int, first: float, seed: int) -> None:
    """Press Ctrl-C at random moments."""
    print("| verb | takes | moments | 130 | by system or Python | a run had begun | slowest end |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    bad = False
    with tempfile.TemporaryDirectory() as scratch:
        made = verbs(Path(scratch))
        for name in names or made:
            folder = Path(scratch) / name
            folder.mkdir()
            row = try_verb(made[name], moments, Random(seed), folder, first)
            bad |= bool(row.faults)
            cells = (
                name,
                f"{row.seconds:.1f} s",
                row.moments,
                row.moments - row.by_system - sum("status" in fault for fault in row.faults),
                row.by_system,
                row.begun if made[name].settings else "",
                f"{max(row.ends):.2f} s",
            )
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
