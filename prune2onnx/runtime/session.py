"""Sessions of onnxruntime: opening a model, one inference, and clear errors.

What to run a model on: see `inputs`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.errors import OutOfMemoryError, Prune2OnnxError, first_line
from prune2onnx.graph.file import InvalidModelError, load, save
from prune2onnx.graph.protobuf import MAX_NBYTES, nbytes, serialized

# onnxruntime's messages about an operator that it does not have
_UNKNOWN_OPERATOR = ("is not a registered function/op", "Could not find an implementation")
# and where memory ends
_NO_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")

_TYPES = {name.lower(): number for name, number in onnx.TensorProto.DataType.items()}
# element types that onnxruntime does not exchange as numpy arrays
_NOT_NUMPY = {
    number
    for name, number in _TYPES.items()
    if name == "bfloat16" or name.startswith(("float8", "float4", "int4", "uint4", "int2", "uint2"))
}


class UnrunnableError(Prune2OnnxError):
    """A model cannot be run, or says nothing when it is, so that outputs cannot be compared."""


def session(
    model: str | Path | ModelProto,
    *,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    optimised: Path | None = None,
    threads: int = 0,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Opens a model on the CPU.

    Args:
        model: a path or a model in memory; one above 2 GB goes by way of a file.
        level: how far onnxruntime optimises the graph.
        optimised: where to save the optimised graph; its weights go to `data_of` it.
        threads: number of threads; 0: onnxruntime's default.
        profile: prefix of the path of the profiler's file.

    Raises:
        Prune2OnnxError: onnxruntime refuses the model; its reason is in the message.
    """
    if isinstance(model, ModelProto) and nbytes(model) > MAX_NBYTES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save(model, path)
            return session(path, level=level, optimised=optimised, threads=threads, profile=profile)
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4  # its errors are in exceptions, and may quote a hostile file
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", data_of(optimised).name
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.intra_op_num_threads = threads
    in_memory = isinstance(model, ModelProto)
    source = b"".join(serialized(model)) if isinstance(model, ModelProto) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base class
        name = "the model" if in_memory else str(model)
        require_memory(error, name)
        unknown = any(sign in str(error) for sign in _UNKNOWN_OPERATOR)
        raise (UnrunnableError if unknown else Prune2OnnxError)(
            f"{name}: onnxruntime {ort.__version__} cannot open it: {first_line(error)}"
        ) from error


def require_memory(error: Exception, name: object) -> None:
    """Makes sure that an error is not that memory has ended.

    Args:
        error: onnxruntime's own, or Python's.
        name: of the model, for the message.

    Raises:
        OutOfMemoryError: it has.
    """
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
        raise OutOfMemoryError(
            f"{name}: onnxruntime {ort.__version__} gets no more memory ({first_line(error)}); end "
            "other programs, or use a machine with more"
        ) from error


def data_of(optimised: Path) -> Path:
    """The file that gets the weights of an optimised graph."""
    return optimised.with_name(f"{optimised.name}.data")


def load_runnable(path: Path, *, lazily: bool = False) -> ModelProto:
    """Reads an ONNX file, also one that onnx's checker refuses, if onnxruntime opens it.

    Args:
        path: the file.
        lazily: as for `graph.file.load`.

    Raises:
        Prune2OnnxError: as for `graph.file.load`.
    """
    try:
        return load(path, lazily=lazily)
    except InvalidModelError as error:
        try:
            session(path, level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
        except Prune2OnnxError:
            raise error from None
        return error.model


def run_once(
    opened: ort.InferenceSession, inputs: dict[str, NDArray[Any]], path: Path
) -> list[Any]:
    """One inference.

    Raises:
        Prune2OnnxError: the inputs do not fit the model.
    """
    try:
        return run(opened, inputs)
    except Exception as error:  # onnxruntime's own exceptions have no common base class
        require_memory(error, path)
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise Prune2OnnxError(f"{path}: fails on {shapes}: {first_line(error)}") from error


def run(
    opened: ort.InferenceSession, inputs: dict[str, NDArray[Any]], seconds: float | None = None
) -> list[Any]:
    """One inference; outputs of types that numpy lacks are returned as float32.

    Args:
        opened: the model.
        inputs: by name.
        seconds: the most that it may take; default: no limit.

    Raises:
        TimeoutError: it takes longer.
        Exception: onnxruntime's own, whatever it is.
    """
    made = call(opened, inputs)() if seconds is None else _in_time(opened, inputs, seconds)
    return [_array(o) if isinstance(o, ort.OrtValue) else o for o in made]


def _in_time(
    opened: ort.InferenceSession, inputs: dict[str, NDArray[Any]], seconds: float
) -> Sequence[Any]:
    options = ort.RunOptions()
    options.log_severity_level = 4
    ended = threading.Event()

    def end() -> None:
        ended.set()
        options.terminate = True  # seen between two nodes, also in the body of a Loop

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        return call(opened, inputs, options)()
    except Exception as error:
        if ended.is_set():
            raise TimeoutError(f"it runs for more than {seconds:g} s") from error
        raise
    finally:
        timer.cancel()


def call(
    opened: ort.InferenceSession,
    inputs: dict[str, NDArray[Any]],
    options: ort.RunOptions | None = None,
) -> Callable[[], Sequence[Any]]:
    """A function that runs a model on inputs, for many times; also of types that numpy lacks."""
    given, made = opened.get_inputs(), opened.get_outputs()
    if not any(element_type(value.type) in _NOT_NUMPY for value in (*given, *made)):
        return lambda: opened.run(None, inputs, options)
    values = {}
    for value in given:
        kind = element_type(value.type)
        array = np.ascontiguousarray(inputs[value.name])
        values[value.name] = (
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
            if kind in _NOT_NUMPY
            else ort.OrtValue.ortvalue_from_numpy(array)
        )
    return lambda: opened.run_with_ort_values(None, values, options)


def _array(value: ort.OrtValue) -> Any:
    """An output as numpy has it."""
    kind = element_type(value.data_type())
    if kind not in _NOT_NUMPY:
        return value.numpy()
    content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    tensor = onnx.TensorProto(data_type=kind, dims=value.shape(), raw_data=content)
    return onnx.numpy_helper.to_array(tensor).astype(np.float32)


def element_type(text: str) -> int | None:
    """Onnx's number of a type such as "tensor(float)"; None where it is not a tensor's."""
    return _TYPES.get(text.removeprefix("tensor(").removesuffix(")"))


def input_text(opened: ort.InferenceSession) -> str:
    """Names, types and shapes of a model's inputs, in words."""
    return ", ".join(f"{i.name} {i.type} {i.shape}" for i in opened.get_inputs())


def environment() -> dict[str, Any]:
    """The conditions of a measurement: versions, processor, cores."""
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
