"""Rewrites models of opset 6 to 12 for opset 13, on the protobuf itself.

onnx.version_converter does the same through an intermediate representation. It loses functions,
node metadata and sparse initializers, fails above 2 GB, and ignores that a Resize of opset 10 takes
other pixels than one of opset 11. Between 6 and 13 few operators changed so that a node has to
change with them; they are all in `_CHANGES`. Every other node is valid as it is.

`runtime.compare` checks in onnxruntime that the outputs are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx import numpy_helper as nph

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.names import Names
from prune2onnx.graph.rewritten import Changes
from prune2onnx.graph.shapes import inferred
from prune2onnx.graph.walk import (
    DEFAULT_DOMAINS,
    attribute,
    bodies,
    is_constant,
    opset,
    set_attribute,
)

OLDEST, TARGET = 6, 13

Nodes = list[NodeProto]


@dataclass
class _Context:
    """What rewriting one node needs to know about the model."""

    version: int
    names: Names
    functions: set[tuple[str, str]]
    types: dict[str, onnx.TypeProto.Tensor | None] = field(default_factory=dict)
    scales: dict[str, TensorProto] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    assumed: list[str] = field(default_factory=list)
    constants: dict[bytes, str] = field(default_factory=dict)  # added to this graph so far

    def constant(self, word: str, value: ArrayLike, dtype: Any, before: Nodes) -> str:
        """The name of a constant; its node is appended to `before` unless the graph has it."""
        tensor = nph.from_array(np.asarray(value, dtype))
        key = tensor.SerializeToString()
        if key not in self.constants:
            self.constants[key] = self.names.fresh(word)
            before.append(helper.make_node("Constant", [], [self.constants[key]], value=tensor))
        return self.constants[key]

    def like(self, name: str) -> Any:
        """The numpy type of a value; float32 where it is unknown."""
        known = self.types.get(name)
        declared = known.elem_type if known else TensorProto.FLOAT
        other = declared in (TensorProto.FLOAT16, TensorProto.DOUBLE)  # all that old operators took
        return helper.tensor_dtype_to_np_dtype(declared if other else TensorProto.FLOAT)


# what a rewrite runs into where a node contradicts itself; onnxruntime refuses most such files
_CONTRADICTIONS = (ValueError, LookupError, TypeError, OverflowError)


def upgrade(model: ModelProto, changes: Changes) -> None:
    """Rewrites a model in place for opset 13; one of opset 13 or newer is left alone.

    Names of nodes and values, and everything that is not an operator, stay as they are.

    Raises:
        Prune2OnnxError: the opset is below 6, or a node has no equivalent; the message names it.
    """
    version = opset(model.opset_import)
    if version is None or version >= TARGET:
        return
    names = Names(model)
    context = _context(model, version, names)
    _replace(model.graph.node, context)
    for training in model.training_info:
        _replace(training.initialization.node, context)
        _replace(training.algorithm.node, context)
    for function in model.functions:
        inside = opset(function.opset_import)
        if inside is not None and inside < TARGET:
            # Neither types nor shapes of the values in a function are known.
            inner = _Context(inside, names, context.functions, used=context.used)
            _replace(function.node, inner)
            _set_version(function.opset_import)
            context.assumed += inner.assumed
    _set_version(model.opset_import)
    changes.notes += [f"converted from opset {version} to {TARGET}", *context.assumed]


def _set_version(imports: Iterable[Any]) -> None:
    for entry in imports:
        if entry.domain in DEFAULT_DOMAINS:
            entry.version = TARGET


def _context(model: ModelProto, version: int, names: Names) -> _Context:
    context = _Context(version, names, {(f.domain, f.name) for f in model.functions})
    graphs = [inferred(model).graph]
    for graph in graphs:  # the list grows
        for value in (*graph.input, *graph.output, *graph.value_info):
            declared = value.type.tensor_type if value.type.HasField("tensor_type") else None
            if context.types.get(value.name, declared) != declared:
                declared = None  # two subgraphs use the name
            context.types[value.name] = declared
        for tensor in graph.initializer:
            context.scales[tensor.name] = tensor
            info = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)).tensor_type
            context.types.setdefault(tensor.name, info)
        for node in graph.node:
            context.used.update(node.input)
            graphs.extend(bodies(node))
            if is_constant(node):
                for one in node.attribute:
                    if one.name == "value":
                        context.scales[node.output[0]] = one.t
        context.used.update(value.name for value in graph.output)
    for function in model.functions:
        context.used.update(function.output)
        for node in function.node:
            context.used.update(node.input)
    return context


def _replace(nodes: Any, context: _Context) -> None:
    """Rewrites a repeated field of nodes and the subgraphs in them."""
    if context.version < OLDEST:
        raise Prune2OnnxError(
            f"the model uses opset {context.version}; {OLDEST} is the oldest that can be "
            f"converted, export the model with opset {TARGET} or newer"
        )
    result: Nodes = []
    around, context.constants = context.constants, {}
    for node in nodes:
        for body in bodies(node):
            _replace(body.node, context)
        try:
            result += _node(node, context)
        except _CONTRADICTIONS as error:
            raise Prune2OnnxError(
                f"{', '.join(node.output)}: {node.op_type} of opset {context.version} cannot be "
                f"converted to {TARGET}: its attributes do not fit its inputs; the file is damaged"
            ) from error
    context.constants = around
    if len(result) != len(nodes):
        del nodes[:]
        nodes.extend(result)


def _node(node: NodeProto, context: _Context) -> Nodes:
    if node.domain not in DEFAULT_DOMAINS or (node.domain, node.op_type) in context.functions:
        return [node]
    if not onnx.defs.has(node.op_type, TARGET):
        context.assumed.append(
            f"{node.op_type} is not an operator of ONNX; left as it is"
        )  # onnxruntime has kernels for a few, whatever the operator set
        return [node]
    before, change = _CHANGES.get(node.op_type, (0, _same))
    return change(node, context) if context.version < before else [node]


def _refused(node: NodeProto, why: str, context: _Context) -> Prune2OnnxError:
    name = node.name or ", ".join(node.output)
    return Prune2OnnxError(
        f"{name}: {node.op_type} of opset {context.version} cannot be converted to {TARGET}: "
        f"{why}; export the model with opset {TARGET} or newer"
    )


def _take(node: NodeProto, name: str, context: _Context, default: Any = None) -> Any:
    """Removes an attribute and returns its value."""
    if any(one.name == name and one.ref_attr_name for one in node.attribute):
        raise _refused(node, f"its {name} comes from an attribute of a function", context)
    value = attribute(node, name, default)
    set_attribute(node, name, None)
    return value


def _same(node: NodeProto, context: _Context) -> Nodes:
    return [node]


def _moved(*attributes: tuple[str, Any]) -> Callable[[NodeProto, _Context], Nodes]:
    """Turns attributes into the inputs after the first, in order: (name, dtype or None).

    None stands for the element type of the first input.
    """

    def change(node: NodeProto, context: _Context) -> Nodes:
        inputs: list[str] = []
        before: Nodes = []
        for name, dtype in attributes:
            value = _take(node, name, context)
            if value is None:
                inputs.append("")
                continue
            value = [value] if isinstance(value, int) else value  # TopK's k
            element_type = dtype or context.like(node.input[0])
            inputs.append(context.constant(name, value, element_type, before))
        while inputs and not inputs[-1]:
            inputs.pop()
        del node.input[1:]
        node.input.extend(inputs)
        return [*before, node]

    return change


def _axes(node: NodeProto, context: _Context) -> Nodes:
    # onnxruntime reduces and squeezes all axes where the list is empty, as where it is missing.
    if attribute(node, "axes") == []:
        set_attribute(node, "axes", None)
    return _moved(("axes", np.int64))(node, context)


def _softmax(node: NodeProto, context: _Context) -> Nodes:
    """One axis since opset 13; before, all axes from `axis` on, flattened."""
    axis = _take(node, "axis", context, 1)
    known = context.types.get(node.input[0])
    if known is not None and known.HasField("shape"):
        extents = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in known.shape.dim]
        first = axis + len(extents) if axis < 0 else axis
        real = [at for at in range(first, len(extents)) if extents[at] != 1]
        if first < len(extents) and len(real) < 2:
            last = real[0] if real else first
            node.attribute.append(
                helper.make_attribute("axis", -1 if last == len(extents) - 1 else last)
            )
            return [node]
    elif axis == -1:
        node.attribute.append(helper.make_attribute("axis", -1))
        return [node]
    x, y = node.input[0], node.output[0]
    context.assumed.append(
        f"{y}: {node.op_type} over several axes takes three operators more than before"
    )
    shape, flat, done = (context.names.fresh(f"{y}_{word}") for word in ("shape", "flat", "2d"))
    node.input[0], node.output[0] = flat, done
    node.attribute.append(helper.make_attribute("axis", -1))
    return [
        helper.make_node("Shape", [x], [shape]),
        helper.make_node("Flatten", [x], [flat], axis=axis),
        node,
        helper.make_node("Reshape", [done, shape], [y]),
    ]


def _resize(node: NodeProto, context: _Context) -> Nodes:
    """Upsample, and Resize of opset 10: asymmetric coordinates.

    The nearest pixel is rounded down where the image grows, up where it shrinks.
    """
    before: Nodes = []
    scales = _take(node, "scales", context)
    if scales is None and len(node.input) < 2:
        raise _refused(node, "it has no scales", context)
    if scales is not None:
        node.input.append(context.constant("scales", scales, np.float32, before))
    elif node.input[1] in context.scales:
        scales = nph.to_array(context.scales[node.input[1]]).tolist()
    mode = _take(node, "mode", context, "nearest")
    rounding = "floor"
    if mode == "nearest":
        if scales is None:
            context.assumed.append(f"{node.output[0]}: its scales are computed; assumed 1 or more")
        elif min(scales, default=1) < 1:
            rounding = "ceil"
            if max(scales) > 1:
                raise _refused(node, "it enlarges one axis and shrinks another", context)
    node.op_type = "Resize"
    node.input.insert(1, "")
    for name, value in (
        ("mode", mode),
        ("coordinate_transformation_mode", "asymmetric"),
        ("nearest_mode", rounding),
    ):
        node.attribute.append(helper.make_attribute(name, value))
    return [*before, node]


def _pad(node: NodeProto, context: _Context) -> Nodes:
    if attribute(node, "value", 0.0) == 0:
        _take(node, "value", context)
    return _moved(("pads", np.int64), ("value", None))(node, context)


def _broadcast(node: NodeProto, context: _Context) -> Nodes:
    """Numpy's broadcasting since opset 7; before, the second input's axes began at `axis`."""
    axis = _take(node, "axis", context)
    if not _take(node, "broadcast", context, 0) or axis is None:
        return [node]
    ranks = [_rank(name, context) for name in node.input]
    if None in ranks:
        raise _refused(node, "the ranks of its inputs are unknown", context)
    first, second = (rank or 0 for rank in ranks)
    return _widened(node, first - (axis + first if axis < 0 else axis) - second, context)


def _prelu(node: NodeProto, context: _Context) -> Nodes:
    """Numpy's broadcasting since opset 7; before, one slope, or one per channel."""
    rank, slopes = _rank(node.input[0], context), _rank(node.input[1], context)
    if rank is None or slopes is None:
        raise _refused(node, "the ranks of its inputs are unknown", context)
    tensor = context.scales.get(node.input[1])
    if tensor is not None and list(tensor.dims) == [1]:
        return [node]
    return _widened(node, max(0, rank - 2) if slopes == 1 else 0, context)


