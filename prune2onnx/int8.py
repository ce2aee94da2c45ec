"""int8 by onnxruntime's own quantizer: static, QDQ, and float where int8 costs accuracy.

Activations are uint8, weights int8 with a scale for each output channel, zero stays zero. A weight
that is whole multiples of one step already (`compress` leaves it so) keeps that step as its scale,
so its values stay exactly what they were, and few: the packed file stays small. A channel of zeros
gets a scale like its neighbours', not onnxruntime's 1, which would tell its bias in coarse steps.

Ranges of activations are measured once on calibration examples; which layers stay float is decided
by the error on others: the layer whose own quantisation disturbs the outputs most goes first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.graphs import DEFAULT_DOMAINS
from prune2onnx.intake import plain
from prune2onnx.pack import unpack
from prune2onnx.quantize import MOST_STEPS, step_of
from prune2onnx.running import run_once, session

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
METHODS = ("minmax", "entropy", "percentile")
MAX_DROP = 0.1
"""Points of error that int8 may add where nobody says more or less."""

Batches = Sequence[dict[str, NDArray[Any]]]
"""Inputs by name, a batch each."""


@dataclass(frozen=True)
class Layer:
    """What became of one layer.

    Attributes:
        weight: its weight's name.
        op: Conv, ConvTranspose, Gemm or MatMul.
        is_int8: whether it computes in int8 now.
        disturbance: mean squared change of the outputs, over their mean square, where this layer
            alone is int8; None where nobody had to know.
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
        float_error: of the model as it was, by `evaluate`; None without it.
        error: of `model`.
    """

    model: ModelProto
    layers: tuple[Layer, ...]
    float_error: float | None = None
    error: float | None = None


def quantize_int8(
    model: ModelProto,
    calibration: Batches,
    *,
    method: str = "minmax",
    evaluate: Callable[[ModelProto], float] | None = None,
    max_drop: float = MAX_DROP,
    keep: Collection[str] = (),
) -> Int8:
    """Quantises a model's layers and what lies between them to int8.

    Args:
        model: float32; not modified. A packed one is unpacked first.
        calibration: examples that the ranges of activations are taken from.
        method: how: "minmax", "entropy" or "percentile" (onnxruntime's).
        evaluate: a model -> its error; layers stay float until it is met. Without it all are int8.
        max_drop: what int8 may add to that error.
        keep: weights of layers that stay float whatever they cost.

    Raises:
        RecipeError: an unknown method, a weight that no layer has, no calibration example.
        Prune2OnnxError: the model has no layer to quantise, or onnxruntime cannot.
    """
    if method not in METHODS:
        raise RecipeError(f"calibration method {method!r}, expected {', '.join(METHODS)}")
    if not calibration:
        raise RecipeError("no calibration example; give some with --data")
    given = plain(unpack(model)).model
    with tempfile.TemporaryDirectory() as folder:
        subject = _Subject(given, calibration, method, Path(folder))
        if unknown := set(keep) - subject.weights.keys():
            raise RecipeError(
                f"no layer has the weight {min(unknown)!r}; there are {', '.join(subject.weights)}"
            )
        return _chosen(subject, evaluate, max_drop, set(keep))


def _chosen(
    subject: _Subject,
    evaluate: Callable[[ModelProto], float] | None,
    max_drop: float,
    kept: set[str],
) -> Int8:
    # where nothing is multiplied, no scale is fit for the bias
    zeros = dict.fromkeys(subject.zeros, "all its weights are zero")
    told = zeros | dict.fromkeys(kept, "as asked")
    kept = set(told)
    made = subject.quantized(kept)
    if evaluate is None:
        return Int8(made, subject.layers(told, {}))
    before, error = evaluate(subject.model), evaluate(made)
    disturbance: dict[str, float] = {}
    if error > before + max_drop:
        others = [weight for weight in subject.weights if weight not in kept]
        disturbance = {weight: subject.disturbance(weight) for weight in others}
        ranked = sorted(others, key=lambda weight: -disturbance[weight])
        few, many = 0, len(ranked)  # so many are too few; so many are enough
        made, error = subject.model, before
        while many - few > 1:
            middle = (few + many) // 2
            trial = subject.quantized(kept | set(ranked[:middle]))
            if (found := evaluate(trial)) <= before + max_drop:
                many, made, error = middle, trial, found
            else:
                few = middle
        told |= dict.fromkeys(ranked[:many], f"int8 would cost more than {max_drop:g} points")
    return Int8(made, subject.layers(told, disturbance), before, error)


class _Subject:
    """A model whose activations have been measured.

    Args:
        model: plain.
        calibration: examples.
        method: of the measurement.
        folder: for files of the quantizer.
    """

    def __init__(self, model: ModelProto, calibration: Batches, method: str, folder: Path) -> None:
        self.model = model
        self._calibration, self._method, self._folder = calibration, method, folder
        self._named = ModelProto()
        self._named.CopyFrom(model)
        for number, node in enumerate(self._named.graph.node):
            node.name = f"n{number}"
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
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
            raise Prune2OnnxError(
                f"no layer to quantise; expected a {', '.join(LAYERS)} with a float32 weight"
            )
        self.weights: dict[str, list[str]] = {}
        self._ops = {node.input[1]: node.op_type for node in found}
        for node in found:
            self.weights.setdefault(node.input[1], []).append(node.name)
        arrays = {name: numpy_helper.to_array(stored[name]) for name in self.weights}
        self.zeros = {name for name, array in arrays.items() if not array.any()}
        self._overrides = _ranges_of_zeros(found, arrays) | _own_scales(arrays)
        self._outputs = self._answers(model)

    def layers(self, told: dict[str, str], disturbance: dict[str, float]) -> tuple[Layer, ...]:
        """One for each weight."""
        return tuple(
            Layer(
                name, self._ops[name], name not in told, disturbance.get(name), told.get(name, "")
            )
            for name in self.weights
        )

    def disturbance(self, weight: str) -> float:
        """What int8 of one layer alone does to the outputs."""
        made = self._answers(self._made(nodes_to_quantize=self.weights[weight]))
        pairs = list(zip(made, self._outputs, strict=True))
        change = sum(float(np.square(a - b).sum()) for a, b in pairs)
        return change / max(sum(float(np.square(b).sum()) for _, b in pairs), 1e-30)

    def quantized(self, floats: Collection[str]) -> ModelProto:
        """The model in int8, but for the layers with these weights."""
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
        given.CopyFrom(self._named)  # the quantizer moves its weights elsewhere
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
            except Exception as error:  # it raises whatever it meets
                raise Prune2OnnxError(
                    f"onnxruntime cannot quantise the model: {one_line(error)[:300]}"
                ) from error
        result: ModelProto = onnx.load(target)
        for node in result.graph.node:
            node.ClearField("name")
        return result

    def _answers(self, model: ModelProto) -> list[NDArray[np.float64]]:
        opened = session(model)
        batches = self._calibration[:2]
        answers = [out for given in batches for out in run_once(opened, given, Path("the model"))]
        return [np.asarray(answer, np.float64) for answer in answers]


_Overrides = dict[str, list[dict[str, Any]]]
"""What onnxruntime's quantizer shall take for a weight: an entry, or one for each channel."""


def _own_scales(weights: dict[str, NDArray[Any]]) -> _Overrides:
    """The steps of those weights that are whole multiples of one."""
    found: _Overrides = {}
    for name, array in weights.items():
        values = np.unique(array[array != 0])
        step = step_of(values) if 0 < values.size <= 2 * MOST_STEPS else None
        if step is not None:
            found[name] = [{"scale": np.float32(step), "zero_point": np.int8(0)}]
    return found


def _ranges_of_zeros(layers: list[onnx.NodeProto], weights: dict[str, NDArray[Any]]) -> _Overrides:
    """For weights with channels of zeros beside others: the usual range, for those channels."""
    found: _Overrides = {}
    for node in layers:
        if node.op_type == "MatMul":
            continue  # it has no bias
        name = node.input[1]
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else 1
        rest = tuple(a for a in range(weights[name].ndim) if a != axis)
        largest = np.abs(weights[name]).max(axis=rest)
        if largest.all() or not largest.any():
            continue
        usual = float(np.median(largest[largest > 0]))
        found[name] = [{} if most else {"rmin": -usual, "rmax": usual} for most in largest]
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
    """Keeps the quantizer's advice, which is followed already, and its prints to itself."""
    logger, before = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
