"""Rewrites a model so that its matrices compute in int8 or int4, or are read from int8 or int4.

The forms are those that onnxruntime has fast kernels for:

- int8: DynamicQuantizeLinear, MatMulInteger, Cast and Mul, which it fuses to DynamicQuantizeMatMul
  and MatMulIntegerToFloat. Activations are rounded to 8 bits too, with one scale for all of them.
  DynamicQuantizeLSTM for LSTM: see `recurrent`.
- int8-weights and int4: MatMulNBits of com.microsoft, which rounds activations in blocks.
- Of tables, the rows that are looked up are made float, and no others.

A weight's codes have its name; its scales, one for each output or block, are a second initializer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from prune2onnx.graph.names import Names
from prune2onnx.graph.protobuf import copy_but, keep
from prune2onnx.graph.protobuf import tensor as stored
from prune2onnx.graph.tensors import array_of
from prune2onnx.graph.walk import attribute
from prune2onnx.packing.compute.codes import BLOCK, blobs, in_blocks, in_bytes, wide_block
from prune2onnx.packing.compute.recurrent import in_int8, recurrent
from prune2onnx.packing.compute.uses import Narrowable, Use, narrowable
from prune2onnx.packing.quantized import Quantized

Compute = Literal["float32", "int8", "int8-weights", "int4"]
"""What a layer's weight is while a session runs."""

_ACCURACY = 4  # of MatMulNBits: activations may be rounded to int8
_CONTRIB = "com.microsoft"
_WORTH_A_NOTE = 0.005  # share of the elements