def _rank(name: str, context: _Context) -> int | None:
    known = context.types.get(name)
    return len(known.shape.dim) if known is not None and known.HasField("shape") else None


def _widened(node: NodeProto, count: int, context: _Context) -> Nodes:
    """Appends `count` axes of extent 1 to the node's second input."""
    if count <= 0:
        return [node]
    before: Nodes = []
    axes = context.constant("axes", list(range(-count, 0)), np.int64, before)
    wide = context.names.fresh(f"{node.input[1]}_wide")
    before.append(helper.make_node("Unsqueeze", [node.input[1], axes], [wide]))
    node.input[1] = wide
    return [*before, node]


def _without(*attributes: str) -> Callable[[NodeProto, _Context], Nodes]:
    """Removes attributes that no longer exist."""

    def change(node: NodeProto, context: _Context) -> Nodes:
        for name in attributes:
            _take(node, name, context)
        return [node]

    return change


def _batch_normalization(node: NodeProto, context: _Context) -> Nodes:
    if context.version < 7 and not _take(node, "is_test", context, 0):
        raise _refused(node, "it is in training mode", context)
    _take(node, "consumed_inputs", context)
    if not _take(node, "spatial", context, 1):
        raise _refused(node, "opset 9 removed statistics per pixel (spatial=0)", context)
    return [node]


