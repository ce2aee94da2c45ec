"""Latency and throughput of several files, by turns in one run: what differs, and what is noise.

Timings on a shared machine drift by more than most models differ. So every file is run once in
each round, and files are compared within blocks of successive rounds: the ratio of two files'
medians in a block is free of drift that is slower than the block. The spread of those ratios, by
the bootstrap, says what is within noise.
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
from rich.table import Table
from rich.text import Text

from prune2onnx.errors import Prune2OnnxError, RecipeError, printable
from prune2onnx.running import (
    environment,
    file_nbytes,
    loads,
    random_inputs,
    run_once,
    session,
    timed,
)

_BLOCKS = 20  # of rounds, for the spread of ratios
_FEWEST = 5  # blocks
_RESAMPLES = 2000
_SAME = 0.03  # two sessions of one file may differ by as much, for as long as they live
_PROFILED = 50  # runs under the profiler
_MOST_ROUNDS = 20_000


@dataclass(frozen=True)
class Load:
    """Opening a file in a fresh process, medians of seven.

    Attributes:
        file: its path.
        nbytes: its size, external data included.
        load_ms: creating the session.
        peak_rss_bytes: peak memory of the process, the runtime itself included.
    """

    file: str
    nbytes: int
    load_ms: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Timing:
    """Inferences of one file.

    Attributes:
        file: its path.
        batch: examples in an inference.
        threads: that compute; 0: onnxruntime's own choice.
        runs: timed inferences.
        p50_ms: median time of an inference; p95_ms, p99_ms: 95 and 99 % take no longer.
        throughput: examples a second, of all timed inferences together.
        ratio: median time over the first file's, from blocks of rounds; None for the first.
        interval: its 95 % bootstrap interval; None where there were too few rounds.
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
        """Whether the difference from the first file may be none, or within 3 % of it."""
        return self.interval is None or (
            self.interval[0] <= 1 + _SAME and self.interval[1] >= 1 - _SAME
        )


