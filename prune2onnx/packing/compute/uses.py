"""Which weights can stay narrow at run time, how each is read, and along which axis scales lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from prune2onnx.graph.tensors import element_type
from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute
from prune2onnx.packing.readers import Reader, Readers

LEAST_ELEMENTS = 1024
"""Smaller weights stay float32: their scales and nodes would cost more than they save."""

RECURRENT = ("GRU", "LSTM", "RNN")


@dataclass(frozen=True, eq=False)
class Use:
    """One reader of a weight.

    Attributes:
        node: MatMul, Gemm or Gather.
        at: its place in the graph.
        is_transposed: whether the weight is stored as [outputs, inputs] for a product.
        behind: the Transpose between the weight and the node; None: it reads the weight itself.
    """

    node: NodeProto
    at: int
    is_transposed: bool = False
    behind: NodeProto | None = None

    @property
    def is_lookup(self) -> bool:
        """Whether rows are looked up; else the weight is multiplied with."""
        return bool(self.node.op_type == "Gather")


@dataclass(frozen=True, eq=False)
class Narrowable:
    """A weight that can stay narrow.

    Attributes:
        tensor: float32, two axes.
        axis: the one that counts outputs, or rows of a table: each has a scale.
        uses: all of its readers.
    """

    tensor: TensorProto
    axis: int
    uses: tuple[Use, ...]

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up, and nothing else."""
        return all(use.is_lookup for use in self.uses)


def narrowable(model: ModelProto) -> tuple[list[Narrowable], dict[str, str]]:
    """The weights of a model that can stay narrow, and why the others cannot.

    Args:
        model: unpacked and normalized.

    Returns:
        Weights, in the order of the initializers; name -> reason, for other floating-point tensors
        of two or more axes but biases of recurrent layers.
    """
    readers = Readers(model)
    found, reasons = [], {}
    for tensor in model.graph.initializer:
        if tensor.data_type not in _FLOATS or len(tensor.dims) < 2:
            continue
        read = readers.of[(), tensor.name]
        if read and all(map(_is_bias, read)):
            continue
        made = _of(tensor, readers)
        if isinstance(made, str):
            reasons[tensor.name] = made
        else:
            found.append(made)
    return found, reasons


_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def _is_bias(reader: Reader) -> bool:
    """Whether a tensor is added in a recurrent layer, which has one for each direction."""
    return reader.node.op_type in (*RECURRENT, "DynamicQuantizeLSTM") and reader.index > 2


def _of(tensor: TensorProto, readers: Readers) -> Narrowable | str:
    """A weight's uses; a text: why it has others."""
    if ((), tensor.name) in readers.taken:
        return "also an input or output of the graph"
    if tensor.data_type != TensorProto.FLOAT:
        return f"{element_type(tensor)}; only float32 weights are made narrow"
    if math.prod(tensor.dims) < LEAST_ELEMENTS:
        return f"fewer than {LEAST_ELEMENTS} elements"
    uses: list[Use] = []
    for reader in readers.of[(), tensor.name]:
        turned = (), reader.node.output[0]
        if not reader.path and _is_turn(reader.node) and turned not in readers.taken:
            behind = [_use(other, turn=reader.node) for other in readers.of[turned]]
        else:
            behind = [_use(reader)]
        for use in behind:
            if isinstance(use, str):
                return use
            uses.append(use)
    if not uses:
        return "read by no node"
    if len(tensor.dims) != 2:
        return f"{len(tensor.dims)} axes; only matrices are made narrow"
    axes = {0 if use.is_lookup or use.is_transposed else 1 for use in uses}
    if len(axes) > 1:
        return "read along different axes, which would need different scales"
    return Narrowable(tensor, axes.pop(), tuple(uses))


def _is_turn(node: NodeProto) -> bool:
    return bool(
        node.op_type == "Transpose"
        and node.domain in DEFAULT_DOMAINS
        and attribute(node, "perm", [1, 0]) == [1, 0]
    )


def _use(reader: Reader, turn: NodeProto | None = None) -> Use | str:
    node, index, at = reader.node, reader.index, reader.at
    op = node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}.{node.op_type}"
    turned = turn is not None
    if reader.path:
        return f"read by {op} in a body of If, Loop or Scan"
    if op == "MatMul" and index == 1:
        return Use(node, at, turned, turn)
    if op == "Gemm" and index == 1 and not attribute(node, "transA", 0):
        return Use(node, at, turned != bool(attribute(node, "transB", 0)), turn)
    if op == "Gather" and index == 0 and not attribute(node, "axis", 0) and not turned:
        return Use(node, at)
    if op in ("Conv", "ConvTranspose"):
        return f"read by {op}; `prune2onnx quantize` makes it int8"
    return f"read by {op} as input {index}"
