"""int8 by onnxruntime's own quantizer: static, QDQ, and float where int8 costs accuracy.

Activations are uint8, weights int8 with a scale for each output channel, zero stays zero. A weight
whose values are whole multiples of one step already, as after `compress`, keeps that step as its
scale. So its values do not change and stay few, which keeps the packed file small. A channel of
zeros gets a scale like its neighbours', not onnxruntime's 1, which would make its bias coarse.

Ranges of activations are measured once on calibration examples. Which layers stay float is decided
by the error on other examples: first the layer whose quantization changes the outputs most.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.graph.names import rename
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute, nodes_in
from prune2onnx.packing.quantized import MOST_STEPS, on_steps, step_of
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import MAX_DROP, Int8Options
from prune2onnx.runtime.compare import outputs_of

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
METHODS = get_args(get_type_hints(Int8Options)["method"])

Batches = Sequence[dict[str, NDArray[Any]]]
"""Batches: inputs by name."""


@dataclass(frozen=True)
class Layer:
    """The result for one layer.

    Attributes:
        weight: its weight's name.
        op: Conv, ConvTranspose, Gemm or MatMul.
        is_int8: whether it computes in int8 now.
        disturbance: mean squared change of the outputs, over their mean square, if this layer
            alone is int8; None where it was not needed.
        reason: why it stays float; "" for int8.
    """

    weight: str
    op: str
    is_int8: bool
    disturbance: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Int8:
    """A model in int8.

    Attributes:
        model: with QuantizeLinear and DequantizeLinear nodes; the float model where no layer could
            be int8.
        layers: in the order of the graph.
        float_error: the float model's error, by `evaluate`; None without it.
        error: that of `model`.
        tried: (number of float layers, error) of each model that was tried, fewest first.
    """

    model: ModelProto
    layers: tuple[Layer, ...]
    float_error: float | None = None
    error: float | None = None
    tried: tuple[tuple[int, float], ...] = ()


def quantize_int8(
    model: ModelProto,
    calibration: Batches,
    *,
    method: str = Int8Options.method,
    evaluate: Callable[[ModelProto], float] | None = None,
    max_drop: float = MAX_DROP,
    unit: str = "points",
    keep: Collection[str] = (),
    steps: Mapping[str, float] | None = None,
) -> Int8:
    """Quantizes a model's layers, and the operators between them, to int8.

    Args:
        model: float32; not modified. A packed one is unpacked first.
        calibration: examples for the ranges of activations.
        method: onnxruntime's method for the ranges: "minmax", "entropy" or "percentile".
        evaluate: a model -> its error. Layers stay float until int8 adds at most `max_drop` to it;
            without it all layers are int8.
        max_drop: how much int8 may add to the error.
        unit: of the error, for messages.
        keep: weights of layers that stay float in any case.
        steps: weight -> its step, where it is known; for other weights it is searched for.

    Raises:
        RecipeError: an unknown method, a weight that no layer has, no calibration example.
        Prune2OnnxError: the model has no layer to quantize, or onnxruntime cannot quantize it.
    """
    if method not in METHODS:
        raise RecipeError(f"calibration method {method!r}, expected {', '.join(METHODS)}")
    if not calibration:
        raise RecipeError("no calibration example; give some with --data")
    given = normalize(unpack(model)).model
    with tempfile.TemporaryDirectory() as folder:
        subject = _Subject(given, calibration, method, Path(folder), steps or {})
        if unknown := set(keep) - subject.weights.keys():
            raise RecipeError(
                f"no layer has the weight {min(unknown)!r}; known are {', '.join(subject.weights)}"
            )
        return _chosen(subject, evaluate, max_drop, unit, set(keep))


def _chosen(
    subject: _Subject,
    evaluate: Callable[[ModelProto], float] | None,
    max_drop: float,
    unit: str,
    kept: set[str],
) -> Int8:
    # the scale of a bias is derived from that of its weight: an all-zero weight has none
    zeros = dict.fromkeys(subject.zeros, "all its weights are zero")
    groups = dict.fromkeys(subject.grouped, "no scale per channel for a ConvTranspose with groups")
    reasons = zeros | groups | dict.fromkeys(kept, "as asked")
    kept = set(reasons)
    try:
        made = subject.quantized(kept)
    except Prune2OnnxError:
        refused = subject.refused(kept)
        if len(refused) + len(kept) == len(subject.weights):
            raise
        reasons |= refused
        kept = set(reasons)
        made = subject.quantized(kept)
    if evaluate is None:
        return Int8(made, subject.layers(reasons, {}))
    before, error = evaluate(subject.model), evaluate(made)
    tried = {len(kept): error}
    disturbance: dict[str, float] = {}
    if error > before + max_drop:
        others = [weight for weight in subject.weights if weight not in kept]
        disturbance = {weight: subject.disturbance(weight) for weight in others}
        ranked = sorted(others, key=lambda weight: -disturbance[weight])
        few, many = 0, len(ranked)  # float layers: `few` are too few, `many` are enough
        made, error = subject.model, before
        while many - few > 1:
            middle = (few + many) // 2
            trial = subject.quantized(kept | set(ranked[:middle]))
            found = tried[len(kept) + middle] = evaluate(trial)
            if found <= before + max_drop:
                many, made, error = middle, trial, found
            else:
                few = middle
        reasons |= dict.fromkeys(ranked[:many], f"int8 would cost more than {max_drop:g} {unit}")
    layers = subject.layers(reasons, disturbance)
    return Int8(made, layers, before, error, tuple(sorted(tried.items())))


class _Subject:
    """A model that is being quantized.

    Args:
        model: normalized.
        calibration: examples.
        method: for the ranges of activations.
        folder: for files of the quantizer.
        steps: weight -> its step, where it is known.
    """

    def __init__(
        self,
        model: ModelProto,
        calibration: Batches,
        method: str,
        folder: Path,
        steps: Mapping[str, float],
    ) -> None:
        self.model = model
        self._calibration, self._method, self._folder = calibration, method, folder
        self._named, renamed = _with_free_names(model)
        for number, node in enumerate(self._named.graph.node):
            node.name = f"n{number}"
        stored = {tensor.name: tensor for tensor in self._named.graph.initializer}
        found = [
            node
            for node in self._named.graph.node
            if node.op_type in LAYERS
            and node.domain in DEFAULT_DOMAINS
            and len(node.input) > 1
            and node.input[1] in stored
            and stored[node.input[1]].data_type == onnx.TensorProto.FLOAT
        ]
        if not found:
            inner = sum(node.op_type in LAYERS for node in nodes_in(model.graph.node))
            inner -= sum(node.op_type in LAYERS for node in model.graph.node)
            bodies = f"; {inner} are in bodies of If, Loop or Scan, which it skips" if inner else ""
            raise Prune2OnnxError(
                "no layer that onnxruntime's quantizer could do; expected a "
                f"{', '.join(LAYERS)} with a float32 weight in the main graph{bodies}"
            )
        own = {new: old for old, new in renamed.items()}
        self.weights: dict[str, list[str]] = {}
        self._ops: dict[str, str] = {}
        self.grouped: set[str] = set()
        for node in found:
            name = own.get(node.input[1], node.input[1])
            self._ops[name] = node.op_type
            self.weights.setdefault(name, []).append(node.name)
            if node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1:
                self.grouped.add(name)
        arrays = {
            name: numpy_helper.to_array(stored[renamed.get(name, name)]) for name in self.weights
        }
        self.zeros = {name for name, array in arrays.items() if not array.any()}
        by_own = {renamed.get(name, name): array for name, array in arrays.items()}
        scales = _own_scales(model, arrays, steps)
        self._overrides = (
            _ranges_of_zeros(found, by_own)
            | _scales_of_tied(self._named, found, by_own)
            | {renamed.get(name, name): scale for name, scale in scales.items()}
        )
        self._outputs = self._answers(model)

    def layers(self, reasons: dict[str, str], disturbance: dict[str, float]) -> tuple[Layer, ...]:
        """One for each weight; those with a reason are float."""
        return tuple(
            Layer(
                name,
                self._ops[name],
                name not in reasons,
                disturbance.get(name),
                reasons.get(name, ""),
            )
            for name in self.weights
        )

    def disturbance(self, weight: str) -> float:
        """`Layer.disturbance` of one layer."""
        made = self._answers(self._made(nodes_to_quantize=self.weights[weight]))
        pairs = list(zip(made, self._outputs, strict=True))
        change = sum(float(np.square(a - b).sum()) for a, b in pairs)
        return change / max(sum(float(np.square(b).sum()) for _, b in pairs), 1e-30)

    def refused(self, kept: Collection[str]) -> dict[str, str]:
        """The layers that onnxruntime's quantizer fails on, and why; `kept` are not tried."""
        found = {}
        for weight in self.weights.keys() - set(kept):
            try:
                self._made(nodes_to_quantize=self.weights[weight])
            except Prune2OnnxError as error:
                found[weight] = str(error)
        return found

    def quantized(self, floats: Collection[str]) -> ModelProto:
        """The model in int8, except the layers with these weights."""
        if set(floats) >= self.weights.keys():
            return self.model
        nodes = [name for weight in floats for name in self.weights[weight]]
        return self._made(nodes_to_exclude=nodes)

    def _made(self, **which: list[str]) -> ModelProto:
        from onnxruntime import quantization as ort

        methods = {
            "minmax": ort.CalibrationMethod.MinMax,
            "entropy": ort.CalibrationMethod.Entropy,
            "percentile": ort.CalibrationMethod.Percentile,
        }
        given = ModelProto()
        given.CopyFrom(self._named)  # the quantizer moves the weights out of the model it is given
        target = self._folder / "int8.onnx"
        with _silence():
            try:
                ort.quantize_static(
                    given,
                    target,
                    _reader(self._calibration),
                    per_channel=True,
                    activation_type=ort.QuantType.QUInt8,
                    weight_type=ort.QuantType.QInt8,
                    calibrate_method=methods[self._method],
                    calibration_cache_path=self._folder / "ranges.json",
                    extra_options={"TensorQuantOverrides": self._overrides},
                    **which,
                )
            except Exception as error:  # it raises any type of error
                raise Prune2OnnxError(
                    f"onnxruntime cannot quantize the model: {one_line(error)[:300]}"
                ) from error
        result: ModelProto = onnx.load(target)
        for node in result.graph.node:
            node.ClearField("name")
        return result

    def _answers(self, model: ModelProto) -> list[NDArray[np.float64]]:
        answers = outputs_of(model, self._calibration[:2])
        return [np.asarray(answer, np.float64) for answer in answers]


_Overrides = dict[str, list[dict[str, Any]]]
"""Settings of onnxruntime's quantizer: weight -> one entry, or one for each channel."""


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


def _with_free_names(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
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


def _reader(batches: Batches) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self._left, None)

    return Reader()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hides the quantizer's prints, and its advice, which is followed already."""
    logger, before = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
