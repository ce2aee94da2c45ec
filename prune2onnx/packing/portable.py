"""A packed model for engines that do not expand model-local functions, such as OpenVINO.

Its decoder stands in the graph, in operators that such engines compute while they compile a model
(`foldable`), without gates. What calls tell a reader (checksum, methods, places) stands in a
metadata entry (`inline`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from prune2onnx.graph.domain import DOMAIN, DOMAIN_VERSION, OP
from prune2onnx.graph.names import Names
from prune2onnx.graph.protobuf import copy_but, keep
from prune2onnx.graph.shapes import extents_of, values_in, without_weights
from prune2onnx.graph.walk import attribute, is_constant, used_in
from prune2onnx.graph.walk import opset as opset_of
from prune2onnx.packing.codecs.bundle import checksum
from prune2onnx.packing.codecs.function import Body
from prune2onnx.packing.codecs.plan import Plan
from prune2onnx.packing.codecs.staged import CONSTANTS, GATES, RESOLVE, Bounds
from prune2onnx.packing.decoding import decode_graph, facts_by_weight
from prune2onnx.packing.foldable import Rewriter, Values, without_detours
from prune2onnx.packing.inline import Facts, expanded

STAGE_SIZE = 1 << 22
"""Least elements of a stage: each adds a hundred nodes, and OpenVINO notes for each folded node
which ones it came from, in time that grows with their square."""

BOUNDS = Bounds(1 << 10, 1 << 13, 1 << 17)
"""Weights that are decoded as large ones: without gates and functions, that takes few nodes."""

OPSET = 18
"""The operator set whose stages are written out: nothing of them is left that older ones lack."""

_EITHER = "either"

_TABLE = 1024
"""Most elements of a table that is stored in float32 for the sake of engines without bfloat16."""

_SMALL = 64
"""Elements of a constant that a shape, an axis or a shift may come from."""


def portable(
    model: ModelProto, arrays: Mapping[str, NDArray[Any]], *, facts: bool = True
) -> ModelProto:
    """A packed model without functions.

    Args:
        model: packed, with decode calls; not modified. One without comes back as it is.
        arrays: its coded weights, by name.
        facts: whether the file says how each weight is written, and has a checksum.
    """
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return model
    known = facts_by_weight(model)
    names = Names(model)
    decoder = _foldable(decode_graph(model, {name: arrays[name] for name in known}), names)
    decoder.graph.node[-1].name = OP
    result = ModelProto()
    copy_but(result, model, "graph", "functions", "opset_import")
    copy_but(result.graph, model.graph, "node", "initializer", "value_info")
    result.functions.extend(f for f in model.functions if f.domain != DOMAIN)
    result.opset_import.extend(e for e in model.opset_import if e.domain != DOMAIN)
    streams = {name for node in model.graph.node if node.domain == DOMAIN for name in node.input}
    others = [node for node in model.graph.node if node.domain != DOMAIN]
    streams -= used_in(others)
    result.graph.initializer.extend(decoder.graph.initializer)
    result.graph.initializer.extend(t for t in model.graph.initializer if t.name not in streams)
    result.graph.node.extend([*decoder.graph.node, *others])
    inside = {name for node in model.graph.node if node.domain == DOMAIN for name in node.output}
    inside -= known.keys()
    result.graph.value_info.extend(v for v in model.graph.value_info if v.name not in inside)
    if facts:
        found = [(name, arrays[name]) for name in known]
        Facts(checksum(found), known).write(result)
    return result


def is_slow(made: Plan) -> bool:
    """Whether a plan has a Huffman stream whose decoder, written out, is more than 1,000 nodes."""
    return made.bundle is not None and any(one.name == "l" for one in made.bundle.functions)


def _foldable(decoder: ModelProto, names: Names) -> ModelProto:
    """A model of decode calls alone, with their nodes in place of the calls."""
    opset = opset_of(decoder.opset_import)
    assert opset is not None  # `pack` sees to it
    functions = [*(_static(one, opset) for one in decoder.functions), _either(opset)]
    written = expanded(_with(decoder, decoder.graph.node, functions), names)
    written.graph.ClearField("value_info")  # of places
    _lift(written, names)
    _widen(written)
    _add_constants(written, names)
    values = _values(written)
    rewriter = Rewriter(values, opset)
    nodes = rewriter.rewrite(written.graph.node)
    written = expanded(_with(written, nodes, rewriter.functions), names)
    nodes = without_detours(written.graph.node, values.types)
    written = _with(written, nodes, ())
    _lift(written, names)
    _merge_equal(written)
    _drop_unused(written)
    _end_in_one(written, names)
    return written


def _with(
    model: ModelProto, nodes: Iterable[NodeProto], functions: Iterable[FunctionProto]
) -> ModelProto:
    """The same model with these nodes and functions."""
    result = ModelProto()
    copy_but(result, model, "graph", "functions", "opset_import")
    copy_but(result.graph, model.graph, "node")
    result.graph.node.extend(nodes)
    result.functions.extend(functions)
    result.opset_import.extend(e for e in model.opset_import if e.domain != DOMAIN)
    result.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    return result


def _static(function: FunctionProto, opset: int) -> FunctionProto:
    """A function of stages, without gates and without shapes that depend on values.

    1. Gates are zeros, and what waits for them are constants.
    2. Words are given with a mark for each escape, int32 [n], in place of the escapes' places. What
       belongs there is looked up by the number of marks so far. (OpenVINO infers bounds of whatever
       follows a NonZero, again and again.)
    3. BitwiseOr, which older operator sets lack, is a sum in int32: no bit is set on both sides.
    """
    if function.name in (GATES, CONSTANTS):
        return _open_gates(function, opset)
    if function.name in RESOLVE:
        body = Body(function.name, 4)
        words, marks, following, table = body.inputs
        own = body.node("Gather", table, body.node("Cast", following, to=TensorProto.INT32))
        none = body.node("Constant", value=helper.make_tensor("", TensorProto.UINT8, [1], [0]))
        count = body.node("CumSum", marks, body.constant(0))
        added = body.node("Concat", none, own, axis=0)
        added = body.node("Gather", added, body.node("Mul", count, marks))
        return body.function(*body.call(_EITHER, words, added), opset=opset)
    result = FunctionProto()
    result.CopyFrom(function)
    for node in result.node:
        if node.op_type == "NonZero":
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", TensorProto.INT32))
        elif node.op_type == "BitwiseOr":
            node.op_type, node.domain = _EITHER, DOMAIN
    return result


def _either(opset: int) -> FunctionProto:
    body = Body(_EITHER, 2)
    wide = [body.node("Cast", one, to=TensorProto.INT32) for one in body.inputs]
    whole = body.node("Cast", body.node("Add", *wide), to=TensorProto.UINT8)
    return body.function(whole, opset=opset)


def _open_gates(function: FunctionProto, opset: int) -> FunctionProto:
    body = Body(function.name, len(function.input))
    values: list[tuple[list[int], tuple[int, ...]]] = [([0], (1,))] * len(function.output)
    number = TensorProto.INT64
    if function.name == CONSTANTS:
        values, number = [([0], (1,)), ([4], (1,)), (list(range(8)), (8, 1))], TensorProto.UINT8
    outputs = [
        body.node("Constant", value=helper.make_tensor("", number, shape, entries))
        for entries, shape in values
    ]
    return body.function(*outputs, opset=opset)


def _lift(model: ModelProto, names: Names) -> None:
    """Makes initializers of Constant nodes, those that are equal one."""
    graph = model.graph
    found: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for node in filter(is_constant, graph.node):
        (held,) = node.attribute
        if held.name == "value":
            tensor = TensorProto()
            tensor.CopyFrom(held.t)
            tensor.ClearField("name")
        else:  # `Body.constant` writes nothing else
            tensor = TensorProto(data_type=TensorProto.INT64, dims=[len(held.ints)])
            tensor.int64_data.extend(held.ints)
        key = tensor.SerializeToString(deterministic=True)
        if key not in found:
            tensor.name = found[key] = names.shortest()
            graph.initializer.append(tensor)
        same[node.output[0]] = found[key]
    keep(graph.node, lambda node: not is_constant(node))
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]


def _add_constants(model: ModelProto, names: Names) -> None:
    """Adds sizes and gates: shapes are inferred from constants alone."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    same: dict[str, str] = {}
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        known = [tensors[name] for name in node.input if name in tensors]
        if node.op_type != "Add" or len(known) != 2:
            continue
        if all(t.data_type == TensorProto.INT64 and math.prod(t.dims) <= _SMALL for t in known):
            one, other = map(numpy_helper.to_array, known)
            same[node.output[0]] = name = names.shortest()
            model.graph.initializer.append(numpy_helper.from_array(one + other, name))


