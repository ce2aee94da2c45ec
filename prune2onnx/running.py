"""onnxruntime, opened and run: sessions, made-up inputs, load time, memory and latency.

All that the project measures is measured here, in one way: files side by side, by turns, load time
and peak memory each in a process of its own. What figures mean is for `validate` and `benchmark`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.report import Measured

_LOADS = 7  # fresh processes per file
_WARM_UP = 20
_FEWEST = 5  # timed inferences per file, whatever they take
_RUNS = 300  # of `measure`, at most
_MOST_SECONDS = 8.0  # of `measure`, however slow the model

# what onnxruntime says of an operator it does not have
_UNKNOWN_OPERATOR = ("is not a registered function/op", "Could not find an implementation")


class UnrunnableError(Prune2OnnxError):
    """onnxruntime has no kernels for a model, packed or not, so nothing can be compared."""


def session(
    model: str | Path | onnx.ModelProto,
    *,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    optimised: Path | None = None,
    threads: int = 0,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Opens a model on the CPU.

    Args:
        model: a path or a model in memory (under 2 GB).
        level: how far onnxruntime optimises the graph.
        optimised: where to save the optimised graph.
        threads: to compute with; 0 leaves it to onnxruntime.
        profile: beginning of the name of the file for onnxruntime's profiler.

    Raises:
        Prune2OnnxError: onnxruntime refuses the model; its reason is in the message.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3  # a saved optimised graph earns a warning nobody needs
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.intra_op_num_threads = threads
    in_memory = isinstance(model, onnx.ModelProto)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds, and they have no common base
        name = "the model" if in_memory else str(model)
        unknown = any(sign in str(error) for sign in _UNKNOWN_OPERATOR)
        raise (UnrunnableError if unknown else Prune2OnnxError)(
            f"{name}: onnxruntime {ort.__version__} cannot open it: {first_line(error)}"
        ) from error


def run_once(
    opened: ort.InferenceSession, inputs: dict[str, NDArray[Any]], path: Path
) -> list[Any]:
    """One inference; an input that does not fit is the user's mistake, not ours."""
    try:
        outputs: list[Any] = opened.run(None, inputs)
    except Exception as error:  # onnxruntime raises its own kinds, and they have no common base
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise Prune2OnnxError(
            f"{path}: fails on {shapes}: {first_line(error)}; give examples with --data"
        ) from error
    return outputs


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut at 400 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:400]


def input_text(opened: ort.InferenceSession) -> str:
    """Names, types and shapes of a model's inputs, in words."""
    return ", ".join(f"{i.name} {i.type} {i.shape}" for i in opened.get_inputs())


def random_inputs(
    opened: ort.InferenceSession, seed: int = 0, *, batch: int = 1
) -> dict[str, NDArray[Any]]:
    """Inputs that fit a model: standard normal floats, zeros for other types.

    Args:
        opened: the model.
        seed: of the floats.
        batch: extent of first axes that are dynamic; of others that are it is 1.
    """
    generator = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for info in opened.get_inputs():
        shape = [
            extent if isinstance(extent, int) and extent > 0 else 1 if axis else batch
            for axis, extent in enumerate(info.shape)
        ]
        kind = info.type.removeprefix("tensor(").removesuffix(")")
        dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
        try:
            zeros = np.zeros(shape, dtype)
        except TypeError as error:
            raise Prune2OnnxError(
                f"input {info.name} has type {info.type}, for which no example can be made up; "
                "give some with --data"
            ) from error
        normal = generator.standard_normal(shape)
        inputs[info.name] = normal.astype(dtype) if zeros.dtype.kind == "f" else zeros
    return inputs


# Runs alone in a fresh interpreter, so it may import nothing of the project (torch's memory and
# start-up time would be counted). VmHWM, not ru_maxrss: the latter is inherited across exec.
_PROBE = """
import json, sys, time
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
start = time.perf_counter()
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
load_ms = 1e3 * (time.perf_counter() - start)
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
print(json.dumps([load_ms, peak]))
"""


def load_in_fresh_process(path: Path) -> tuple[float, int]:
    """Milliseconds to create a session, and the process's peak memory in bytes.

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
    load_ms, peak = json.loads(done.stdout)
    return float(load_ms), int(peak)


def loads(files: Sequence[Path]) -> list[tuple[float, int]]:
    """As `load_in_fresh_process` for each file, medians of seven processes each, by turns."""
    taken = [[load_in_fresh_process(path) for path in files] for _ in range(_LOADS)]
    return [
        (float(np.median([ms for ms, _ in runs])), int(np.median([peak for _, peak in runs])))
        for runs in zip(*taken, strict=True)
    ]


def timed(
    files: Sequence[Path],
    opened: Sequence[ort.InferenceSession],
    inputs: Sequence[dict[str, NDArray[Any]]],
    *,
    seconds: float,
    rounds: int,
    warm_up: int = _WARM_UP,
) -> NDArray[np.float64]:
    """Latency of several files, each run once in every round, in random order.

    (In a fixed order a small model would always suffer from the same large one before it, which
    empties the caches.)

    Args:
        files: for errors.
        opened: a session for each.
        inputs: of each.
        seconds: after which no further round is begun, but for the first 5.
        rounds: at most.
        warm_up: inferences of each before any is timed.

    Returns:
        Milliseconds, [rounds, files].

    Raises:
        Prune2OnnxError: an input does not fit.
    """
    for path, one, given in zip(files, opened, inputs, strict=True):
        run_once(one, given, path)
        for _ in range(warm_up - 1):
            one.run(None, given)
    times: list[list[float]] = []
    order = np.random.default_rng(0)
    began = time.perf_counter()
    while len(times) < min(_FEWEST, rounds) or (
        time.perf_counter() - began < seconds and len(times) < rounds
    ):
        taken = [0.0] * len(opened)
        for index in order.permutation(len(opened)).tolist():
            start = time.perf_counter()
            opened[index].run(None, inputs[index])
            taken[index] = 1e3 * (time.perf_counter() - start)
        times.append(taken)
    return np.array(times)


def measure(
    files: Sequence[Path], inputs: dict[str, NDArray[Any]], errors: Sequence[float | None]
) -> list[Measured]:
    """Load time, peak memory and latency of several files, interleaved.

    Args:
        files: ONNX files that take the same inputs.
        inputs: one example.
        errors: of each file, passed through.

    Returns:
        One `Measured` per file: medians of 7 loads in fresh processes, percentiles of up to 300
        runs after 20 to warm up, with onnxruntime's default number of threads.
    """
    taken = loads(files)
    opened = [session(path) for path in files]
    times = timed(files, opened, [inputs] * len(files), seconds=_MOST_SECONDS, rounds=_RUNS)
    return [
        Measured(
            nbytes=file_nbytes(path),
            error=error,
            load_ms=load_ms,
            peak_rss_bytes=peak,
            latency_ms={f"p{percent}": float(np.percentile(own, percent)) for percent in (50, 95)},
        )
        for path, error, (load_ms, peak), own in zip(files, errors, taken, times.T, strict=True)
    ]


def file_nbytes(path: Path) -> int:
    """Bytes of a model: the file and the external data beside it."""
    total: int = path.stat().st_size
    proto = onnx.load(path, load_external_data=False)
    beside = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in beside:
        total += (path.parent / name).stat().st_size
    return total


def environment() -> dict[str, Any]:
    """What the figures depend on: versions, processor, cores."""
    packages = ("torch", "onnx", "onnxruntime", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return {
        "python": platform.python_version(),
        **versions,
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": len(usable),
    }
