"""A hostile file may do no more than end with an error of one line, in bounded time and memory.

First programs that ask each operator for too much; then valid files, damaged bit by bit and part by
part; then what the fuzzer found (tools/fuzz.py), reduced as far as possible.
"""

import contextlib
import copy
import itertools
import resource
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import FIXTURES, mutated, packed, seeds, weight
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from prune2onnx import Prune2OnnxError
from prune2onnx.cli.main import main
from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.file import load
from prune2onnx.graph.tensors import declared_nbytes
from prune2onnx.packing.codecs import METHODS, Weight, huffman, huffman_graph, limits
from prune2onnx.packing.decoding import budget_of, coded, decodings_of
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.sparse import from_sparse
from prune2onnx.packing.unpack import unpack

METHOD = {method.name: method for method in METHODS}
MAX_BYTES = 1 << 24
SECONDS = 5.0


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, nbytes: int = 3 * MAX_BYTES) -> Iterator[None]:
    """Bounds the time of its body, and the memory of Python and numpy."""
    tracemalloc.start()
    start = time.process_time()  # of this process alone, since the machine may be busy
    try:
        yield
    finally:
        taken = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert taken < seconds
    assert peak < nbytes


def refused(model: ModelProto, match: str, max_bytes: int = MAX_BYTES) -> None:
    """Neither command opens it, and both say why on one line."""
    for read in (unpack, inspect):
        with bounded(), pytest.raises(Prune2OnnxError, match=match) as raised:
            read(model, max_bytes)
        text = str(raised.value)
        assert "\n" not in text
        assert len(text) < 1000


def node(op: str, inputs: str, outputs: str, **attributes: object) -> NodeProto:
    """A node from names with spaces between them; an operator with a dot before it is a call."""
    domain = DOMAIN if op.startswith(".") else ""
    op = op.removeprefix(".")
    return helper.make_node(op, inputs.split(), outputs.split(), domain=domain, **attributes)


def ints(name: str, *values: int) -> NodeProto:
    """An int64 vector."""
    return node("Constant", "", name, value_ints=list(values))


def array(name: str, values: np.ndarray) -> NodeProto:
    """A constant of any type."""
    return node("Constant", "", name, value=numpy_helper.from_array(np.asarray(values)))


def program(
    *nodes: NodeProto,
    outputs: str = "y",
    streams: dict[str, np.ndarray] | None = None,
    functions: dict[str, list[NodeProto]] | None = None,
    calls: int = 1,
) -> ModelProto:
    """A packed file whose decoder is this; other functions have one input `a`, one output `y`."""
    streams = {"s": np.arange(8, dtype=np.int32)} if streams is None else streams
    initializers = [numpy_helper.from_array(value, name) for name, value in streams.items()]
    named = [f"{name}{call}" for call in range(calls) for name in outputs.split()]
    width = len(outputs.split())
    graph = helper.make_graph(
        [
            node(".c", " ".join(streams), " ".join(named[width * call : width * (call + 1)]))
            for call in range(calls)
        ],
        "g",
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in named],
        initializers,
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    made = [helper.make_function(DOMAIN, "c", list(streams), outputs.split(), nodes, imports)]
    for name, inside in (functions or {}).items():
        made.append(helper.make_function(DOMAIN, name, ["a"], ["y"], inside, imports))
    return helper.make_model(graph, functions=made, opset_imports=imports, ir_version=8)


def first(model: ModelProto) -> np.ndarray:
    """The first weight that it decodes to."""
    return next(iter(coded(model, MAX_BYTES).arrays.values()))


TOO_LARGE = r"y0: (decoding needs .*--max-bytes|cannot be decoded: .* 2\^64 bytes or more)"
ONE = array("one", np.ones(1, np.float32))
SCALAR = array("zero", np.int64(0))
F16 = array("half", np.ones((1, 1), np.float16))
MILLION = [
    ints("n", 1_000_000),
    ints("flat", -1, 1),
    ONE,
    node("Expand", "one n", "v"),
    node("Reshape", "v flat", "column"),
]

