"""int8 by onnxruntime's own quantizer: static, QDQ, and float where int8 costs accuracy.

Matrices may compute otherwise (`packing.compute`): then only convolutions, and what is computed
between them, have fixed ranges.

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
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute, nodes_in
from prune2onnx.packing.compute.narrow import Compute, narrowed, weights_of
from prune2onnx.packing.compute.recurrent import OTHER, recurrent
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import MAX_DROP, Int8Options
from prune2onnx.runtime.compare import outputs_of
from prune2onnx.runtime.int8_settings import overrides, with_free_names

CONVOLUTIONS = ("Conv", "ConvTranspose")
LAYERS = (*CONVOLUTIONS, "Gemm", "MatMul")
METHODS = get_args(get_type_hints(Int8Options)["method"])

Batches = Sequence[dict[str, NDArray[Any]]]
"""Batches: inputs by name."""


@dataclass(frozen=True)
class Layer:
    """The result for one layer.

    Attributes:
        weight: its weight's name.
        op: Conv, ConvTranspose, Gemm, MatMul, LSTM, or Gather of a table.
        is_int8: whether it computes in int8 now, or in the narrow type that was asked for.
        disturbance: mean squared change of the outputs, over their mean square, if this layer
            alone is int8; None where it was not needed.
        reason: why it stays float; "" for int8.
        compute: "float32"; "static", which is int8 with fixed ranges; or as of `packing.compute`.
    """

    weight: str
    op: str
    is_int8: bool
    disturbance: float | None = None
    reason: str = ""
    compute: str = "static"


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
    compute: Compute | Literal["static"] = "static",
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
        compute: what matrices and tables compute in; "static": as convolutions.

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
        subject = _Subject(given, calibration, method, Path(folder), steps or {}, compute)
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
        compute: of matrices.
    """

    def __init__(
        self,
        model: ModelProto,
        calibration: Batches,
        method: str,
        folder: Path,
        steps: Mapping[str, float],
        compute: Compute | Literal["static"],
    ) -> None:
        self.model = model
        self._compute: Compute = "float32" if compute == "static" else compute
        self._ops = LAYERS if compute == "static" else CONVOLUTIONS
        self._calibration, self._method, self._folder = calibration, method, folder
        self._named, renamed = with_free_names(model)
        for number, node in enumerate(self._named.graph.node):
            node.name = f"n{number}"
        stored = {tensor.name: tensor for tensor in self._named.graph.initializer}
        found = [
            node
            for node in self._named.graph.node
            if node.op_type in self._ops
            and node.domain in DEFAULT_DOMAINS
            and len(node.input) > 1
            and node.input[1] in stored
            and stored[node.input[1]].data_type == onnx.TensorProto.FLOAT
        ]
        own = {new: old for old, new in renamed.items()}
        self._renamed = renamed
        self._matrices = weights_of(model, self._compute)
        pairs = [lstm.names for lstm in recurrent(model)[0]] if self._compute == "int8" else []
        self._others = dict(pairs) | {second: first for first, second in pairs}
        if not found and not self._matrices:
            raise Prune2OnnxError(_nothing(model, compute))
        self.weights: dict[str, list[str]] = {}
        self._op_of: dict[str, str] = {}
        self.grouped: set[str] = set()
        for node in found:
            name = own.get(node.input[1], node.input[1])
            self._op_of[name] = node.op_type
            self.weights.setdefault(name, []).append(node.name)
            if node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1:
                self.grouped.add(name)
        arrays = {
            name: numpy_helper.to_array(stored[renamed.get(name, name)]) for name in self.weights
        }
        self.weights |= {name: [] for name in self._matrices}
        self._op_of |= self._matrices
        self.zeros = {name for name, array in arrays.items() if not array.any()}
        self._overrides = overrides(model, self._named, found, arrays, renamed, steps)
        self._outputs = self._answers(model)

    def layers(self, reasons: dict[str, str], disturbance: dict[str, float]) -> tuple[Layer, ...]:
        """One for each weight; those with a reason are float."""
        whole = {name: OTHER for name, other in self._others.items() if other in reasons} | reasons
        return tuple(
            Layer(
                name,
                self._op_of[name],
                name not in whole,
                disturbance.get(name),
                whole.get(name, ""),
                "float32" if name in whole else self._type_of(name),
            )
            for name in self.weights
        )

    def _type_of(self, weight: str) -> str:
        return self._compute if weight in self._matrices else "static"

    def disturbance(self, weight: str) -> float:
        """`Layer.disturbance` of one layer."""
        if weight in self._matrices:
            alone = self._narrowed(self.model, self._matrices.keys() - {weight})
        else:
            alone = self._made(nodes_to_quantize=self.weights[weight])
        made = self._answers(alone)
        pairs = list(zip(made, self._outputs, strict=True))
        change = sum(float(np.square(a - b).sum()) for a, b in pairs)
        return change / max(sum(float(np.square(b).sum()) for _, b in pairs), 1e-30)

    def refused(self, kept: Collection[str]) -> dict[str, str]:
        """The layers that onnxruntime's quantizer fails on, and why; `kept` are not tried."""
        found = {}
        for weight in self.weights.keys() - set(kept) - self._matrices.keys():
            try:
                self._made(nodes_to_quantize=self.weights[weight])
            except Prune2OnnxError as error:
                found[weight] = str(error)
        return found

    def quantized(self, floats: Collection[str]) -> ModelProto:
        """The model in int8, except the layers with these weights."""
        static = [name for name in self.weights if name not in self._matrices]
        floated = [node for name in static if name in floats for node in self.weights[name]]
        chosen = [node for name in static if name not in floats for node in self.weights[name]]
        made = self.model
        if chosen and self._ops == LAYERS:
            made = self._made(nodes_to_exclude=floated)
        elif chosen:
            made = self._made(nodes_to_quantize=_with_between(self._named, chosen))
        return self._narrowed(made, self._matrices.keys() & set(floats))

    def _narrowed(self, model: ModelProto, floats: Collection[str]) -> ModelProto:
        """A model, quantized or not, with its matrices narrow, except some."""
        names = {} if model is self.model else self._renamed
        return narrowed(
            model, self._compute, keep={names.get(name, name): "" for name in floats}
        ).model

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


