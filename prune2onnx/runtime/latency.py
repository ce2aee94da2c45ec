"""Load time, CPU time and peak memory of a load, and latency of files, measured interleaved.

All measurements of the project are made here, in one way: each load in a fresh process, inferences
of the files in random order. `validate` and `benchmark` interpret the figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.file import file_nbytes
from prune2onnx.runs.defaults import BenchmarkOptions
from prune2onnx.runs.report import Measured
from prune2onnx.runtime.session import call, run_once

_LOADS = 7  # fresh processes per file

_LOADS_SECONDS = 10.0  # after these, no further round of them: a graph of 50,000 nodes takes 7 each

_FEWEST = 5  # timed inferences per file, however long they take

_RUNS = 300  # most inferences per file in `latencies`

_MOST_SECONDS = 8.0  # of `latencies`, unless `_FEWEST` inferences take longer


# Runs in a fresh interpreter and imports nothing of the project, so that neither torch's memory nor
# its start-up time is counted. VmHWM, not ru_maxrss: the latter is inherited across exec. One
# thread: onnxruntime creates a session on one, and idle ones would spin and count as CPU time.
_PROBE = """
import json, sys, time
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = options.inter_op_num_threads = 1
start, spent = time.perf_counter(), time.process_time()
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
load_ms = 1e3 * (time.perf_counter() - start)
cpu_ms = 1e3 * (time.process_time() - spent)
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
except (OSError, StopIteration):
    if sys.platform == "darwin":
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        import psutil
        peak = psutil.Process().memory_info().peak_wset
print(json.dumps([load_ms, cpu_ms, peak]))
"""


class Opened(NamedTuple):
    """What it takes to open a file in a fresh process, with one thread.

    Attributes:
        load_ms: time to create the session.
        cpu_ms: the CPU time of that.
        peak_rss_bytes: peak memory of the process, the runtime itself included.
    """

    load_ms: float
    cpu_ms: float
    peak_rss_bytes: int


def load_in_fresh_process(path: Path) -> Opened:
    """Creates a session in a process of its own.

    Raises:
        Prune2OnnxError: the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROBE, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Prune2OnnxError(
            f"{path}: a fresh process cannot open it: {done.stderr.strip()[-400:]}"
        )
    load_ms, cpu_ms, peak = json.loads(done.stdout)
    return Opened(float(load_ms), float(cpu_ms), int(peak))


def loads(files: Sequence[Path]) -> list[Opened]:
    """`load_in_fresh_process` for each file: medians of up to seven processes each, interleaved."""
    began = time.perf_counter()
    taken: list[list[Opened]] = []
    while len(taken) < _LOADS and (not taken or time.perf_counter() - began < _LOADS_SECONDS):
        taken.append([load_in_fresh_process(path) for path in files])
    found = []
    for runs in zip(*taken, strict=True):
        load_ms, cpu_ms, peak = np.median(runs, axis=0).tolist()
        found.append(Opened(load_ms, cpu_ms, int(peak)))
    return found


def timed(
    files: Sequence[Path],
    opened: Sequence[ort.InferenceSession],
    inputs: Sequence[dict[str, NDArray[Any]]],
    *,
    seconds: float,
    rounds: int,
    warm_up: int = BenchmarkOptions.warm_up,
) -> NDArray[np.float64]:
    """Latency of several files, each run once in every round, in random order.

    (In a fixed order, a small model would always run after the same large one, which evicts it from
    the caches.)

    Args:
        files: their paths, for error messages.
        opened: a session for each file.
        inputs: the inputs of each file.
        seconds: after this time no further round begins, except the first 5.
        rounds: the most rounds.
        warm_up: inferences of each file before any is timed.

    Returns:
        Milliseconds, [rounds, files].

    Raises:
        Prune2OnnxError: an input does not fit.
    """
    for path, one, given in zip(files, opened, inputs, strict=True):
        run_once(one, given, path)
    calls = [call(one, given) for one, given in zip(opened, inputs, strict=True)]
    for each in calls:
        for _ in range(warm_up - 1):
            each()
    times: list[list[float]] = []
    order = np.random.default_rng(0)
    began = time.perf_counter()
    while len(times) < min(_FEWEST, rounds) or (
        time.perf_counter() - began < seconds and len(times) < rounds
    ):
        taken = [0.0] * len(opened)
        for index in order.permutation(len(opened)).tolist():
            start = time.perf_counter()
            calls[index]()
            taken[index] = 1e3 * (time.perf_counter() - start)
        times.append(taken)
    return np.array(times)


def latencies(
    files: Sequence[Path], opened: Sequence[ort.InferenceSession], inputs: dict[str, NDArray[Any]]
) -> NDArray[np.float64]:
    """`timed` on one example: up to 300 runs of each file after 20 to warm up."""
    return timed(files, opened, [inputs] * len(files), seconds=_MOST_SECONDS, rounds=_RUNS)


def measured(
    files: Sequence[Path], times: NDArray[np.float64], errors: Sequence[float | None]
) -> list[Measured]:
    """Load time, peak memory and latency of several files.

    Args:
        files: ONNX files.
        times: of inferences, [rounds, files] (`latencies`).
        errors: of each file, passed through.

    Returns:
        One `Measured` per file: medians of up to 7 loads in fresh processes, interleaved, and
        percentiles of the times. Loads have one thread, runs onnxruntime's default number.
    """
    return [
        Measured(
            nbytes=file_nbytes(path),
            error=error,
            load_ms=own.load_ms,
            load_cpu_ms=own.cpu_ms,
            peak_rss_bytes=own.peak_rss_bytes,
            latency_ms={f"p{percent}": float(np.percentile(each, percent)) for percent in (50, 95)},
        )
        for path, error, own, each in zip(files, errors, loads(files), times.T, strict=True)
    ]
