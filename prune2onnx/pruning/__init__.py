"""Learned-threshold pruning: prune, penalty, density, bake (arXiv 1712.01721)."""

from prune2onnx.pruning.functions import FUNCTIONS
from prune2onnx.pruning.granularity import GRANULARITIES
from prune2onnx.pruning.learned import (
    Density,
    LayerDensity,
    bake,
    density,
    hold_zeros,
    penalty,
    prunable_weights,
    prune,
    scale_thresholds,
    selected_weights,
    survivors,
    thresholds_of,
    weigh_by_bits,
)
from prune2onnx.pruning.rate import density_of_bits
from prune2onnx.pruning.widths import Widths, narrow, widths_of

__all__ = [
    "FUNCTIONS",
    "GRANULARITIES",
    "Density",
    "LayerDensity",
    "Widths",
    "bake",
    "density",
    "density_of_bits",
    "hold_zeros",
    "narrow",
    "penalty",
    "prunable_weights",
    "prune",
    "scale_thresholds",
    "selected_weights",
    "survivors",
    "thresholds_of",
    "weigh_by_bits",
    "widths_of",
]
