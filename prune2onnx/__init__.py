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
from prune2onnx.errors import MismatchError, Prune2OnnxError, RecipeError
from prune2onnx.inspection import inspect
from prune2onnx.pack import pack, unpack
from prune2onnx.recipe import Recipe, read_recipe, resolve
from prune2onnx.validate import validate

if TYPE_CHECKING:
    from prune2onnx.data import load_data
    from prune2onnx.exporter import export
    from prune2onnx.fold import fold_batch_norm
    from prune2onnx.pipeline import compress
    from prune2onnx.pruning import bake, density, hold_zeros, penalty, prune
    from prune2onnx.sharing import bake_codebooks, share
    from prune2onnx.train import evaluate, fit

__version__ = importlib.metadata.version("prune2onnx")

_LAZY = {
    "bake": "pruning",
    "bake_codebooks": "sharing",
    "compress": "pipeline",
    "density": "pruning",
    "evaluate": "train",
    "export": "exporter",
    "fit": "train",
    "fold_batch_norm": "fold",
    "hold_zeros": "pruning",
    "load_data": "data",
    "penalty": "pruning",
    "prune": "pruning",
    "share": "sharing",
}

__all__ = [
    "MismatchError",
    "Prune2OnnxError",
    "Recipe",
    "RecipeError",
    "bake",
    "bake_codebooks",
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
    "read_recipe",
    "resolve",
    "share",
    "unpack",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
