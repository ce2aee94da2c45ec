"""prune2onnx: a trained network, pruned and shared, in one small ONNX file that onnxruntime opens.

The public verbs, no logic. Those that need torch are imported when they are first used, so that
packing a file does not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

# Imported at once: these functions bear their module's name, and a lazy import would bind the
# module to it.
from prune2onnx.benchmark import benchmark
from prune2onnx.errors import BudgetError, MismatchError, Prune2OnnxError, RecipeError
from prune2onnx.inspection import inspect
from prune2onnx.pack import pack, unpack
from prune2onnx.recipe import Recipe, read_recipe, resolve
from prune2onnx.shrink import shrink
from prune2onnx.validate import validate

if TYPE_CHECKING:
    from prune2onnx.data import load_data
    from prune2onnx.exporter import export
    from prune2onnx.int8 import quantize_int8
    from prune2onnx.pipeline import compress
    from prune2onnx.pruning import bake, density, hold_zeros, penalty, prune
    from prune2onnx.sweeping import sweep, sweep_of
    from prune2onnx.training import fit
    from prune2onnx.training.fold import fold_batch_norm
    from prune2onnx.training.levels import bake_levels, put_on_levels

__version__ = importlib.metadata.version("prune2onnx")

_LAZY = {
    "bake": "pruning",
    "bake_levels": "training.levels",
    "compress": "pipeline",
    "density": "pruning",
    "evaluate": "training",
    "export": "exporter",
    "fit": "training",
    "fold_batch_norm": "training.fold",
    "hold_zeros": "pruning",
    "load_data": "data",
    "penalty": "pruning",
    "prune": "pruning",
    "put_on_levels": "training.levels",
    "quantize_int8": "int8",
    "sweep": "sweeping",
    "sweep_of": "sweeping",
}

__all__ = [
    "BudgetError",
    "MismatchError",
    "Prune2OnnxError",
    "Recipe",
    "RecipeError",
    "bake",
    "bake_levels",
    "benchmark",
    "compress",
    "density",
    "evaluate",
    "export",
    "fit",
    "fold_batch_norm",
    "hold_zeros",
    "inspect",
    "load_data",
    "pack",
    "penalty",
    "prune",
    "put_on_levels",
    "quantize_int8",
    "read_recipe",
    "resolve",
    "shrink",
    "sweep",
    "sweep_of",
    "unpack",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