TOO_MUCH = {
    "ConstantOfShape": [ints("n", 1 << 60), node("ConstantOfShape", "n", "y")],
    "ConstantOfShape of many axes": [
        ints("n", *[1 << 20] * 5),
        node("ConstantOfShape", "n", "y"),
    ],
    "a product beyond 64 bits": [ints("n", 1 << 62, 4), node("ConstantOfShape", "n", "y")],
    "Expand": [ONE, ints("n", 1 << 40), node("Expand", "one n", "y")],
    "Range": [
        array("a", np.int64(0)),
        array("b", np.int64(2**63 - 1)),
        array("c", np.int64(1)),
        node("Range", "a b c", "y"),
    ],
    "Add of a column and a row": [*MILLION, node("Add", "column v", "y")],
    "Where of a column and a row": [
        *MILLION,
        node("Less", "v v", "no"),
        node("Where", "no column v", "y"),
    ],
    "Less, whose result is small": [*MILLION, node("Less", "column v", "y")],
    "Gather of long rows": [
        *MILLION,
        ints("row", 1, -1),
        node("Reshape", "v row", "wide"),
        ints("many", *[0] * 100),
        node("Gather", "wide many", "y"),
    ],
    "GatherElements": [
        ints("n", 1 << 20),
        node("ConstantOfShape", "n", "i", value=helper.make_tensor("", 7, [1], [0])),
        array("table", np.zeros(3)),
        *[node("GatherElements", "table i", f"g{k}") for k in range(9)],
        node("Concat", " ".join(f"g{k}" for k in range(9)), "y", axis=0),
    ],
    "Concat doubling": [
        ints("v0", *range(64)),
        *[node("Concat", f"v{k} v{k}", f"v{k + 1}", axis=0) for k in range(40)],
        node("Identity", "v40", "y"),
    ],
    "Cast to wider": [
        *MILLION,
        node("Concat", "v v v", "vvv", axis=0),
        node("Cast", "vvv", "y", to=TensorProto.DOUBLE),
    ],
    "all arrays together": [
        ints("n", 1 << 21),
        *[node("ConstantOfShape", "n", f"v{k}") for k in range(9)],
        node("Concat", " ".join(f"v{k}" for k in range(9)), "y", axis=0),
    ],
    "ReduceSum of nothing": [
        ints("n", 0, 1 << 40),
        ints("axis", 0),
        node("ConstantOfShape", "n", "none"),
        node("ReduceSum", "none axis", "y"),
    ],
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_the_size_of_a_result_is_checked_before_it_is_made(name):
    refused(program(*TOO_MUCH[name]), TOO_LARGE)


def test_what_is_allowed_is_the_callers_choice():
    model = program(ints("n", 1000), node("ConstantOfShape", "n", "y"))
    assert first(model).shape == (1000,)
    with pytest.raises(Prune2OnnxError, match=r"3,999 are allowed; .*unpack --max-bytes"):
        unpack(model, 3999)
    unpack(model, 4000)


DAMAGED = {
    "Range without a step": (
        [SCALAR, node("Range", "zero zero zero", "y")],
        "Range: .*zero",
    ),
    "Range of many numbers": (
        [ints("n", 1, 2), node("Range", "n n n", "y")],
        "Range: ",
    ),
    "a negative extent": ([ints("n", -5), node("ConstantOfShape", "n", "y")], r"shape \[-5\]"),
    "two extents to infer": ([ints("n", -1, -1), node("Reshape", "s n", "y")], "Reshape: "),
    "Reshape to another size": ([ints("n", 3), node("Reshape", "s n", "y")], "Reshape: "),
    "a kept extent that is not there": ([ints("n", 8, 0), node("Reshape", "s n", "y")], "Reshape"),
    "a shape of floats": ([ONE, node("Reshape", "s one", "y")], "Reshape: a shape"),
    "more axes than numpy has": (
        [ints("n", *[1] * 100), node("ConstantOfShape", "n", "y")],
        "a shape or axes in an array",
    ),
    "a shape that is a large array": (
        [*MILLION, node("Cast", "v", "n2", to=7), node("ConstantOfShape", "n2", "y")],
        "a shape or axes in an array",
    ),
    "sizes of parts that turn over": (
        [ints("n", *[1 << 62] * 4, 8), node("Split", "s n", "y b c d e")],
        "8 elements are split into 18446744073709551624",
    ),
    "more sizes than parts": (
        [ints("n", *[0] * 1000, 8), node("Split", "s n", "y")],
        "1 parts, sizes of shape",
    ),
    "a negative size": ([ints("n", 9, -1), node("Split", "s n", "y b")], "8 elements are split"),
    "an index past the end": ([ints("i", 8), node("Gather", "s i", "y")], "an index from 8 to 8"),
    "an index before the start": ([ints("i", -9), node("Gather", "s i", "y")], "from -9 to -9"),
    "an index that is no integer": ([ONE, node("Gather", "s one", "y")], "indices of float32"),
    "an index into nothing": (
        [
            ints("n", 0),
            SCALAR,
            node("ConstantOfShape", "n", "none"),
            node("Gather", "none zero", "y"),
        ],
        "into 0 elements",
    ),
    "one index for many": (
        [
            *MILLION,
            ints("row", 1, -1),
            node("Reshape", "v row", "wide"),
            node("Less", "column column", "no"),
            node("Cast", "no", "i", to=7),
            node("GatherElements", "wide i", "y", axis=0),
        ],
        "indices of shape",
    ),
    "a gap past the end": (
        [
            ints("i", 5, 8),
            ints("n", 8),
            node("ConstantOfShape", "n", "zeros"),
            array("v", np.ones(2, np.float32)),
            node("ScatterElements", "zeros i v", "y"),
        ],
        "ScatterElements: an index from 5 to 8 into 8 elements",
    ),
    "a place past the end": (
        [
            array("i", np.array([[0, 0], [2, 9]])),
            ints("n", 3, 9),
            node("ConstantOfShape", "n", "zeros"),
            array("v", np.ones(2, np.float32)),
            node("ScatterND", "zeros i v", "y"),
        ],
        "ScatterND: an index from 0 to 9 into 9 elements",
    ),
    "one value for many places": (
        [
            array("i", np.array([[0], [1]])),
            ints("n", 3),
            node("ConstantOfShape", "n", "zeros"),
            node("ScatterND", "zeros i one", "y"),
        ],
        "takes 'one', which nothing made",
    ),
    "places of too many axes": (
        [array("i", np.zeros((1, 9), np.int64)), node("ScatterND", "s i s", "y")],
        "ScatterND: indices of shape",
    ),
    "an axis that is not there": (
        [node("Concat", "s s", "y", axis=1 << 40)],
        r"Concat: axis 1099511627776 of an array of 1 axes",
    ),
    "a negative axis": ([ints("i", -2), node("CumSum", "s i", "y")], "CumSum: axis -2"),
    "several axes": ([ints("i", 0, 0), node("CumSum", "s i", "y")], "CumSum: "),
    "an axis twice": ([ints("i", 0, -1), node("ReduceSum", "s i", "y")], "ReduceSum: "),
    "more ones than there are": ([ints("k", 1000), node("TopK", "s k", "v y")], "TopK: the 1000 l"),
    "fewer than none": ([ints("k", -1), node("TopK", "s k", "v y")], "TopK: the -1 largest"),
    "the largest of floats": ([ONE, ints("k", 1), node("TopK", "one k", "v y")], "TopK: .*float32"),
    "the largest of rows": (
        [ints("k", 1), array("m", np.eye(2, dtype=np.int64)), node("TopK", "m k", "v y")],
        r"TopK: the 1 largest of int64 \[2, 2\]",
    ),
    "a product of floats": (
        [array("m", np.eye(2)), array("v", np.ones(2)), node("MatMul", "m v", "y")],
        "MatMul: float64 .* no matrices or vectors that fit",
    ),
    "a product of matrices that do not fit": (
        [
            array("m", np.eye(2, dtype=np.int64)),
            array("w", np.eye(3, dtype=np.int64)),
            node("MatMul", "m w", "y"),
        ],
        "MatMul: .* no matrices or vectors that fit",
    ),
    "a product of stacks": (
        [array("m", np.ones((2, 2, 2), np.int64)), node("MatMul", "m m", "y")],
        "MatMul: .* no matrices or vectors that fit",
    ),
    "the larger of floats": (
        [array("m", np.eye(2)), node("Max", "m m", "y")],
        "Max: the largest of float64",
    ),
    "no permutation": ([node("Transpose", "s", "y", perm=[0, 0])], "Transpose: "),
    "a division by zero": ([node("Div", "s s", "y")], "Div: a division"),
    "a remainder of zero": ([node("Mod", "s s", "y")], "Mod: a division"),
    "a quotient that numpy rounds otherwise": (
        [node("Neg", "s", "n"), array("c", np.int32(3)), node("Div", "n c", "y")],
        "Div: a division of or by a negative number",
    ),
    "a remainder of floats": ([ONE, node("Mod", "one one", "y")], "Mod: a remainder of float32"),
    "a negative exponent": (
        [node("Neg", "s", "n"), node("Pow", "s n", "y")],
        "Pow: an exponent out of range",
    ),
    "a huge exponent": (
        [array("c", np.array([1 << 30], np.int32)), node("Pow", "s c", "y")],
        "Pow: an exponent out of range",
    ),
    "NaN as an exponent": (
        [array("c", np.array([np.nan], np.float32)), node("Pow", "c c", "y")],
        "Pow: an exponent out of range",
    ),
    "operands of two types": ([ONE, node("Add", "s one", "y")], "Add: operands of float32, int32"),
    "three operands": ([node("Add", "s s s", "y")], "Add: 3 operands, 2 expected"),
    "no operand": ([node("Concat", "", "y", axis=0)], "Concat: "),
    "shapes that do not fit": (
        [ints("n", 1, 2, 3), array("v", np.zeros(8, np.int64)), node("Add", "v n", "y")],
        "Add: ",
    ),
    "a condition of integers": ([node("Where", "s s s", "y")], "Where: a condition of int32"),
    "Cast to strings": ([node("Cast", "s", "y", to=8)], "Cast: element type 8"),
    "Cast to complex": ([node("Cast", "s", "y", to=15)], "Cast: element type 15"),
    "Cast to a type nobody knows": ([node("Cast", "s", "y", to=99)], "Cast: element type 99"),
    "Cast to nothing": ([node("Cast", "s", "y")], "Cast: "),
    "an attribute of a wrong type": ([node("Cast", "s", "y", to="x")], "Cast: "),
    "an attribute nobody knows": ([node("Identity", "s", "y", budget=1)], "Identity: "),
    "a list of strings as a constant": (
        [node("Constant", "", "y", value_strings=["a"])],
        "Constant: ",
    ),
    "a constant of nothing": ([node("Constant", "", "y")], "Constant: "),
    "a constant of strings": (
        [array("x", np.array(["a" * 99], object)), node("Add", "x x", "y")],
        "Constant: element type 8",
    ),
    "a fill of many values": (
        [
            ints("n", 3),
            node("ConstantOfShape", "n", "y", value=helper.make_tensor("", 1, [2], [1, 2])),
        ],
        "ConstantOfShape: ",
    ),
    "an operator of another domain": (
        [helper.make_node("Add", ["s", "s"], ["y"], domain="com.microsoft")],
        "the operator com.microsoft.Add, which no decode function has",
    ),
    "an operator with a body": (
        [node("If", "s", "y", then_branch=helper.make_graph([], "g", [], []))],
        "the operator If, which",
    ),
    "a value before it is made": ([node("Identity", "z", "y")], "takes 'z', which nothing made"),
    "an output nobody makes": ([node("Identity", "s", "z")], "never makes its output 'y'"),
    "more outputs than there are": ([node("Identity", "s", "y z")], "gives 1 values, 2 are named"),
    "a function that is missing": ([node(".x", "s", "y")], "the decode function 'x' is missing"),
    "an attribute that nobody gave": ([ints("n", 1)], "the attribute 'shape' is missing"),
}
DAMAGED["an attribute that nobody gave"][0][0].attribute[0].ref_attr_name = "shape"


@pytest.mark.parametrize("name", DAMAGED)
def test_a_program_that_makes_no_sense_is_refused(name):
    nodes, match = DAMAGED[name]
    refused(program(*nodes), f"^y0: cannot be decoded: .*{match}")


def test_a_stream_of_strings_is_refused():
    stream = np.array(["a" * 99], object)
    refused(program(node("Add", "s s", "y"), streams={"s": stream}), "stream 's' is damaged: .* 8")


def test_casts_of_nan_and_infinity_do_not_warn():
    values = np.array([np.nan, np.inf, -np.inf, 1e30], np.float32)
    for to in (TensorProto.INT4, TensorProto.UINT8, TensorProto.INT64, TensorProto.FLOAT16):
        model = program(array("v", values), node("Cast", "v", "y", to=to))
        assert first(model).shape == (4,)


def test_arithmetic_overflows_without_a_warning():
    large = array("v", np.array([2**31 - 1], np.int32))
    assert first(program(large, node("Add", "v v", "y"))).tolist() == [-2]
    assert first(program(large, node("Mul", "v v", "y"))).tolist() == [1]


# --- functions ---


def test_functions_that_call_themselves_are_refused():
    direct = program(node(".f", "s", "y"), functions={"f": [node(".f", "a", "y")]})
    refused(direct, "call each other without end")
    mutual = {"f": [node(".g", "a", "y")], "g": [node(".f", "a", "y")]}
    refused(program(node(".f", "s", "y"), functions=mutual), "call each other without end")


def test_calls_that_double_are_bounded_by_their_number(monkeypatch):
    names = [f"f{depth}" for depth in range(16)]
    functions = {
        name: [node(f".{below}", "a", f"v{k}") for k in range(20)] + [node("Identity", "v0", "y")]
        for name, below in itertools.pairwise(names)
    }
    functions[names[-1]] = [node("Identity", "a", "y")]
    model = program(node(".f0", "s", "y"), functions=functions)
    monkeypatch.setattr("prune2onnx.packing.codecs.limits._FREE_STEPS", 1 << 28)
    refused(model, "far more work than its streams warrant")


def test_work_is_bounded_by_the_streams(monkeypatch):
    monkeypatch.setattr("prune2onnx.packing.codecs.limits._FREE_STEPS", 1 << 28)
    model = program(*MILLION, *[node("Pow", "v v", f"p{k}") for k in range(999)], outputs="p9")
    refused(model, "far more work than its streams warrant")


def test_one_constant_many_times_is_work(monkeypatch):
    monkeypatch.setattr("prune2onnx.packing.codecs.limits._FREE_STEPS", 1 << 26)
    constant = ints("x", 1)
    constant.attribute[0].ref_attr_name = "n"
    model = program(
        node(".f", "s", "y", n=list(range(10_000))),
        functions={"f": [constant] * 5000 + [node("Identity", "a", "y")]},
    )
    refused(model, "far more work than its streams warrant")


def test_a_budget_is_for_all_calls_of_a_file():
    model = program(ints("n", 1 << 20), node("ConstantOfShape", "n", "y"), calls=50)
    with bounded(), pytest.raises(Prune2OnnxError, match=r"in all, .* --max-bytes"):
        unpack(model, MAX_BYTES)


def test_one_array_under_many_names_is_stored_once_for_each():
    nodes = [ints("n", 1 << 20), node("ConstantOfShape", "n", "y")]
    nodes += [node("Identity", "y", f"y{k}") for k in range(60)]
    model = program(*nodes, outputs=" ".join(f"y{k}" for k in range(60)))
    with bounded(20), pytest.raises(Prune2OnnxError, match="--max-bytes"):
        unpack(model, MAX_BYTES)


def test_a_shape_is_a_vector_as_in_onnxruntime():
    for reshape in ("Reshape", "Expand"):
        refused(program(array("n", np.int64(8)), node(reshape, "s n", "y")), "a shape in an array")
    refused(program(array("n", np.int64(8)), node("ConstantOfShape", "n", "y")), "a shape in an")


def test_a_call_whose_checksum_is_gone_is_refused():
    """It was decoded without a check."""
    whole = packed([weight("a", np.float32, (12, 10), 0.1, 5)], METHODS[6])
    wanted = unpack(whole)
    facts = whole.graph.node[0].attribute[0]
    as_raw = np.array(facts.t.int64_data).tobytes()
    changed = copy.deepcopy(whole)
    changed.graph.node[0].attribute[0].t.ClearField("int64_data")
    refused(changed, "a: the decode call has no checksum")
    changed.graph.node[0].attribute[0].t.raw_data = as_raw  # as other tools write it
    assert unpack(changed) == wanted
    damaged = copy.deepcopy(changed)
    damaged.graph.node[0].attribute[0].t.raw_data = bytes([as_raw[0] ^ 1]) + as_raw[1:]
    refused(damaged, "do not have the checksum")
    changed.graph.node[0].attribute[0].name = "j"
    refused(changed, "a: the decode call has no checksum")
    del changed.graph.node[0].attribute[:]
    refused(changed, "a: the decode call has no checksum")


def test_two_functions_of_one_name_are_refused():
    model = program(node("Identity", "s", "y"))
    model.functions.add().CopyFrom(model.functions[0])
    refused(model, "two decode functions are called 'c'")


def test_a_weight_that_is_decoded_twice_is_refused():
    model = program(node("Identity", "s", "y"))
    model.graph.node.add().CopyFrom(model.graph.node[0])
    with pytest.raises(Prune2OnnxError, match="y0: decoded twice"):
        coded(model)
    model = program(node("Identity", "s", "y"), outputs="y y")
    refused(model, "y0, y0: 2 weights decoded, 2 named, 1 names differ")


def test_a_call_with_too_few_streams_is_refused():
    model = program(node("Identity", "s", "y"))
    del model.graph.node[0].input[:]
    refused(model, "'c' is given 0 streams, it takes 1")
    model = program(node("Identity", "s", "y"))
    del model.graph.initializer[:]
    refused(model, "y0: the stream 's' is missing")


# --- the Huffman decoder ---


def coded_file(**changed: np.ndarray) -> ModelProto:
    """The symbols of two segments, one of the five streams replaced."""
    stream = huffman.encode([np.arange(9, dtype=np.uint8) % 5, np.zeros(700, np.uint8)])
    streams = {
        "data": stream.data.reshape(-1, 1),
        "internal": stream.internal[..., None],
        "starts": stream.starts,
        "tails": stream.tails.reshape(-1, 1),
        "base": np.zeros((2, 1), np.int32),
    } | changed
    model = program(node(f".{stream.op}", " ".join(streams), "y"), streams=streams)
    model.functions.extend(huffman_graph.functions(stream.op, 17, stream.internal.shape[1]))
    return model


BROKEN_STREAMS = {
    "impossible code lengths": {"internal": np.full((2, 12, 1), 9, np.uint8)},
    "too many internal nodes": {"internal": np.full((2, 12, 1), 255, np.uint8)},
    "codes of a strange shape": {"internal": np.zeros((24, 1), np.uint8)},
    "no codes": {"internal": np.zeros((0, 12, 1), np.uint8)},
    "codes of another type": {"internal": np.zeros((2, 12, 1), np.int64)},
    "no data": {"data": np.zeros((0, 1), np.uint16)},
    "data of another type": {"data": np.zeros((9, 1), np.float32)},
    "no lanes": {"starts": np.zeros(0, np.uint16)},
    "lanes past the end": {"starts": np.array([0, 65535, 65535], np.uint16)},
    "a lane that starts late": {"starts": np.array([3, 1], np.uint16)},
    "no segments": {"tails": np.zeros((0, 1), np.int32)},
    "segments that fall": {"tails": np.array([[3], [2]], np.int32)},
    "segments before the start": {"tails": np.array([[-5], [3]], np.int32)},
    "segments past the end": {"tails": np.array([[1], [2**31 - 1]], np.int32)},
    "too few bases": {"base": np.zeros((1, 1), np.int32)},
    "bases of another type": {"base": np.zeros((2, 1), np.float64)},
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
@pytest.mark.parametrize("ours", [True, False])
def test_a_broken_huffman_stream_is_refused_or_decodes_to_something(name, ours, monkeypatch):
    if not ours:
        monkeypatch.setattr("prune2onnx.packing.codecs.evaluator._is_ours", lambda *_: False)
    model = coded_file(**BROKEN_STREAMS[name])
    with bounded():
        try:
            unpack(model, MAX_BYTES)
        except Prune2OnnxError as error:
            assert str(error).startswith("y0: ")
        else:
            assert not ours


def test_the_size_of_a_million_tables_is_checked_before_they_are_made():
    model = coded_file(
        internal=np.zeros((100_000, 12, 1), np.uint8),
        tails=np.arange(1, 100_001, dtype=np.int32).reshape(-1, 1),
        base=np.zeros((100_000, 1), np.int32),
        data=np.zeros((100_000, 1), np.uint16),
    )
    refused(model, "--max-bytes")


def test_the_size_of_millions_of_lanes_is_checked_before_they_are_decoded():
    refused(coded_file(starts=np.zeros(1 << 20, np.uint16)), "--max-bytes")


# --- around the decoder ---


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("prune2onnx.ir_version", "x", "'x', expected a number below 8"),
        ("prune2onnx.ir_version", "9" * 5000, "expected a number below 8"),
        ("prune2onnx.ir_version", "-1", "expected a number below 8"),
        ("prune2onnx.ir_version", "٣", "expected a number below 8"),
        ("prune2onnx.tensors", "", "not the notes of weights in JSON"),
        ("prune2onnx.tensors", "[" * 50_000, "not the notes of weights in JSON"),
        ("prune2onnx.tensors", "[]", "not the notes of weights in JSON"),
        ("prune2onnx.tensors", "9" * 5000, "not the notes of weights in JSON"),
        ("prune2onnx.tensors", '{"y0": 1}', "not the notes of weights in JSON"),
        ("prune2onnx.tensors", '{"y0": {"doc_string": 1}}', "not the notes of weights in JSON"),
        ("prune2onnx.tensors", '{"y0": {".k": "\\ud800"}}', "not the notes of weights in JSON"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(key, value, match):
    model = program(node("Identity", "s", "y"))
    model.metadata_props.add(key=key, value=value)
    with bounded(), pytest.raises(Prune2OnnxError, match=match) as raised:
        unpack(model, MAX_BYTES)
    assert len(str(raised.value)) < 1000
    inspect(model, MAX_BYTES)  # does not read it


@pytest.mark.parametrize("skip", [-(2**63), -1, 2**31, 2**63 - 1])
def test_a_position_out_of_range_becomes_the_nearest(skip):
    model = packed(
        [weight("a", np.int8, (8, 9), 1, 5), weight("b", np.int8, (4, 9), 1, 5)], METHOD["levels"]
    )
    facts = model.graph.node[0].attribute[0].t.int64_data
    facts[1] = facts[4] = skip
    assert [t.name for t in unpack(model).graph.initializer] == ["a", "b"]


def test_a_stream_outside_of_the_file_is_refused():
    model = program(node("Identity", "s", "y"))
    stream = model.graph.initializer[0]
    stream.data_location = TensorProto.EXTERNAL
    stream.external_data.add(key="location", value="/etc/passwd")
    refused(model, "the stream 's' is damaged: data outside of the file")
    inside = TensorProto(data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    inside.external_data.add(key="location", value="/etc/passwd")
    refused(program(node("Constant", "", "y", value=inside)), "Constant: data outside of the file")


@pytest.mark.parametrize("dims", [[1 << 60], [-8], [2**63 - 1] * 9, [1] * 65, [0, 1 << 62], [7]])
def test_a_stream_of_another_size_than_it_says_is_refused(dims):
    model = program(node("Identity", "s", "y"))
    model.graph.initializer[0].dims[:] = dims
    refused(model, "y0: .*(the stream 's' is damaged|decoding needs|--max-bytes)")


def test_a_shape_of_a_million_axes_is_refused_before_its_product_is_taken():
    tensor = TensorProto(name="t", data_type=1, dims=[2**62] * 1_000_000)
    with bounded(), pytest.raises(Prune2OnnxError, match=r"t: .* 1,000,000 axes"):
        declared_nbytes(tensor)


def test_a_file_of_complex_numbers_is_inspected():
    tensor = numpy_helper.from_array(np.zeros(9, np.complex128), "c")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    (row,) = inspect(model).rows
    assert (row.dtype, row.nnz, row.entropy_nbytes) == ("complex128", 0, None)


NO_TEXT = b"\xff\xfe\xfa\xfb"


def with_names() -> ModelProto:
    """A packed file in which every text is "TEXT"."""
    model = packed([weight("TEXT", np.int8, (8, 9), 1, 5)], METHOD["levels"], coder="none")
    model.producer_name = model.doc_string = model.graph.name = model.graph.doc_string = "TEXT"
    model.metadata_props.add(key="TEXT", value="TEXT")
    model.graph.initializer.add(name="TEXT", data_type=3, dims=[99], raw_data=bytes(99))
    model.graph.initializer[-1].doc_string = "TEXT"
    sparse = model.graph.sparse_initializer.add(dims=[9])
    sparse.values.CopyFrom(TensorProto(name="TEXT", data_type=1, dims=[0]))
    sparse.indices.CopyFrom(TensorProto(data_type=7, dims=[0]))
    model.graph.value_info.add(name="TEXT")
    model.graph.node[1].doc_string = "TEXT"
    model.functions[0].node[-1].output[0] = "TEXT"
    model.functions[0].node[-1].attribute.add(name="TEXT")
    model.functions[0].output[0] = "TEXT"
    return model


def test_a_text_that_is_not_utf_8_is_refused_or_kept(tmp_path):
    content = with_names().SerializeToString()
    places = [at for at in range(len(content)) if content[at : at + 4] == b"TEXT"]
    assert len(places) > 15
    for at in places:
        endures(content[:at] + NO_TEXT + content[at + 4 :], str(tmp_path / "m.onnx"))
    endures(content.replace(b"TEXT", NO_TEXT), str(tmp_path / "m.onnx"))


@pytest.mark.parametrize("number", [-1, 0, 8, 14, 17, 23, 99])
def test_a_stream_of_an_unknown_element_type_is_refused(number):
    model = program(node("Identity", "s", "y"))
    model.graph.initializer[0].data_type = number
    refused(model, "y0: .*element type")
    del model.graph.node[:]
    model.graph.initializer[0].data_type = 99
    with pytest.raises(Prune2OnnxError, match="s: a damaged initializer"):
        inspect(model)


def test_names_do_not_control_the_terminal(tmp_path):
    name = "a[/b]\n\x1b[2J"
    tensor = numpy_helper.from_array(np.ones(9, np.float32), name)
    identity = helper.make_node("Identity", [name], ["y"])
    graph = helper.make_graph([identity], "g", [], [], [tensor])
    graph.output.append(helper.make_tensor_value_info("y", 1, [9]))
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    shown = CliRunner().invoke(main, ["inspect", str(path)], catch_exceptions=False)
    assert r"a[/b]\n\x1b[2J" in shown.output
    assert str(Prune2OnnxError(name)) == r"a[/b]\n\x1b[2J"


def test_a_dense_tensor_of_another_size_than_it_says_is_refused():
    tensor = TensorProto(name="t", data_type=1, dims=[1 << 40], raw_data=b"1234")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    with bounded(), pytest.raises(Prune2OnnxError, match=r"t: float of shape .* it has 4"):
        inspect(model)


def test_sparse_tensors_take_no_more_than_allowed_in_all():
    model = helper.make_model(helper.make_graph([], "g", [], []))
    for number in range(40):
        sparse = model.graph.sparse_initializer.add(dims=[1 << 18])
        sparse.values.CopyFrom(TensorProto(name=f"s{number}", data_type=1, dims=[0]))
        sparse.indices.CopyFrom(TensorProto(data_type=7, dims=[0]))
    for read in (inspect, from_sparse):
        with bounded(), pytest.raises(Prune2OnnxError, match="s16: a sparse tensor"):
            read(model, MAX_BYTES)


def test_inspect_measures_no_other_form_of_gigabytes_from_a_few_bytes(monkeypatch):
    monkeypatch.setattr("prune2onnx.packing.inspection._FREE_NBYTES", 100)
    model = program(ints("n", 1000), node("ConstantOfShape", "n", "y"), node("Identity", "s", "z"))
    (row,) = inspect(model).rows
    assert (row.size, row.zipped_nbytes) == (1000, None)
    monkeypatch.undo()
    (row,) = inspect(model).rows
    assert row.zipped_nbytes < 100


# --- valid files, damaged ---


def small_files() -> dict[str, ModelProto]:
    two = [weight("a", np.int8, (6, 5), 1, 0), weight("b", np.int8, (3, 5), 1, 0)]
    few = [weight("a", np.float32, (6, 5), 1, 3)]
    return {
        "raw": packed(two, METHOD["raw"], coder="none"),
        "levels": packed(few, METHOD["levels"], coder="none"),
    }


def holds(model: ModelProto, weights: dict[str, np.ndarray]) -> bool:
    """Whether these weights are in it: names, types, shapes and bits."""
    inside = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return all(
        name in inside
        and (inside[name].dtype, inside[name].shape) == (value.dtype, value.shape)
        and inside[name].tobytes() == value.tobytes()
        for name, value in weights.items()
    )


@pytest.mark.parametrize(("name", "step"), [("raw", 1), ("levels", 5)])
def test_a_flipped_bit_is_found_or_harmless_to_the_weights(name, step, tmp_path):
    """Of the bits of the whole file: an error, or each coded weight as it was, bit for bit."""
    model = small_files()[name]
    want = dict(coded(model).arrays)
    content = model.SerializeToString()
    path = tmp_path / "flipped.onnx"
    found = 0
    for bit in range(0, 8 * len(content), step):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert holds(unpack(load(path)), want), bit
        except Prune2OnnxError as error:
            assert "\n" not in str(error)
            found += 1
    assert found > 0.85 * 8 * len(content) / step


def test_a_flipped_bit_in_a_stream_of_ours_is_found_or_harmless():
    for method in ("codebook", "gap-planes", "mask-codebook"):
        model = packed([weight("a", np.float32, (6, 8), 0.5, 6)], METHOD[method])
        want = dict(coded(model).arrays)
        for tensor in model.graph.initializer:
            content = tensor.raw_data
            for bit in range(8 * len(content)):
                flipped = bytearray(content)
                flipped[bit // 8] ^= 1 << bit % 8
                tensor.raw_data = bytes(flipped)
                try:
                    assert holds(unpack(model), want)
                except Prune2OnnxError as error:
                    assert "\n" not in str(error)
            tensor.raw_data = content


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    model = small_files()["levels"]
    content = model.SerializeToString()
    want = dict(coded(model).arrays)
    path = tmp_path / "cut.onnx"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        try:
            assert holds(unpack(load(path)), want)  # without imports, say, or metadata
        except Prune2OnnxError as error:
            assert "\n" not in str(error)


def peak_nbytes() -> int:
    """The most memory that this process ever had, native code included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def endures(content: bytes, path: str) -> None:
    """The fuzzer's condition: a result or an error, but no crash, with and without `load`."""
    before, start = peak_nbytes(), time.process_time()
    Path(path).write_bytes(content)
    with contextlib.suppress(Prune2OnnxError):
        load(path, MAX_BYTES)
    model = ModelProto.FromString(content)
    for read in (
        lambda: unpack(model, MAX_BYTES),
        lambda: inspect(model, MAX_BYTES),
        lambda: from_sparse(unpack(load(path, MAX_BYTES), MAX_BYTES), MAX_BYTES),
    ):
        try:
            read()
        except Prune2OnnxError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
    assert time.process_time() - start < SECONDS
    assert peak_nbytes() - before < 8 * MAX_BYTES


SEEDS = [model for _, model in seeds()]
FUZZED = settings(
    max_examples=400,
    deadline=None,  # `endures` measures the time of this process alone
    suppress_health_check=list(HealthCheck),
)


@FUZZED
@given(number=st.integers(0, len(SEEDS) - 1), random=st.randoms(use_true_random=True))
def test_files_whose_parts_were_changed_are_refused_or_open(number, random, tmp_path_factory):
    changed = mutated(SEEDS[number], Random(random.random()), SEEDS)
    endures(changed.SerializeToString(), str(tmp_path_factory.getbasetemp() / "changed.onnx"))


@FUZZED
@given(
    number=st.integers(0, len(SEEDS) - 1),
    changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=5),
    cut=st.none() | st.integers(0, 5000),
)
def test_files_whose_bytes_were_changed_are_refused_or_open(number, changes, cut, tmp_path_factory):
    content = bytearray(SEEDS[number].SerializeToString())
    for place, byte in changes:
        content[place % len(content)] = byte
    path = str(tmp_path_factory.getbasetemp() / "bytes.onnx")
    with contextlib.suppress(DecodeError):  # no protobuf message: `load` says so
        endures(bytes(content[:cut]), path)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.onnx")), ids=lambda path: path.stem)
def test_a_frozen_file_does_no_harm_when_changed(path, tmp_path):  # version 1: no checksum
    model = ModelProto.FromString(path.read_bytes())
    for seed in range(20):
        content = mutated(model, Random(seed), SEEDS).SerializeToString()
        endures(content, str(tmp_path / "changed.onnx"))


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("nonzero", [0, 9])
def test_a_valid_gigabyte_from_a_few_bytes_is_allowed(dtype, nonzero):
    array = np.zeros((1 << 22) // np.dtype(dtype).itemsize, dtype)
    array[:nonzero] = 1
    element_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    for method in ("gap-raw", "gap-levels"):
        model = packed([Weight("w", array.reshape(64, -1), element_type)], METHOD[method])
        budget = budget_of(model, 1 << 31)
        free, steps = limits._FREE_STEPS, budget._steps
        for _ in decodings_of(model, budget):
            pass
        assert 256 * (steps - budget._steps) < free
