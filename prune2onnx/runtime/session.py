"""Sessions of onnxruntime: opening a model, one inference, random inputs, and clear errors."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from prune2onnx.errors import Prune2OnnxError, first_line

# onnxruntime's messages about an operator that it does not have
_UNKNOWN_OPERATOR = ("is not a registered function/op", "Could not find an implementation")


class UnrunnableError(Prune2OnnxError):
    """onnxruntime has no kernels for a model, packed or not, so outputs cannot be compared."""


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
        threads: number of threads; 0: onnxruntime's default.
        profile: prefix of the path of the profiler's file.

    Raises:
        Prune2OnnxError: onnxruntime refuses the model; its reason is in the message.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3  # onnxruntime warns about every optimised graph that is saved
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
    except Exception as error:  # onnxruntime's own exceptions have no common base class
        name = "the model" if in_memory else str(model)
        unknown = any(sign in str(error) for sign in _UNKNOWN_OPERATOR)
        raise (UnrunnableError if unknown else Prune2OnnxError)(
            f"{name}: onnxruntime {ort.__version__} cannot open it: {first_line(error)}"
        ) from error


def run_once(
    opened: ort.InferenceSession, inputs: dict[str, NDArray[Any]], path: Path
) -> list[Any]:
    """One inference.

    Raises:
        Prune2OnnxError: the inputs do not fit the model.
    """
    try:
        outputs: list[Any] = opened.run(None, inputs)
    except Exception as error:  # onnxruntime's own exceptions have no common base class
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise Prune2OnnxError(
            f"{path}: fails on {shapes}: {first_line(error)}; give examples with --data"
        ) from error
    return outputs


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
        batch: extent of dynamic first axes; other dynamic axes get 1.
    """
    generator = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for info in opened.get_inputs():
        shape = [
            extent if isinstance(extent, int) and extent > 0 else 1 if axis else batch
            for axis, extent in enumerate(info.shape)
        ]
        element_type = info.type.removeprefix("tensor(").removesuffix(")")
        dtype = {"float": "float32", "double": "float64"}.get(element_type, element_type)
        try:
            zeros = np.zeros(shape, dtype)
        except TypeError as error:
            raise Prune2OnnxError(
                f"input {info.name} has type {info.type}, for which there is no random example; "
                "give examples with --data"
            ) from error
        normal = generator.standard_normal(shape)
        inputs[info.name] = normal.astype(dtype) if zeros.dtype.kind == "f" else zeros
    return inputs


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