def _dropout(node: NodeProto, context: _Context) -> Nodes:
    _take(node, "is_test", context)
    if context.version < 10 and len(node.output) > 1:
        if node.output[1] in context.used:
            raise _refused(node, "its mask is used, and opset 10 changed its type", context)
        del node.output[1:]
    return _moved(("ratio", np.float32))(node, context)


def _scatter(node: NodeProto, context: _Context) -> Nodes:
    node.op_type = "ScatterElements"
    return [node]


def _scan(node: NodeProto, context: _Context) -> Nodes:
    raise _refused(node, "its inputs changed in opset 9", context)


_CHANGES: dict[str, tuple[int, Callable[[NodeProto, _Context], Nodes]]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow"), (7, _broadcast)),
    **dict.fromkeys(("And", "Or", "Xor", "Equal", "Greater", "Less"), (7, _broadcast)),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), (7, _without("output_sequence"))),
    "BatchNormalization": (9, _batch_normalization),
    "Clip": (11, _moved(("min", None), ("max", None))),
    "Dropout": (12, _dropout),
    "Gemm": (7, _without("broadcast")),
    "Hardmax": (13, _softmax),
    "LogSoftmax": (13, _softmax),
    "PRelu": (7, _prelu),
    "Pad": (11, _pad),
    "ReduceSum": (13, _axes),
    "Resize": (11, _resize),
    "Scan": (9, _scan),
    "Scatter": (11, _scatter),
    "Slice": (10, _moved(("starts", np.int64), ("ends", np.int64), ("axes", np.int64))),
    "Softmax": (13, _softmax),
    "Split": (13, _moved(("split", np.int64))),
    "Squeeze": (13, _axes),
    "TopK": (10, _moved(("k", np.int64))),
    "Unsqueeze": (13, _moved(("axes", np.int64))),
    "Upsample": (10, _resize),
}
"""Operator -> (opset that changed it, how a node of an older one is rewritten)."""
