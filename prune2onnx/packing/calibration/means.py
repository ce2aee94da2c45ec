"""The mean of a layer's inputs, as far as the graph itself tells it; without examples.

A normalization's outputs have the mean and the spread that its bias and factor say, and what
follows element by element is known, too, with values taken for normally distributed. Where weights
are rounded, the mean of a layer's outputs moves by mean(x) dW, and a bias takes that back (Nagel et
al., arXiv 1906.04721, section 4.2). Means that are carried on through linear layers, as if their
inputs were independent, made errors larger on every network that was tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto
from scipy.special import ndtri

from prune2onnx.graph.tensors import array_of, evaluated
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute, is_constant, opset
from prune2onnx.packing.approximation.candidates import Written
from prune2onnx.packing.approximation.subject import Subject
from prune2onnx.packing.calibration.layers import Layer, layers_of

_POINTS = 101  # quantiles of a distribution
_NORMAL = ndtri((np.arange(_POINTS) + 0.5) / _POINTS)[:, None]
_CHANNELS = {"BatchNormalization": 1, "InstanceNormalization": 1, "LayerNormalization": -1}
"""Normalizations with factor and bias as inputs 1 and 2, and the axis of their channels."""

_POINTWISE = {
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Gelu", "Sigmoid"),
    *("HardSigmoid", "HardSwish", "Softplus", "Softsign", "Tanh", "Mish", "Swish", "Erf", "Clip"),
    *("Neg", "Abs", "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Identity"),
}


@dataclass(frozen=True, eq=False)
class _Spread:
    """How a value's elements are distributed.

    Attributes:
        points: [quantiles, channels]; those of one quantile belong together, also in other values
            with the same root.
        axis: of the channels in the value: 1, or -1 for the last one.
        root: what it was made of, element by element.
    """

    points: NDArray[np.float64]
    axis: int
    root: str

    @property
    def mean(self) -> NDArray[np.float64]:
        """[channels]."""
        found: NDArray[np.float64] = self.points.mean(0)
        return found


class Means:
    """What a graph tells of the means of its layers' inputs.

    Args:
        subject: the model, in which weights change.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def shifts(self, written: Mapping[str, Written]) -> dict[str, NDArray[Any]]:
        """What biases become where weights change, by their names.

        A bias that no layer of known inputs adds to stays as it is.
        """
        found = {}
        for layer, mean in self._known:
            if layer.name in written:
                off = layer.values_of(written[layer.name].array) - layer.values()
                change = -np.einsum("gi,gio->go", mean, off)
                found[layer.bias] = layer.with_bias(self._arrays[layer.bias], change)
        return found

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        wanted = {layer.bias for layer, _ in self._known}
        return {
            tensor.name: array_of(tensor)
            for tensor in self._subject.model.graph.initializer
            if tensor.name in wanted
        }

    @cached_property
    def _known(self) -> list[tuple[Layer, NDArray[np.float64]]]:
        """Layers with a bias, and the means of their inputs, [groups, inputs]."""
        spreads = _Spreads(self._subject)
        found = []
        for layer in spreads.layers:
            spread = spreads.read_by(layer)
            if layer.bias and spread is not None:
                found.append((layer, spread.mean.reshape(layer.shape[0], -1)))
        return found


class _Spreads:
    """The distributions of all values that are known."""

    def __init__(self, subject: Subject) -> None:
        model = subject.model
        self._model, self._version = model, opset(model.opset_import) or 0
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._at: dict[str, _Spread] = {}
        every = [one for one in layers_of(subject) if not one.is_table and len(one.uses) == 1]
        self.layers = [one for one in every if not one.uses[0].path]
        for node in model.graph.node:
            if is_constant(node) and (value := attribute(node, "value")) is not None:
                self._stored[node.output[0]] = value
            found = self._made(node)
            if found is not None:
                self._at[node.output[0]] = found

    def read_by(self, layer: Layer) -> _Spread | None:
        """The inputs of a layer, one channel for each; None where they are not known."""
        use = layer.uses[0]
        node = self._model.graph.node[use.at]
        spread = self._at.get(use.source)
        if spread is None or node.op_type not in ("Conv", "Gemm", "MatMul"):
            return None
        axis = 1 if node.op_type == "Conv" else -1
        if node.input[0] != use.source or attribute(node, "transA", 0):
            return None
        if spread.axis != axis and node.op_type != "Gemm":  # of two axes, 1 is the last one
            return None
        groups, inputs, _ = layer.shape
        taps, rest = divmod(groups * inputs, spread.points.shape[1])
        if rest:
            return None
        return _Spread(np.repeat(spread.points, taps, axis=1), axis, spread.root)

    def _made(self, node: NodeProto) -> _Spread | None:
        if node.domain not in DEFAULT_DOMAINS or not node.output:
            return None
        if node.op_type in _CHANNELS:
            return self._normalized(node, _CHANNELS[node.op_type])
        return self._pointwise(node) if node.op_type in _POINTWISE else None

    def _normalized(self, node: NodeProto, axis: int) -> _Spread | None:
        last = node.op_type == "LayerNormalization"
        if last and attribute(node, "axis", -1) != -1:
            return None
        factor, bias = (self._vector(name) for name in (*node.input[1:3], "")[:2])
        if factor is None:
            return None
        mean = np.zeros(len(factor)) if bias is None else bias
        return _Spread(mean + _NORMAL * np.abs(factor), axis, node.output[0])

    def _pointwise(self, node: NodeProto) -> _Spread | None:
        known = [self._at[name] for name in node.input if name in self._at]
        if not known or len({one.root for one in known}) > 1:
            return None
        first = known[0]
        given: dict[str, NDArray[Any]] = {}
        for name in filter(None, node.input):
            array = self._at[name].points if name in self._at else self._constant(name, first)
            if array is None:
                return None
            given[name] = array.astype(np.float32)
        made = evaluated([node], given, node.output[0], self._version)
        if made.shape != first.points.shape or not np.isfinite(made).all():
            return None
        return _Spread(made.astype(np.float64), first.axis, first.root)

    def _vector(self, name: str) -> NDArray[np.float64] | None:
        tensor = self._stored.get(name)
        return None if tensor is None else array_of(tensor).reshape(-1).astype(np.float64)

    def _constant(self, name: str, like: _Spread) -> NDArray[Any] | None:
        """A stored number, or one for each channel; None where it is neither."""
        tensor = self._stored.get(name)
        if tensor is None:
            return None
        array, channels = array_of(tensor), like.points.shape[1]
        if array.size == 1:
            return array.reshape(())
        behind = array.shape[array.ndim - 1 :] if like.axis == -1 else array.shape[-3:]
        wanted = (channels,) if like.axis == -1 else (channels, 1, 1)
        if array.size != channels or behind != wanted:
            return None
        return array.reshape(1, channels)