def _widen(model: ModelProto) -> None:
    """Makes float32 of small tables in bfloat16, which tract lacks; their Cast does nothing."""
    tables = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.BFLOAT16 and math.prod(tensor.dims) <= _TABLE
    }
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    only = {node.input[0] for node in casts if attribute(node, "to") == TensorProto.FLOAT}
    only -= used_in(node for node in model.graph.node if node.op_type != "Cast")
    for name in only & tables.keys():
        array = numpy_helper.to_array(tables[name]).astype(np.float32)
        tables[name].CopyFrom(numpy_helper.from_array(array, name))


def _values(model: ModelProto) -> Values:
    """Shapes, element types and small constants of a decoder."""
    # without propagating data: that takes a message for each element of a vector
    graph = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    shapes, types = {}, {}
    for value in values_in(graph):
        extents = extents_of(value)
        if extents is not None:
            shapes[value.name] = [e if isinstance(e, int) else 0 for e in extents]
        types[value.name] = value.type.tensor_type.elem_type
    constants = {}
    for tensor in model.graph.initializer:
        shapes[tensor.name], types[tensor.name] = list(tensor.dims), tensor.data_type
        if math.prod(tensor.dims) <= _SMALL:
            constants[tensor.name] = numpy_helper.to_array(tensor)
    return Values(shapes, types, constants)


def _end_in_one(model: ModelProto, names: Names) -> None:
    """Lets no weight be one of several outputs of a node.

    OpenVINO refuses that for the scale of a DequantizeLinear, for example.
    """
    outputs = {value.name for value in model.graph.output}
    written: list[NodeProto] = []
    for node in model.graph.node:
        written.append(node)
        for index, name in enumerate(node.output):
            if len(node.output) > 1 and name in outputs:
                node.output[index] = names.shortest()
                written.append(helper.make_node("Concat", [node.output[index]], [name], axis=0))
    del model.graph.node[:]
    model.graph.node.extend(written)


def _merge_equal(model: ModelProto) -> None:
    """Leaves one of several nodes that compute the same; not of those that give an output."""
    outputs = {value.name for value in model.graph.output}
    found: dict[bytes, NodeProto] = {}
    same: dict[str, str] = {}
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        bare = NodeProto()
        copy_but(bare, node, "output", "name")
        first = found.setdefault(bare.SerializeToString(deterministic=True), node)
        if first is not node and outputs.isdisjoint(node.output):
            same |= dict(zip(node.output, first.output, strict=True))


def _drop_unused(model: ModelProto) -> None:
    """Removes nodes and initializers that no output depends on."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    keep(graph.initializer, lambda tensor: tensor.name in needed)