@dataclass(frozen=True)
class Operator:
    """What the kernels of one operator took, by onnxruntime's profiler.

    Attributes:
        file: the model's path.
        batch: examples in an inference.
        threads: that compute.
        name: the operator, as onnxruntime left it (`Conv`, `FusedGemm`).
        kernels: nodes of that operator.
        ms: of an inference, the sum of their medians over 50 runs.
        share: of all kernels, 0-1.
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
        operators: with a profile: for each timing, the slowest first.
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

    def tables(self) -> list[Table]:
        """Files, inferences, and operators if there is a profile."""
        opened = _table("files", "file", "bytes", "load ms", "peak memory MB")
        for load in self.loads:
            memory = f"{load.peak_rss_bytes / 1e6:.1f}"
            opened.add_row(_name(load.file), f"{load.nbytes:,}", f"{load.load_ms:.1f}", memory)
        headings = ("file", "batch", "threads", "p50 ms", "p95 ms", "p99 ms", "examples/s")
        timings = _table("inferences, by turns", *headings, "time / first file's")
        for timing in self.timings:
            times = (f"{ms:.3f}" for ms in (timing.p50_ms, timing.p95_ms, timing.p99_ms))
            threads = str(timing.threads or "default")
            cells = [str(timing.batch), threads, *times, f"{timing.throughput:,.0f}"]
            timings.add_row(_name(timing.file), *cells, _compared(timing))
        tables = [opened, timings]
        if self.operators:
            headings = ("file", "batch", "threads", "operator", "kernels", "ms", "share")
            operators = _table("kernels in an inference", *headings)
            for one in self.operators:
                cells = [str(one.batch), str(one.threads or "default"), one.name]
                figures = [str(one.kernels), f"{one.ms:.4f}", f"{100 * one.share:.0f} %"]
                operators.add_row(_name(one.file), *cells, *figures)
            tables.append(operators)
        return tables


def benchmark(
    files: Sequence[Path],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (0,),
    seconds: float = 5.0,
    warm_up: int = 20,
    profile: bool = False,
) -> Benchmark:
    """Measures files side by side on the CPU, with made-up inputs.

    Args:
        files: ONNX models; each gets inputs of its own shapes. The first is what the others are
            compared with.
        batches: examples in an inference: the extent of a dynamic first axis.
        threads: that compute an inference; 0: onnxruntime's own choice.
        seconds: of timed inferences for each batch and number of threads, all files together.
        warm_up: inferences of each file before any is timed.
        profile: whether to time operators, too, in further runs.

    Raises:
        RecipeError: a number out of range.
        Prune2OnnxError: a file cannot be opened or run, or its batch is fixed to another number.
    """
    found = timings(files, batches=batches, threads=threads, seconds=seconds, warm_up=warm_up)
    kernels: list[Operator] = []
    for each in found if profile else ():
        kernels += operators(Path(each.file), each.batch, each.threads)
    taken = zip(files, loads(files), strict=True)
    sizes = tuple(Load(str(path), file_nbytes(path), ms, peak) for path, (ms, peak) in taken)
    return Benchmark(environment(), sizes, tuple(found), tuple(kernels))


def timings(
    files: Sequence[Path],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (0,),
    seconds: float = 5.0,
    warm_up: int = 20,
) -> list[Timing]:
    """Times inferences of files, as `benchmark` does: for each number of threads and each batch."""
    if not files:
        raise RecipeError("no file to measure")
    for value, what, least in ((min(batches), "batch", 1), (min(threads), "threads", 0)):
        if value < least:
            raise RecipeError(f"{what} is {value}, expected {least} or more")
    if not 0 < seconds < math.inf or warm_up < 0:
        raise RecipeError(f"{seconds} seconds and {warm_up} to warm up, expected positive numbers")
    found: list[Timing] = []
    for count in threads:
        opened = [session(path, threads=count) for path in files]
        for batch in batches:
            inputs = [_inputs(path, one, batch) for path, one in zip(files, opened, strict=True)]
            times = timed(
                files, opened, inputs, seconds=seconds, rounds=_MOST_ROUNDS, warm_up=warm_up
            )
            for index, path in enumerate(files):
                found.append(_timing(str(path), batch, count, times, index))
    return found


def _inputs(path: Path, opened: Any, batch: int) -> dict[str, NDArray[Any]]:
    inputs = random_inputs(opened, batch=batch)
    for info in opened.get_inputs()[:1]:
        there = inputs[info.name].shape[:1]
        if there and there[0] != batch:
            raise Prune2OnnxError(
                f"{path}: its input {info.name} always has {there[0]} examples, {batch} were asked "
                f"for; export it with a dynamic first axis, or measure with --batch {there[0]}"
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
    """Median time over another's: geometric mean over blocks of rounds, and its interval."""
    count = min(_BLOCKS, own.size // 2)
    if count < _FEWEST:
        return float(np.median(own) / np.median(first)), None
    pairs = zip(np.array_split(own, count), np.array_split(first, count), strict=True)
    logs = np.array([np.log(np.median(a) / np.median(b)) for a, b in pairs])
    means = np.random.default_rng(0).choice(logs, (_RESAMPLES, count)).mean(1)
    low, high = np.exp(np.percentile(means, (2.5, 97.5)))
    return math.exp(logs.mean()), (float(low), float(high))


def operators(path: Path, batch: int, threads: int = 0) -> list[Operator]:
    """What the kernels of a file take, by onnxruntime's profiler, the slowest first."""
    with tempfile.TemporaryDirectory() as folder:
        opened = session(path, threads=threads, profile=Path(folder) / "profile")
        inputs = _inputs(path, opened, batch)
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


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        text = heading in ("file", "operator", "time / first file's")
        table.add_column(heading, justify="left" if text else "right", no_wrap=text)
    return table


def _name(file: str) -> Text:
    return Text(printable(file))


def _compared(timing: Timing) -> str:
    if timing.ratio is None:
        return ""
    if timing.interval is None:
        return f"{timing.ratio:.2f} (too few rounds to say)"
    low, high = timing.interval
    verdict = ", within noise" if timing.is_noise else ""
    return f"{timing.ratio:.2f} ({low:.2f} to {high:.2f}{verdict})"