@dataclass(frozen=True)
class Layer:
    """What a weight is at run time.

    Attributes:
        name: of the weight.
        compute: what its layer computes in.
        size: its elements.
        reason: why that is float32 though narrower was asked for; "" otherwise.
    """

    name: str
    compute: Compute
    size: int
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A model that computes in narrow types.

    Attributes:
        model: the model.
        layers: one for each matrix of floats, in the order of the initializers.
        quantized: as it was given, of the weights that are still float.
    """

    model: ModelProto
    layers: tuple[Layer, ...]
    quantized: Mapping[str, Quantized] = field(default_factory=dict)

    @property
    def narrow(self) -> list[str]:
        """The weights that are not float."""
        return [layer.name for layer in self.layers if layer.compute != "float32"]

    @property
    def notes(self) -> tuple[str, ...]:
        """What computes in what, and why the rest does not, in words; () if none was to."""
        if not self.layers:
            return ()
        total = max(sum(layer.size for layer in self.layers), 1)
        made = [layer for layer in self.layers if layer.compute != "float32"]
        compute = made[0].compute if made else ""
        share = sum(layer.size for layer in made) / total
        notes = [f"{len(made)} of {len(self.layers)} matrices compute in {compute} ({share:.1%})"]
        if not made:
            notes = ["no matrix computes in a narrower type"]
        left: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if layer.reason:
                left.setdefault(layer.reason, []).append(layer)
        for reason, layers in left.items():
            share = sum(layer.size for layer in layers) / total
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            if share >= _WORTH_A_NOTE:
                notes.append(f"{share:.1%} stay float32: {layers[0].name}{more}: {reason}")
        return tuple(notes)


def narrowed(
    model: ModelProto,
    compute: Compute,
    quantized: Mapping[str, Quantized] | None = None,
    keep: Mapping[str, str] | None = None,
) -> Narrowed:
    """A model whose matrices stay narrow at run time, as far as they can.

    Args:
        model: unpacked and normalized; not modified.
        compute: what layers compute in.
        quantized: weights that are on few levels already: where these fit into 8 bits with a scale
            for each output, they are what computes; others are rounded to the nearest.
        keep: weights that stay float in any case, and why.
    """
    quantized, keep = quantized or {}, keep or {}
    if compute == "float32":
        return Narrowed(model, (), quantized)
    lstms, why = recurrent(model, keep)
    made: set[str] = set()
    source = model
    if compute == "int8" and lstms:
        source = in_int8(model, lstms, quantized)
        made.update(name for lstm in lstms for name in lstm.names)
    else:
        why |= {name: _NO_KERNEL for lstm in lstms for name in lstm.names}
    able, reasons = narrowable(source)
    able = [one for one in able if one.tensor.name not in keep]
    result = _Rewrite(source, compute, able, quantized).result()
    made.update(one.tensor.name for one in able)
    reasons |= {**why, **keep}
    layers = []
    for tensor in model.graph.initializer:
        size = math.prod(tensor.dims)
        if tensor.name in made:
            layers.append(Layer(tensor.name, compute, size))
        elif tensor.name in reasons:
            layers.append(Layer(tensor.name, "float32", size, reasons[tensor.name]))
    left = {name: known for name, known in quantized.items() if name not in made}
    return Narrowed(result, tuple(layers), left)


_NO_KERNEL = "read by LSTM, for which onnxruntime has a kernel in int8 alone"


def weights_of(model: ModelProto, compute: Compute) -> dict[str, str]:
    """The weights that can be narrow, and the operator that reads each.

    Args:
        model: unpacked and normalized.
        compute: what they would compute in.
    """
    if compute == "float32":
        return {}
    found = {one.tensor.name: str(one.uses[0].node.op_type) for one in narrowable(model)[0]}
    if compute == "int8":
        found |= {name: "LSTM" for lstm in recurrent(model)[0] for name in lstm.names}
    return found


class _Rewrite:
    """A copy of a model in which some weights are narrow."""

    def __init__(
        self,
        model: ModelProto,
        compute: Compute,
        able: Sequence[Narrowable],
        quantized: Mapping[str, Quantized],
    ) -> None:
        self._given, self._compute = model, compute
        self._names = Names(model)
        self._added: list[TensorProto] = []
        self._stored: dict[tuple[str, str], str] = {}  # weight, what of it -> its name
        self._rounded: dict[str, tuple[str, ...]] = {}  # activations -> codes, scale, zero point
        self._codes = {one.tensor.name: self._coded(one, quantized) for one in able}
        self._uses = {use.at: (use, one.tensor.name) for one in able for use in one.uses}

    def _coded(self, one: Narrowable, quantized: Mapping[str, Quantized]) -> _Codes:
        array = array_of(one.tensor)
        rows = array if one.axis == 0 else np.ascontiguousarray(array.T)
        known = quantized.get(one.tensor.name)
        if known is not None and one.axis == 1:
            known = _turned(known)
        coded = in_blocks if self._compute == "int4" else in_bytes
        codes, scales = coded(rows, known)
        return _Codes(one.tensor.name, one.axis, codes, scales)

    def result(self) -> ModelProto:
        """The rewritten model."""
        model = ModelProto()
        copy_but(model, self._given, "graph")
        graph = self._given.graph
        copy_but(model.graph, graph, "initializer", "node")
        for at, node in enumerate(graph.node):
            if at in self._uses:
                use, name = self._uses[at]
                model.graph.node.extend(self._instead(use, self._codes[name]))
            else:
                model.graph.node.append(node)
        for tensor in graph.initializer:
            if tensor.name not in self._codes:
                model.graph.initializer.append(tensor)
        model.graph.initializer.extend(self._added)
        # transposed weights that nothing reads any more
        gone = {use.behind.output[0] for use, _ in self._uses.values() if use.behind is not None}
        keep(model.graph.node, lambda node: gone.isdisjoint(node.output))
        keep(model.graph.value_info, lambda value: value.name not in gone)
        contrib = any(node.domain == _CONTRIB for node in model.graph.node)
        if contrib and all(entry.domain != _CONTRIB for entry in model.opset_import):
            model.opset_import.add(domain=_CONTRIB, version=1)
        return model

    # Initializers

    def _constant(self, codes: _Codes, role: str, make: Callable[[], NDArray[Any]]) -> str:
        """An initializer that belongs to a weight; the same for all that ask for it."""
        key = codes.name, role
        if key not in self._stored:
            first = all(name != codes.name for name, _ in self._stored)
            name = codes.name if first else self._names.fresh(f"{codes.name}_{role}")
            self._stored[key] = self._store(name, make())
        return self._stored[key]

    def _store(self, name: str, array: NDArray[Any]) -> str:
        number = helper.np_dtype_to_tensor_dtype(array.dtype)
        self._added.append(stored(name, array, number))
        return name

    def _scale(self, codes: _Codes, factor: float, make: Callable[[], NDArray[np.float32]]) -> str:
        role = "scale" if factor == 1 else f"scale_{factor:g}"
        return self._constant(codes, role, lambda: make() * np.float32(factor))

    # Nodes

    def _instead(self, use: Use, codes: _Codes) -> list[NodeProto]:
        if use.is_lookup:
            looked_up = self._from_blocks if self._compute == "int4" else self._from_bytes
            return looked_up(use.node, codes)
        product = use.node.output[0]
        bias = len(use.node.input) > 2 and bool(use.node.input[2])
        inner = self._names.fresh(f"{product}_product") if bias else product
        multiplied = self._integers if self._compute == "int8" else self._in_bits
        nodes = multiplied(use, codes, inner)
        return nodes + self._plus(use.node, inner) if bias else nodes

    def _plus(self, gemm: NodeProto, product: str) -> list[NodeProto]:
        """Adds the bias of a Gemm."""
        bias, nodes = gemm.input[2], []
        if (beta := attribute(gemm, "beta", 1.0)) != 1.0:
            factor = self._store(self._names.fresh(f"{bias}_factor"), np.array(beta, np.float32))
            scaled = self._names.fresh(f"{bias}_scaled")
            nodes.append(helper.make_node("Mul", [bias, factor], [scaled]))
            bias = scaled
        return [*nodes, helper.make_node("Add", [product, bias], [gemm.output[0]])]

    def _integers(self, use: Use, codes: _Codes, output: str) -> list[NodeProto]:
        """A product of integers, scaled."""
        source, nodes = use.node.input[0], []
        if source not in self._rounded:
            made = tuple(self._names.fresh(f"{source}_{part}") for part in ("int8", "step", "zero"))
            self._rounded[source] = made
            nodes.append(helper.make_node("DynamicQuantizeLinear", [source], made))
        x, step, zero = self._rounded[source]
        weight = self._matrix(codes)
        if codes.axis == 0:
            key = codes.name, "turned"
            if key not in self._stored:
                self._stored[key] = self._names.fresh(f"{codes.name}_turned")
                nodes.append(helper.make_node("Transpose", [weight], [self._stored[key]]))
            weight = self._stored[key]
        factor = attribute(use.node, "alpha", 1.0)
        # one for all is a scalar: of [1], onnxruntime makes no MatMulIntegerToFloat
        flat = codes.scales.reshape(-1 if codes.scales.size > 1 else ())
        scale = self._scale(codes, factor, lambda: flat)
        whole, real, both = (
            self._names.fresh(f"{output}_{part}") for part in ("int32", "float", "scale")
        )
        return [
            *nodes,
            helper.make_node("MatMulInteger", [x, weight, zero], [whole]),
            helper.make_node("Cast", [whole], [real], to=TensorProto.FLOAT),
            helper.make_node("Mul", [step, scale], [both]),
            helper.make_node("Mul", [real, both], [output]),
        ]

    def _in_bits(self, use: Use, codes: _Codes, output: str) -> list[NodeProto]:
        """A product with a weight in 4 or 8 bits."""
        bits = 4 if self._compute == "int4" else 8
        outputs, inputs = codes.rows.shape
        block = BLOCK if bits == 4 else wide_block(inputs)
        shape = outputs, -(-inputs // block)
        matrix = self._constant(codes, "blocks", lambda: blobs(codes.rows, bits, block))
        scale = self._scale(
            codes,
            attribute(use.node, "alpha", 1.0),
            lambda: np.ascontiguousarray(np.broadcast_to(codes.scales, shape)).reshape(-1),
        )
        node = helper.make_node(
            "MatMulNBits",
            [use.node.input[0], matrix, scale],
            [output],
            domain=_CONTRIB,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=block,
            accuracy_level=_ACCURACY,
        )
        return [node]

    def _matrix(self, codes: _Codes) -> str:
        """The codes in the weight's own shape."""
        return self._constant(
            codes,
            "codes",
            lambda: codes.rows if codes.axis == 0 else np.ascontiguousarray(codes.rows.T),
        )

    def _from_bytes(self, gather: NodeProto, codes: _Codes) -> list[NodeProto]:
        """Rows of a table in int8, scaled."""
        indices, output = gather.input[1], gather.output[0]
        rows, real = (self._names.fresh(f"{output}_{part}") for part in ("int8", "float"))
        nodes = [
            helper.make_node("Gather", [self._matrix(codes), indices], [rows], axis=0),
            helper.make_node("Cast", [rows], [real], to=TensorProto.FLOAT),
        ]
        scale = self._constant(codes, "row_scale", lambda: codes.scales)
        if codes.scales.size > 1:
            own = self._names.fresh(f"{output}_scale")
            nodes.append(helper.make_node("Gather", [scale, indices], [own], axis=0))
            scale = own
        return [*nodes, helper.make_node("Mul", [real, scale], [output])]

    def _from_blocks(self, gather: NodeProto, codes: _Codes) -> list[NodeProto]:
        """Rows of a table in 4 bits, scaled block by block."""
        indices, output = gather.input[1], gather.output[0]
        blocks = -(-codes.rows.shape[1] // BLOCK)
        nodes: list[NodeProto] = []

        def add(op: str, *inputs: str, **attributes: Any) -> str:
            name = self._names.fresh(f"{output}_{op.lower()}")
            nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
            return name

        def constant(values: Any, dtype: Any) -> str:
            array = np.asarray(values, dtype)
            key = "", f"{array.dtype}{array.tolist()}"
            if key not in self._stored:
                self._stored[key] = self._store(self._names.fresh("narrow"), array)
            return self._stored[key]

        def shaped(value: str, *last: int) -> str:
            return add("Reshape", value, add("Concat", shape, constant(last, np.int64), axis=0))

        table = self._constant(codes, "blocks", lambda: blobs(codes.rows, 4, BLOCK))
        scale = self._constant(codes, "block_scale", lambda: codes.scales[:, :, None])
        four, last = constant(4, np.uint8), constant([-1], np.int64)
        shape = add("Shape", indices)
        pairs = add("Gather", table, indices, axis=0)
        low = add(
            "BitShift", add("BitShift", pairs, four, direction="LEFT"), four, direction="RIGHT"
        )
        high = add("BitShift", pairs, four, direction="RIGHT")
        both = (add("Unsqueeze", half, last) for half in (low, high))
        unsigned = shaped(add("Concat", *both, axis=-1), blocks, BLOCK)
        real = add("Cast", unsigned, to=TensorProto.FLOAT)
        signed = add("Sub", real, constant(8, np.float32))
        scaled = add("Mul", signed, add("Gather", scale, indices, axis=0))
        if blocks * BLOCK == codes.rows.shape[1]:
            shaped(scaled, codes.rows.shape[1])
        else:
            whole = shaped(scaled, blocks * BLOCK)
            ends = (constant([at], np.int64) for at in (0, codes.rows.shape[1]))
            add("Slice", whole, *ends, last)
        nodes[-1].output[0] = output
        return nodes


@dataclass(frozen=True, eq=False)
class _Codes:
    """A weight as integers.

    Attributes:
        name: the weight's.
        axis: of the weight, that counts outputs.
        rows: codes [outputs, inputs].
        scales: [outputs, blocks], [outputs, 1] or [1, 1].
    """

    name: str
    axis: int
    rows: NDArray[np.int8]
    scales: NDArray[np.float32]


def _turned(known: Quantized) -> Quantized:
    """The codes of a transposed weight."""
    scale = known.scale if known.scale is None or known.scale.size == 1 else known.scale.T
    return replace(known, codes=np.ascontiguousarray(known.codes.T), scale=scale)
