"""Packed files to damage, and their mutations: for test_hostile.py and tools/fuzz.py.

`seeds` are valid files, small ones of every method and element type; `mutated` changes the parts
of a packed file: streams, shapes, types, constants, nodes, functions, notes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
from onnx import (
    AttributeProto,
    FunctionProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)
from places import FIXTURES

from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.walk import in_nodes
from prune2onnx.packing.codecs import METHODS, Method, Plan, Weight, encode, huffman
from prune2onnx.packing.codecs.methods import method as by_name
from prune2onnx.packing.codecs.plan import estimates
from prune2onnx.packing.codecs.staged import Known, Large, survey
from prune2onnx.packing.pack import _written
from prune2onnx.packing.portable import portable

_MOST_NBYTES = 8192  # of a seed: many are run a second

INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 8, 12, 16, 64, 127, 128, 255, 256, 511, 512, 4095, 4096, 65535, 65536),
    *(2**24, 2**31 - 1, -(2**31), 2**31, 2**40, 2**60, 2**62, 2**63 - 1, -(2**63)),
)
"""Numbers at which something may overflow."""

_OPERATORS = (
    *("Add", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "CumSum", "Div", "Expand"),
    *("Gather", "GatherElements", "Identity", "Less", "Mod", "Mul", "Neg", "Pow", "Range"),
    *("ReduceSum", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Sub", "Transpose"),
    *("Where", "If", "MatMul", "Abs", "BitShift", "BitwiseOr", "NonZero", "Not", "Scan", "Shape"),
)

_ELEMENT_TYPES = (*range(30), 99, -1)


def weight(name: str, dtype: Any, shape: tuple[int, ...], density: float, levels: int) -> Weight:
    """A small weight; `levels` distinct nonzero values, 0 for many."""
    generator = np.random.default_rng(len(name) + levels)
    if levels:
        values = generator.permutation(np.arange(1, levels + 1) - levels // 3)
        values = values[generator.integers(0, levels, shape)]
    else:
        values = generator.standard_normal(shape) * 0.1
    dtype = np.dtype(dtype)
    if dtype.kind in "iu" or dtype in (ml_dtypes.int4, ml_dtypes.uint4):
        low, high = (0, 15) if dtype == ml_dtypes.uint4 else (-7, 7)
        values = np.clip(np.rint(values), low, high)
    array = (values * (generator.random(shape) < density)).astype(dtype)
    return Weight(name, array, helper.np_dtype_to_tensor_dtype(array.dtype))


def packed(weights: list[Weight], method: Method, coder: str = "huffman") -> ModelProto:
    """A model of nothing but these weights, written by one method, even if the file gets larger."""
    methods = {one.name: method for one in weights}
    bundle = encode(weights, methods, 17, coder=coder)
    return _written(_model(weights, 17), Plan(bundle, methods, {}))[0]


def known(weight: Weight) -> Known:
    """A weight as large ones are looked at."""

    def rows(array):
        return None if array is None else lambda begin, end: array[begin:end]

    large = Large(
        weight.name,
        weight.shape,
        weight.element_type,
        rows(weight.array),
        weight.scale,
        rows(weight.levels),
    )
    return Known(large, survey(large))


def in_stages(weights: list[Weight], methods: dict[str, Method], opset: int) -> ModelProto:
    """The same, written as large weights are."""
    large = [known(one) for one in weights]
    return _written(_model(weights, opset), Plan(None, {}, {}), large, methods)[0]


def _model(weights: list[Weight], opset: int) -> ModelProto:
    graph = helper.make_graph([], "g", [], [])
    for one in weights:
        graph.initializer.append(_dense(one))
        graph.node.append(helper.make_node("Identity", [one.name], [f"{one.name}_out"]))
        value = helper.make_tensor_value_info(f"{one.name}_out", one.element_type, one.shape)
        graph.output.append(value)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _dense(one: Weight) -> TensorProto:
    """A weight as a dense initializer."""
    return numpy_helper.from_array(one.array, one.name)


def seeds() -> Iterator[tuple[str, ModelProto]]:
    """Valid packed files: name, model."""
    dtypes = (np.float32, np.float16, np.float64, np.int8, np.uint8)
    dtypes += (ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.uint4)
    for dtype, (density, levels), coder in itertools.product(
        dtypes, ((1.0, 0), (1.0, 12), (0.1, 5)), ("huffman", "rice", "none")
    ):
        weights = [
            weight("a", dtype, (12, 10), density, levels),
            weight("bb", dtype, (7, 10), density, levels),
        ]
        fitting = [estimates(one, coder=coder) for one in weights]
        for method in fitting[0].keys() & fitting[1].keys():
            name = f"{np.dtype(dtype).name}-{density}-{levels}-{method.name}-{coder}"
            yield name, packed(weights, method, coder)
    for opset in (13, 18):
        large = {
            "planes": weight("floats", np.float32, (30, 20), 1.0, 0),
            "codebook": weight("codes", np.float32, (12, 10), 1.0, 12),
            "gap-codebook": weight("gaps", np.float32, (12, 10), 0.1, 5),
            "levels": weight("bytes", np.int8, (12, 10), 1.0, 12),
        }
        methods = {one.name: by_name(name) for name, one in large.items()}
        yield f"in stages-{opset}", in_stages(list(large.values()), methods, opset)
        half = weight("half", np.float16, (30, 20), 1.0, 0)
        yield f"half in stages-{opset}", in_stages([half], {"half": by_name("planes")}, opset)
    jump_bits, huffman.JUMP_BITS = huffman.JUMP_BITS, 0  # the coder for long streams
    try:
        weights = [weight("a", np.float32, (12, 10), 0.2, 9)]
        yield "stepping", packed(weights, METHODS[6])
    finally:
        huffman.JUMP_BITS = jump_bits
    for path in sorted(FIXTURES.glob("*.onnx")):
        if path.stat().st_size < _MOST_NBYTES:
            yield path.stem, ModelProto.FromString(path.read_bytes())
    weights = [weight("a", np.float32, (12, 10), 0.2, 9)]
    written = {coder: packed(weights, METHODS[6], coder) for coder in ("huffman", "rice", "none")}
    written["stages"] = in_stages(weights, {"a": by_name("gap-codebook")}, 18)
    for name, model in written.items():
        yield f"portable-{name}", portable(model, {"a": weights[0].array})


def mutated(model: ModelProto, random: Random, others: list[ModelProto]) -> ModelProto:
    """A copy with one to five changes; some take parts from `others`."""
    result = ModelProto()
    result.CopyFrom(model)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        change = random.choice(_CHANGES)
        try:
            change(result, random, others)
        except (ValueError, IndexError, TypeError, OverflowError):
            continue  # does not fit the field
    return result


def _tensors(model: ModelProto) -> list[TensorProto]:
    found = list(model.graph.initializer) + list(in_nodes(model.graph.node))
    for function in model.functions:
        found += in_nodes(function.node)
    return found


def _nodes(model: ModelProto) -> list[NodeProto]:
    found = [node for node in model.graph.node if node.domain == DOMAIN]
    for function in model.functions:
        found += function.node
    return found


def _any(random: Random, items: Any) -> Any:
    """One of the items; ValueError, which `mutated` ignores, if there is none."""
    if not len(items):
        raise ValueError("nothing to change")
    return items[random.randrange(len(items))]


def _stream(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    tensor = _any(random, model.graph.initializer)
    data = bytearray(tensor.raw_data)
    if not data:
        return
    at = random.randrange(len(data))
    what = random.randrange(5)
    if what == 0:
        data[at] ^= 1 << random.randrange(8)
    elif what == 1:
        data[at] = random.choice((0, 1, 127, 128, 255))
    elif what == 2:
        del data[at:]
    elif what == 3:
        data[at:at] = data[: random.randrange(64)]
    else:
        tensor.raw_data = bytes(random.choice((0, 255)) for _ in data[:1]) * len(data)
        return
    tensor.raw_data = bytes(data)
    if what in (2, 3) and random.random() < 0.7 and tensor.dims:
        item = max(1, len(tensor.raw_data) // max(1, len(data)))
        tensor.dims[:] = [len(tensor.raw_data) // item]


def _shape(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    tensor = _any(random, _tensors(model))
    what = random.randrange(4)
    if what == 0:
        tensor.dims.append(random.choice(INTEGERS))
    elif what == 1:
        del tensor.dims[random.randrange(len(tensor.dims)) :]
    elif what == 2:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(INTEGERS)
    else:
        random.shuffle(tensor.dims)


def _element_type(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    _any(random, _tensors(model)).data_type = random.choice(_ELEMENT_TYPES)


def _value(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    tensor = _any(random, _tensors(model))
    for field in (tensor.int32_data, tensor.int64_data):
        if field:
            at = random.randrange(len(field))
            field[at] = random.choice((*INTEGERS, field[at] + 1, field[at] - 1))
    if random.random() < 0.1:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=random.choice(("/etc/passwd", "x", "")))


def _attribute(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    node = _any(random, _nodes(model))
    what = random.randrange(6)
    if what == 0 and node.attribute:
        del node.attribute[random.randrange(len(node.attribute))]
    elif what == 1:
        name = random.choice(("axis", "to", "value", "keepdims", "perm", "exclusive", "i", "x"))
        number = random.choice(INTEGERS)
        given = random.choice((number, [number], [], 0.5, "text", [number] * 9))
        node.attribute.append(helper.make_attribute(name, given, attr_type=_type_of(given)))
    else:
        attribute = _any(random, node.attribute)
        if what == 2:
            attribute.i = random.choice(INTEGERS)
        elif what == 3 and attribute.ints:
            attribute.ints[random.randrange(len(attribute.ints))] = random.choice(INTEGERS)
        elif what == 4:
            attribute.type = random.choice(range(15))
        else:
            attribute.ref_attr_name = random.choice(("i", "shape", "x", ""))


def _type_of(given: Any) -> int:
    if isinstance(given, list):
        return AttributeProto.INTS
    types = {int: AttributeProto.INT, float: AttributeProto.FLOAT, str: AttributeProto.STRING}
    return types[type(given)]


def _node(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    function = _any(random, model.functions)
    at = random.randrange(len(function.node))
    node = function.node[at]
    what = random.randrange(9)
    if what == 0:
        node.op_type = random.choice(_OPERATORS)
    elif what == 1:
        del function.node[at]
    elif what == 2:
        function.node.insert(random.randrange(len(function.node)), node)
    elif what == 3:
        node.domain = random.choice(("", DOMAIN, "ai.onnx", "com.microsoft"))
    elif what == 4:
        node.op_type = random.choice([each.name for each in model.functions])
        node.domain = DOMAIN
    else:
        _new_node(function, at, random)


def _new_node(function: FunctionProto, at: int, random: Random) -> None:
    """Inserts a node before the one at `at`; its result replaces a value that is used later."""
    known = [*function.input, *(name for node in function.node[:at] for name in node.output)]
    count = random.choice((1, 1, 2, 2, 3, 9))
    names = [random.choice(known) for _ in range(count)]
    op = random.choice(_OPERATORS)
    given: dict[str, Any] = {}
    if op in ("Concat", "Gather", "GatherElements", "ScatterElements", "Split"):
        given["axis"] = random.choice((0, 0, 0, 1, -1, 2**40))
    if op == "Cast":
        given["to"] = random.choice(_ELEMENT_TYPES[1:])
    if op == "Constant":
        names = []
        given["value_ints"] = [random.choice(INTEGERS) for _ in range(random.randrange(3))]
    target = random.choice(known)
    made = helper.make_node(op, names, [f"new{random.randrange(99)}"], **given)
    function.node.insert(at, made)
    for node in function.node[at + 1 :]:
        for index, name in enumerate(node.input):
            if name == target and random.random() < 0.5:
                node.input[index] = made.output[0]


def _names(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    node = _any(random, [*_nodes(model), *_nodes(model), *model.functions])
    names = random.choice((node.input, node.output))
    what = random.randrange(4)
    at = random.randrange(len(names))
    if what == 0:
        del names[at]
    elif what == 1:
        names[at] = names[random.randrange(len(names))]
    elif what == 2:
        names.append(random.choice((names[at], "", "zz")))
    else:
        random.shuffle(names)


def _function(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    function = _any(random, model.functions)
    what = random.randrange(6)
    if what == 0:
        model.functions.add().CopyFrom(function)
    elif what == 1:
        function.name = random.choice(("m", "l", "d", "s", "r", "w", "x"))
    elif what == 2:
        function.opset_import[0].version = random.choice((1, 13, 18, 25, 2**40))
    elif what == 3:
        lent = _any(random, _any(random, others).functions)
        model.functions.add().CopyFrom(lent)
    elif what == 4:
        del function.node[:]
    else:
        call = helper.make_node(function.name, function.input, function.output, domain=DOMAIN)
        function.node.insert(random.randrange(len(function.node) + 1), call)


def _call(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    node = _any(random, calls)
    what = random.randrange(4)
    if what == 0:
        model.graph.node.add().CopyFrom(node)
    elif what == 1:
        node.op_type = _any(random, model.functions).name
    elif what == 2:
        for attribute in node.attribute:
            attribute.t.int64_data.append(random.choice(INTEGERS))
    else:
        lent = _any(random, _any(random, others).graph.initializer)
        model.graph.initializer.add().CopyFrom(lent)


_TEXTS = ("", "{}", "[]", "8", "-1", "3", "9" * 5000, "[" * 30_000, '{"a": 1}', '{"a": {"x": 1}}')
_TEXTS += ('{"a": {"doc_string": "\\ud800"}}', '{"a": {".k": "v"}}', "1e999", "null", "nan", "٣")


def _notes(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    what = random.randrange(4)
    if what < 2:
        key = random.choice(("prune2onnx.ir_version", "prune2onnx.tensors", "prune2onnx"))
        model.metadata_props.add(key=key, value=random.choice(_TEXTS))
    elif what == 2:
        name = random.choice(("a", "bb", "fc.weight"))
        value = helper.make_tensor_value_info(name, random.choice((*range(1, 26), 99)), [1])
        model.graph.value_info.append(value)
    else:
        model.ir_version = random.choice(INTEGERS)


def _sparse(model: ModelProto, random: Random, others: list[ModelProto]) -> None:
    sparse = model.graph.sparse_initializer.add()
    count = random.choice((0, 1, 3))
    sparse.values.CopyFrom(
        TensorProto(
            name="s", data_type=random.choice(_ELEMENT_TYPES), dims=[count], int32_data=[1] * count
        )
    )
    places = [random.choice((*range(9), *INTEGERS)) for _ in range(count)]
    sparse.indices.CopyFrom(
        TensorProto(data_type=TensorProto.INT64, dims=[count], int64_data=places)
    )
    sparse.dims.extend(random.choice((3, *INTEGERS)) for _ in range(random.randrange(4)))


_CHANGES: tuple[Callable[[ModelProto, Random, list[ModelProto]], None], ...] = (
    *(_stream, _stream, _shape, _element_type, _value, _value, _attribute, _attribute),
    *(_node, _node, _node, _names, _function, _call, _notes, _sparse),
)
