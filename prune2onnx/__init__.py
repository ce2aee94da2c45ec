"""prune2onnx: a trained network, pruned and coded, in one small ONNX file that onnxruntime opens.

The public verbs, no logic. Each is imported when it is first used, so that packing a file does not
wait for torch.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as type checkers know it; typing takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from prune2onnx.commands.compress import compress
    from prune2onnx.commands.lossy import calibrate
    from prune2onnx.commands.search import search
    from prune2onnx.commands.shrink import shrink
    from prune2onnx.commands.sweep import sweep, sweep_of
    from prune2onnx.data import load_data
    from prune2onnx.errors import BudgetError, MismatchError, Prune2OnnxError, RecipeError
    from prune2onnx.packing.inspection import inspect
    from prune2onnx.packing.pack import pack
    from prune2onnx.packing.unpack import unpack
    from prune2onnx.pruning import bake, density, hold_zeros, penalty, prune
    from prune2onnx.runs.recipe import Recipe, read_recipe, resolve
    from prune2onnx.runtime.benchmark import benchmark
    from prune2onnx.runtime.int8 import quantize_int8
    from prune2onnx.runtime.validate import validate
    from prune2onnx.tasks.metrics import Metric
    from prune2onnx.tasks.task import Task, load_task
    from prune2onnx.training.compression.compression import Compression
    from prune2onnx.training.compression.lightning_callback import LightningCallback
    from prune2onnx.training.compression.transformers_callback import TransformersCallback
    from prune2onnx.training.export import export
    from prune2onnx.training.fit import fit
    from prune2onnx.training.fold import fold_batch_norm
    from prune2onnx.training.levels import bake_levels, put_on_levels
    from prune2onnx.training.scoring import evaluate

    __version__: str

_HOME = {
    "BudgetError": "errors",
    "Compression": "training.compression.compression",
    "LightningCallback": "training.compression.lightning_callback",
    "Metric": "tasks.metrics",
    "MismatchError": "errors",
    "Prune2OnnxError": "errors",
    "Recipe": "runs.recipe",
    "RecipeError": "errors",
    "Task": "tasks.task",
    "TransformersCallback": "training.compression.transformers_callback",
    "bake": "pruning",
    "bake_levels": "training.levels",
    "benchmark": "runtime.benchmark",
    "calibrate": "commands.lossy",
    "compress": "commands.compress",
    "density": "pruning",
    "evaluate": "training.scoring",
    "export": "training.export",
    "fit": "training.fit",
    "fold_batch_norm": "training.fold",
    "hold_zeros": "pruning",
    "inspect": "packing.inspection",
    "load_data": "data",
    "load_task": "tasks.task",
    "pack": "packing.pack",
    "penalty": "pruning",
    "prune": "pruning",
    "put_on_levels": "training.levels",
    "quantize_int8": "runtime.int8",
    "read_recipe": "runs.recipe",
    "resolve": "runs.recipe",
    "shrink": "commands.shrink",
    "search": "commands.search",
    "sweep": "commands.sweep",
    "sweep_of": "commands.sweep",
    "unpack": "packing.unpack",
    "validate": "runtime.validate",
}
"""Public name -> the module that it lives in."""

__all__ = [
    "BudgetError",
    "Compression",
    "LightningCallback",
    "Metric",
    "MismatchError",
    "Prune2OnnxError",
    "Recipe",
    "RecipeError",
    "Task",
    "TransformersCallback",
    "bake",
    "bake_levels",
    "benchmark",
    "calibrate",
    "compress",
    "density",
    "evaluate",
    "export",
    "fit",
    "fold_batch_norm",
    "hold_zeros",
    "inspect",
    "load_data",
    "load_task",
    "pack",
    "penalty",
    "prune",
    "put_on_levels",
    "quantize_int8",
    "read_recipe",
    "resolve",
    "search",
    "shrink",
    "sweep",
    "sweep_of",
    "unpack",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