def _nothing(model: ModelProto, compute: str) -> str:
    """Why a model has nothing to quantize."""
    if compute != "static":
        return (
            "no layer to quantize; expected a convolution with a float32 weight in the main graph"
            + (", or a matrix or table that can stay narrow" if compute != "float32" else "")
        )
    inner = sum(node.op_type in LAYERS for node in nodes_in(model.graph.node))
    inner -= sum(node.op_type in LAYERS for node in model.graph.node)
    bodies = f"; {inner} are in bodies of If, Loop or Scan, which it skips" if inner else ""
    return (
        "no layer that onnxruntime's quantizer could do; expected a "
        f"{', '.join(LAYERS)} with a float32 weight in the main graph{bodies}"
    )


def _with_between(model: ModelProto, layers: Collection[str]) -> list[str]:
    """Convolutions, and the nodes on ways from one to the other that no matrix lies on.

    Args:
        model: with names of nodes, in topological order.
        layers: names of the convolutions.
    """
    nodes = [node for node in model.graph.node if node.op_type not in ("Gemm", "MatMul")]
    behind = {name for node in nodes if node.name in layers for name in node.output}
    after = set()
    for node in nodes:
        if behind.intersection(node.input):
            after.add(node.name)
            behind.update(node.output)
    before: set[str] = set()
    read = {name for node in nodes if node.name in layers for name in node.input}
    for node in reversed(nodes):
        if read.intersection(node.output):
            before.add(node.name)
            read.update(node.input)
    return [n.name for n in nodes if n.name in layers or n.name in after & before]


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
