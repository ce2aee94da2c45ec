"""Latency and throughput of several files, measured interleaved: differences, and which are noise.

Timings on a shared machine drift by more than most models differ. So every file is run once per
round, and files are compared within blocks of successive rounds: the ratio of two files' medians in
a block is free of drift that is slower than the block. The spread of these ratios, estimated by the
bootstrap, says which differences are noise.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.file import file_nbytes
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import RANDOM_INPUTS, BenchmarkOptions, InputOptions
from prune2onnx.runtime.inputs import Inputs, fixed_batch, inputs_of
from prune2onnx.runtime.latency import loads, timed
from prune2onnx.runtime.session import (
    UnrunnableError,
    environment,
    load_runnable,
    run_once,
    session,
)

_BLOCKS = 20  # of rounds, for the spread of ratios
_FEWEST = 5  # blocks
_RESAMPLES = 2000
_SAME = 0.03  # two sessions of one file may differ by this much, as long as they exist
_PROFILED = 50  # runs under the profiler
_MOST_ROUNDS = 20_000


@dataclass(frozen=True)
class Load:
    """Opening a file in a fresh process with one thread; medians of up to seven processes.

    Attributes:
        file: its path.
        nbytes: its size, external data included.
        load_ms: time to create the session.
        cpu_ms: the CPU time of that.
        peak_rss_bytes: peak memory of the process, the runtime itself included.
    """

    file: str
    nbytes: int
    load_ms: float
    cpu_ms: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Timing:
    """Inferences of one file.

    Attributes:
        file: its path.
        batch: examples per inference.
        threads: number of threads; 0: onnxruntime's default.
        runs: timed inferences.
        p50_ms: median time of an inference.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        throughput: examples per second, over all timed inferences.
        ratio: median time over the first file's, from blocks of rounds; None for the first.
        interval: the ratio's 95 % bootstrap interval; None where there were too few rounds.
    """

    file: str
    batch: int
    threads: int
    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    throughput: float
    ratio: float | None
    interval: tuple[float, float] | None

    @property
    def is_noise(self) -> bool:
        """Whether the interval includes a difference of less than 3 % from the first file."""
        return self.interval is None or (
            self.interval[0] <= 1 + _SAME and self.interval[1] >= 1 - _SAME
        )


@dataclass(frozen=True)
class Operator:
    """The time of the kernels of one operator, by onnxruntime's profiler.

    Attributes:
        file: the model's path.
        batch: examples per inference.
        threads: number of threads.
        name: the operator in onnxruntime's optimised graph (`Conv`, `FusedGemm`).
        kernels: nodes of that operator.
        ms: their time per inference: the sum of each kernel's median over 50 runs.
        share: fraction of the time of all kernels, 0-1.
    """

    file: str
    batch: int
    threads: int
    name: str
    kernels: int
    ms: float
    share: float


@dataclass(frozen=True)
class Benchmark:
    """Files, measured side by side.

    Attributes:
        environment: versions, processor, cores.
        loads: one for each file.
        timings: for each batch and number of threads, one for each file.
        operators: with `profile`, those of each timing, the slowest first.
    """

    environment: dict[str, Any]
    loads: tuple[Load, ...]
    timings: tuple[Timing, ...]
    operators: tuple[Operator, ...]

    def to_json(self) -> str:
        """All figures as JSON, indented."""
        timings = [asdict(timing) | {"noise": timing.is_noise} for timing in self.timings]
        content = asdict(self) | {"timings": timings}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def benchmark(
    files: Sequence[Path],
    *,
    batches: Sequence[int] = BenchmarkOptions.batches,
    threads: Sequence[int] = BenchmarkOptions.threads,
    seconds: float = BenchmarkOptions.seconds,
    warm_up: int = BenchmarkOptions.warm_up,
    profile: bool = BenchmarkOptions.profile,
    inputs: InputOptions = RANDOM_INPUTS,
) -> Benchmark:
    """Measures files side by side on the CPU.

    Args:
        files: ONNX models; each gets inputs of its own shapes. The others are compared with the
            first.
        batches: examples per inference: the extent of a dynamic first axis. Default: the number
            that one of the files is made for, or 1.
        threads: numbers of threads; 0: onnxruntime's default.
        seconds: of timed inferences for each batch and number of threads, all files together.
        warm_up: inferences of each file before any is timed.
        profile: whether to time operators, too, in further runs.
        inputs: where they come from; default: random ones.

    Raises:
        RecipeError: a number is out of range.
        UnrunnableError: no random inputs were found on which a file runs.
        Prune2OnnxError: a file cannot be opened or run, or its batch size is fixed to another
            number.
    """
    found = timings(
        files, batches=batches, threads=threads, seconds=seconds, warm_up=warm_up, inputs=inputs
    )
    kernels: list[Operator] = []
    for each in found if profile else ():
        path = Path(each.file)
        given = _inputs(path, unpack(load_runnable(path)), session(path), each.batch, inputs)
        kernels += operators(path, given, each.batch, each.threads)
    taken = zip(files, loads(files), strict=True)
    sizes = tuple(Load(str(path), file_nbytes(path), *own) for path, own in taken)
    return Benchmark(environment(), sizes, tuple(found), tuple(kernels))


def timings(
    files: Sequence[Path],
    *,
    batches: Sequence[int] = BenchmarkOptions.batches,
    threads: Sequence[int] = BenchmarkOptions.threads,
    seconds: float = BenchmarkOptions.seconds,
    warm_up: int = BenchmarkOptions.warm_up,
    inputs: InputOptions = RANDOM_INPUTS,
) -> list[Timing]:
    """Times inferences of files, as `benchmark` does: for each number of threads and each batch."""
    if not files:
        raise RecipeError("no file to measure")
    least_batch = min(batches, default=1)
    for value, what, least in ((least_batch, "batch", 1), (min(threads), "threads", 0)):
        if value < least:
            raise RecipeError(f"{what} is {value}, expected {least} or more")
    if not 0 < seconds < math.inf or warm_up < 0:
        raise RecipeError(f"{seconds} seconds and {warm_up} to warm up, expected positive numbers")
    graphs = [unpack(load_runnable(path)) for path in files]
    found: list[Timing] = []
    given: dict[int, list[Inputs]] = {}
    for count in threads:
        opened = [session(path, threads=count) for path in files]
        for batch in batches or (max(map(fixed_batch, opened)) or 1,):
            if batch not in given:
                given[batch] = [
                    _inputs(path, graph, one, batch, inputs)
                    for path, graph, one in zip(files, graphs, opened, strict=True)
                ]
            times = timed(
                files, opened, given[batch], seconds=seconds, rounds=_MOST_ROUNDS, warm_up=warm_up
            )
            for index, path in enumerate(files):
                found.append(_timing(str(path), batch, count, times, index))
    return found


def _inputs(
    path: Path, graph: ModelProto, opened: Any, batch: int, options: InputOptions
) -> Inputs:
    try:
        inputs = inputs_of(graph, opened, options, count=1, examples=batch, batch=batch)[0]
    except UnrunnableError as error:
        raise UnrunnableError(f"{path}: {error}") from error
    for info in opened.get_inputs()[:1]:
        there = inputs[info.name].shape[:1]
        if there and there[0] != batch:
            raise Prune2OnnxError(
                f"{path}: its input {info.name} always has {there[0]} examples, expected {batch}; "
                f"export it with a dynamic first axis, or measure with --batch {there[0]}"
            )
    return inputs


def _timing(file: str, batch: int, threads: int, times: NDArray[np.float64], index: int) -> Timing:
    own = times[:, index]
    p50, p95, p99 = (float(value) for value in np.percentile(own, (50, 95, 99)))
    ratio, interval = _ratio(own, times[:, 0]) if index else (None, None)
    throughput = 1e3 * batch * own.size / float(own.sum())
    return Timing(file, batch, threads, own.size, p50, p95, p99, throughput, ratio, interval)


def _ratio(
    own: NDArray[np.float64], first: NDArray[np.float64]
) -> tuple[float, tuple[float, float] | None]:
    """Ratio of two median times: its geometric mean over blocks of rounds, and its interval."""
    count = min(_BLOCKS, own.size // 2)
    if count < _FEWEST:
        return float(np.median(own) / np.median(first)), None
    pairs = zip(np.array_split(own, count), np.array_split(first, count), strict=True)
    logs = np.array([np.log(np.median(a) / np.median(b)) for a, b in pairs])
    means = np.random.default_rng(0).choice(logs, (_RESAMPLES, count)).mean(1)
    low, high = np.exp(np.percentile(means, (2.5, 97.5)))
    return math.exp(logs.mean()), (float(low), float(high))


def operators(path: Path, inputs: Inputs, batch: int, threads: int = 0) -> list[Operator]:
    """The times of a file's kernels on these inputs, by onnxruntime's profiler, slowest first."""
    with tempfile.TemporaryDirectory() as folder:
        opened = session(path, threads=threads, profile=Path(folder) / "profile")
        for _ in range(_PROFILED):
            run_once(opened, inputs, path)
        events = json.loads(Path(opened.end_profiling()).read_text())
    kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernels[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    spent: dict[str, list[float]] = defaultdict(list)
    for (operator, _), times in kernels.items():
        spent[operator].append(float(np.median(times)))
    total = sum(map(sum, spent.values()))
    found = [
        Operator(
            str(path),
            batch,
            threads,
            name,
            len(each),
            sum(each),
            sum(each) / total if total else 0.0,
        )
        for name, each in spent.items()
    ]
    return sorted(found, key=lambda operator: -operator.ms)
