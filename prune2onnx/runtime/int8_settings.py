"""What onnxruntime's quantizer is told: names that it can work with, and scales of its own choice.

A weight on the multiples of a step keeps that step; channels of zeros get a range like the others;
a weight that is read along two axes gets one scale for all.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.graph.names import rename
from prune2onnx.graph.walk import attribute, nodes_in
from prune2onnx.packing.quantized import MOST_STEPS, on_steps, step_of

_Overrides = dict[str, list[dict[str, Any]]]
"""Settings of onnxruntime's quantizer: weight -> one entry, or one for each channel."""


def overrides(
    model: ModelProto,
    named: ModelProto,
    layers: list[onnx.NodeProto],
    weights: dict[str, NDArray[Any]],
    renamed: dict[str, str],
    steps: Mapping[str, float],
) -> _Overrides:
    """Scales and ranges that the quantizer is to use, by the names of `named`.

    Args:
        model: float32.
        named: the same as of `with_free_names`.
        layers: nodes of `named` with weights.
        weights: of the layers, by the names of `model`.
        renamed: name in `model` -> name in `named`, where they differ.
        steps: weight -> its step, where it is known.
    """
    own = {renamed.get(name, name): array for name, array in weights.items()}
    scales = _own_scales(model, weights, steps)
    return (
        _ranges_of_zeros(layers, own)
        | _scales_of_tied(named, layers, own)
        | {renamed.get(name, name): scale for name, scale in scales.items()}
    )


def _own_scales(
    model: ModelProto, weights: dict[str, NDArray[Any]], steps: Mapping[str, float]
) -> _Overrides:
    """The step as the scale, for weights that are whole multiples of one."""
    known = on_steps(model, {name: steps[name] for name in weights if name in steps})
    found: _Overrides = {}
    for name, array in weights.items():
        values = np.unique(array[array != 0])
        step: np.float32 | None = None
        if name in known and (scale := known[name].scale) is not None:
            step = np.float32(scale.item())
        elif 0 < values.size <= 2 * MOST_STEPS:
            step = step_of(values)
        if step is not None:
            found[name] = [{"scale": np.float32(step), "zero_point": np.int8(0)}]
    return found


def _channel_axis(layer: onnx.NodeProto) -> int:
    """The axis of a layer's weight along which its output channels lie."""
    if layer.op_type == "Conv" or (layer.op_type == "Gemm" and attribute(layer, "transB", 0)):
        return 0
    return -1 if layer.op_type == "MatMul" else 1


def _scales_of_tied(
    model: ModelProto, layers: list[onnx.NodeProto], weights: dict[str, NDArray[Any]]
) -> _Overrides:
    """One scale for a weight whose readers have their channels along different axes."""
    uses = Counter(name for node in nodes_in(model.graph.node) for name in node.input)
    axes: dict[str, list[int]] = {}
    for node in layers:
        name = node.input[1]
        axes.setdefault(name, []).append(_channel_axis(node) % max(weights[name].ndim, 1))
    found: _Overrides = {}
    for name, along in axes.items():
        largest = float(np.abs(weights[name]).max(initial=0.0))
        if largest and (len(set(along)) > 1 or uses[name] != len(along)):
            found[name] = [{"scale": np.float32(largest / 127), "zero_point": np.int8(0)}]
    return found


# what the quantizer puts behind a name to make another
_SUFFIX = re.compile(r"(_quantized|_scale|_zero_point|_(Q|Deq)uantizeLinear\w*|\d+)$")


def with_free_names(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """A copy in which no name is one that onnxruntime's quantizer would make of another.

    Returns:
        The copy; old name -> new one, where they differ.
    """
    result = ModelProto()
    result.CopyFrom(model)
    fixed = {value.name for value in (*model.graph.input, *model.graph.output)}
    made = [name for node in model.graph.node for name in node.output if name]
    names = [*(tensor.name for tensor in model.graph.initializer), *made]
    known = {*names, *fixed}
    if not any((end := _SUFFIX.search(name)) and name[: end.start()] in known for name in known):
        return result, {}
    free = (f"t{number}_v" for number in itertools.count())
    renamed = {
        name: next(new for new in free if new not in known) for name in names if name not in fixed
    }
    rename(result.graph, renamed)
    for tensor in result.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in result.graph.node:
        node.output[:] = [renamed.get(name, name) for name in node.output]
    return result, renamed


def _ranges_of_zeros(layers: list[onnx.NodeProto], weights: dict[str, NDArray[Any]]) -> _Overrides:
    """The median range for channels of zeros, in weights that have other channels, too."""
    found: _Overrides = {}
    for node in layers:
        if node.op_type == "MatMul":
            continue  # it has no bias
        name = node.input[1]
        axis = _channel_axis(node)
        rest = tuple(a for a in range(weights[name].ndim) if a != axis)
        largest = np.abs(weights[name]).max(axis=rest)
        if largest.all() or not largest.any():
            continue
        usual = float(np.median(largest[largest > 0]))
        ranges = np.where(largest > 0, largest, usual).tolist()
        found[name] = [{"rmin": -most, "rmax": most} for most in ranges]
        found[name][0]["axis"] = axis
    return found
