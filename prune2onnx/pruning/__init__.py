"""Learned-threshold pruning: prune, penalty, density, bake (arXiv 1712.01721)."""

from prune2onnx.pruning.channels import ChannelThresholds, channel_thresholds_of, prune_channels
from prune2onnx.pruning.functions import FUNCTIONS
from prune2onnx.pruning.granularity import GRANULARITIES
from prune2onnx.pruning.rate import density_of_bits
from prune2onnx.pruning.selection import prunable_weights, selected_weights
from prune2onnx.pruning.weights import (
    Density,
    LayerDensity,
    bake,
    density,
    hold_zeros,
    penalty,
    prune,
    scale_thresholds,
    survivors,
    thresholds_of,
    weigh_by_bits,
)

__all__ = [
    "FUNCTIONS",
    "GRANULARITIES",
    "ChannelThresholds",
    "Density",
    "LayerDensity",
    "bake",
    "channel_thresholds_of",
    "density",
    "density_of_bits",
    "hold_zeros",
    "penalty",
    "prunable_weights",
    "prune",
    "prune_channels",
    "scale_thresholds",
    "selected_weights",
    "survivors",
    "thresholds_of",
    "weigh_by_bits",
]
