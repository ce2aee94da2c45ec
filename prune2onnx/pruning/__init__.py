"""Learned-threshold pruning: prune, penalty, density, bake (arXiv 1712.01721)."""

from prune2onnx.pruning.channels import ChannelThresholds, channel_thresholds_of, prune_channels
from prune2onnx.pruning.computed import deep_copy, has_computed, with_plain_parameters
from prune2onnx.pruning.coverage import Density, LayerDensity, OtherParameter, other_parameters
from prune2onnx.pruning.functions import FUNCTIONS
from prune2onnx.pruning.granularity import GRANULARITIES
from prune2onnx.pruning.holding import hold_zeros
from prune2onnx.pruning.learned import Learned
from prune2onnx.pruning.pressed import Pressed, pressed
from prune2onnx.pruning.rate import density_of_bits
from prune2onnx.pruning.selection import Place, checked_weights, prunable_weights, selected_weights
from prune2onnx.pruning.weights import (
    add_gradients,
    bake,
    density,
    penalty,
    prune,
    scale_thresholds,
    survivors,
    thresholds_of,
    weigh_by_bits,
)
from prune2onnx.pruning.wrappers import unwrapped

__all__ = [
    "FUNCTIONS",
    "GRANULARITIES",
    "ChannelThresholds",
    "Density",
    "LayerDensity",
    "Learned",
    "OtherParameter",
    "Place",
    "Pressed",
    "add_gradients",
    "bake",
    "channel_thresholds_of",
    "checked_weights",
    "deep_copy",
    "density",
    "density_of_bits",
    "has_computed",
    "hold_zeros",
    "other_parameters",
    "penalty",
    "pressed",
    "prunable_weights",
    "prune",
    "prune_channels",
    "scale_thresholds",
    "selected_weights",
    "survivors",
    "thresholds_of",
    "unwrapped",
    "weigh_by_bits",
    "with_plain_parameters",
]
