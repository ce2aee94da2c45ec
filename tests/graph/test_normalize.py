"""Any model is normalized: weights keep their bits, outputs stay, what cannot move has a reason."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.rewritten import Rewritten
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack

FLOAT = TensorProto.FLOAT
BACKEND = Path(onnx.__file__).parent / "backend" / "test" / "data"


def weight(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape or (8, 8)).astype(np.float32)


def tensor(name: str, array: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(array, name)


def constant(name: str, array: np.ndarray, **fields: str) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array), **fields)


def value(name: str, shape=("N", 8), kind: int = FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, tensors=(), inputs=("x",), outputs=("y",), opset=17, ir_version=8, **rest):
    graph = helper.make_graph(
        nodes,
        "net",
        [value(i) if isinstance(i, str) else i for i in inputs],
        [value(o, None) if isinstance(o, str) else o for o in outputs],
        list(tensors),
    )
    opsets = rest.pop("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **rest)


def feeds(m: ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    stored = {t.name for t in m.graph.initializer}
    given = {}
    for i in m.graph.input:
        kind = i.type.tensor_type
        shape = [dim.dim_value or 3 for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if i.name not in stored:
            drawn = rng.normal(size=shape)
            given[i.name] = np.asarray(drawn > 0 if dtype == np.bool_ else drawn).astype(dtype)
    return given


def run(m: ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        m.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, given)


def weights(m: ModelProto) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in m.graph.initializer}


def checked(m: ModelProto, given=None) -> Rewritten:
    """Normalizes a model and checks what must hold for every model."""
    before = m.SerializeToString()
    result = normalize(m)
    assert m.SerializeToString() == before
    given = feeds(m) if given is None else given
    wanted = run(m, given)
    complete = ModelProto()  # the checker wants a shape for every output
    complete.CopyFrom(result.model)
    for output, array in zip(complete.graph.output, wanted, strict=True):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        output.CopyFrom(value(output.name, array.shape, kind))
    onnx.checker.check_model(complete, full_check=True)
    assert weights(m).items() <= weights(result.model).items()
    again = normalize(result.model)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert again.notes == () and again.reasons == result.reasons
    for got, want in zip(run(result.model, given), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    return result


def test_a_normalized_model_comes_back_equal():
    m = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", weight(0))])
    m.metadata_props.add(key="author", value="me")
    result = checked(m)
    assert result.model.SerializeToString() == m.SerializeToString()
    assert result.notes == () and result.reasons == {}


def test_external_data_must_be_loaded():
    m = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", weight(0))])
    m.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(Prune2OnnxError, match="w: its external data is not loaded"):
        normalize(m)


# --- inputs and IR versions ---


@pytest.mark.parametrize(("ir_version", "expected"), [(3, 4), (4, 4), (8, 8)])
def test_initializers_that_are_inputs_become_constants(ir_version, expected):
    names = [f"w{i}" for i in range(5)]
    m = model(
        [helper.make_node("Sum", ["x", *names], ["y"])],
        [tensor(name, weight(i, 8)) for i, name in enumerate(names)],
        ["x", *(value(name, [8]) for name in names)],
        ir_version=ir_version,
    )
    result = checked(m)
    assert [i.name for i in result.model.graph.input] == ["x"]
    assert result.model.ir_version == expected
    assert "5 initializers" in result.notes[0] and "w0, w1, w2 and 2 more" in result.notes[0]


def test_the_first_ir_versions_are_refused():
    m = model([helper.make_node("Relu", ["x"], ["y"])], ir_version=2)
    with pytest.raises(Prune2OnnxError, match=r"IR version 2.*export it"):
        normalize(m)


def test_a_model_of_other_domains_alone_gets_onnx_operators():
    node = helper.make_node(
        "Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0], scale=[2.0] * 1
    )
    m = model([node], opset_imports=[helper.make_opsetid("ai.onnx.ml", 2)])
    result = checked(m)
    assert [(e.domain, e.version) for e in result.model.opset_import] == [
        ("ai.onnx.ml", 2),
        ("", 13),
    ]
    assert "imports opset 13" in result.notes[0]


# --- constants ---


@pytest.mark.parametrize(
    "node",
    [
        constant("w", weight(0), doc_string="a note"),
        helper.make_node("Constant", [], ["w"], value_floats=weight(0, 8, 8)[0].repeat(3)[:24]),
    ],
    ids=["value", "value_floats"],
)
def test_constants_become_initializers_under_their_name(node):
    m = model([node, constant("small", weight(1, 8)), helper.make_node("Sum", ["x", "s"], ["y"])])
    reduce = helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0)
    m.graph.node.insert(2, reduce)
    m.graph.node[0].metadata_props.add(key="k", value="v")
    m.graph.value_info.append(value("w", None))
    result = checked(m)
    graph = result.model.graph
    assert [n.op_type for n in graph.node] == ["Constant", "ReduceSum", "Sum"]
    (stored,) = graph.initializer
    assert stored.name == "w" and stored.doc_string == node.doc_string
    assert [(e.key, e.value) for e in stored.metadata_props] == [("k", "v")]
    assert list(graph.value_info) == list(m.graph.value_info)
    assert result.notes == ("moved 1 weight from Constant nodes to initializers",)


def test_constants_keep_their_order_and_integers_come_too():
    m = model(
        [
            constant("a", weight(0)),
            helper.make_node("Constant", [], ["b"], value_ints=[0, 1, 0, 1, 0, 1, 0, 1]),
            constant("c", weight(2)),
            helper.make_node("Gather", ["a", "b"], ["g"]),
            helper.make_node("Sum", ["x", "g", "c"], ["y"]),
        ],
        inputs=[value("x", [8, 8])],
    )
    result = checked(m)
    assert [t.name for t in result.model.graph.initializer] == ["a", "b", "c"]


def test_a_constant_that_is_an_output_stays_with_a_reason():
    m = model([constant("y", weight(0))], inputs=())
    result = checked(m)
    assert result.model == m
    assert result.reasons == {"y": "also an output of the graph"}


def test_strings_stay():
    words = np.array([b"word"] * 99, dtype=object)
    m = model([constant("y", words)], inputs=(), outputs=[value("y", [99], TensorProto.STRING)])
    assert checked(m).model == m


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.INT4, 17, TensorProto.BOOL])
def test_constants_of_any_type_move_bit_for_bit(kind):
    raw = TensorProto(dims=[16, 16], data_type=kind, raw_data=bytes(256))
    if kind == TensorProto.BFLOAT16:
        raw.raw_data = bytes(range(256)) * 2
    elif kind == TensorProto.INT4:
        raw.raw_data = bytes(range(128))
    node = helper.make_node("Constant", [], ["w"], value=raw)
    cast = helper.make_node("Cast", ["w"], ["y"], to=FLOAT)
    m = model([node, cast], inputs=(), opset=21, ir_version=10)
    (stored,) = checked(m).model.graph.initializer
    raw.name = "w"
    assert stored == raw


# --- sparse tensors ---


def sparse(name: str, shape, where, what=None, kind: int = FLOAT) -> onnx.SparseTensorProto:
    where = np.asarray(where, np.int64)
    if what is None:
        what = np.arange(1, len(where) + 1, dtype=helper.tensor_dtype_to_np_dtype(kind))
    result = onnx.SparseTensorProto(dims=shape, indices=tensor("", where))
    result.values.CopyFrom(tensor(name, what))
    return result


def sparse_model(held: onnx.SparseTensorProto) -> ModelProto:
    m = model([helper.make_node("MatMul", ["x", "w"], ["y"])])
    m.graph.sparse_initializer.append(held)
    return m


@pytest.mark.parametrize(
    "where", [[0, 13, 63], [[0, 0], [1, 5], [7, 7]], []], ids=["linear", "coordinates", "empty"]
)
def test_sparse_initializers_become_dense(where):
    held = sparse("w", [8, 8], np.asarray(where).reshape(-1, 2) if where == [] else where)
    held.values.doc_string = "kept"
    m = sparse_model(held)
    given = {"x": weight(3)}
    result = normalize(m)
    expected = np.zeros(64, np.float32)
    expected[[0, 13, 63][: len(where)]] = [1, 2, 3][: len(where)]
    (stored,) = result.model.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(stored), expected.reshape(8, 8))
    assert stored.name == "w" and stored.doc_string == "kept"
    assert result.notes == ("made 1 sparse initializer dense",)
    if where:
        np.testing.assert_array_equal(run(m, given)[0], run(result.model, given)[0])
        assert normalize(result.model).model == result.model


def test_sparse_constants_become_initializers():
    node = helper.make_node(
        "Constant", [], ["w"], sparse_value=sparse("", [8, 8], [0, 13, 63], weight(0, 3))
    )
    result = checked(model([node, helper.make_node("MatMul", ["x", "w"], ["y"])]))
    (stored,) = result.model.graph.initializer
    assert np.count_nonzero(numpy_helper.to_array(stored)) == 3


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (sparse("w", [8, 8], [0, 64, 1]), "w: an index lies outside"),
        (sparse("w", [8, 8], [[0, 0], [0, 8], [1, 1]]), "w: an index lies outside"),
        (sparse("w", [8, 8], [0, -1, 1]), "w: an index lies outside"),
        (sparse("w", [8, 8], [5, 5, 1]), "w: an index occurs twice"),
        (sparse("w", [8, -8], [5]), "w: its shape .* negative"),
        (sparse("w", [2**60, 2**60], [5]), r"w: its shape .* takes [\d,]{30,} bytes"),
        (sparse("w", [8, 8], [[1, 2, 3]]), "w: its indices have shape"),
        (sparse("w", [8, 8], [1, 2, 3], weight(0, 2)), "w: its indices have shape"),
        (sparse("w", [8, 8], [1, 2], weight(0, 2, 1)), "w: its values must be"),
    ],
)
def test_a_damaged_sparse_tensor_is_named_before_anything_is_allocated(held, message):
    with pytest.raises(Prune2OnnxError, match=message):
        normalize(sparse_model(held))


def test_sparse_tensors_may_be_bounded():
    held = sparse("w", [8, 8], [0])
    assert normalize(sparse_model(held), max_bytes=256).notes
    with pytest.raises(Prune2OnnxError, match=r"w: .* takes 256 bytes dense, 255 are still"):
        normalize(sparse_model(held), max_bytes=255)


# --- subgraphs ---


def branch(name: str, nodes, tensors=(), output: str = "") -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [value(output or f"{name}_y")], list(tensors))


def choice(then: onnx.GraphProto, other: onnx.GraphProto, **rest) -> ModelProto:
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    return model([node], inputs=["x", value("c", [], TensorProto.BOOL)], **rest)


def product(name: str, right: str) -> NodeProto:
    return helper.make_node("MatMul", ["x", right], [f"{name}_y"])


def both_ways(m: ModelProto) -> Rewritten:
    for on in (False, True):
        result = checked(m, {**feeds(m), "c": np.array(on)})
    return result


def test_weights_leave_branches_and_names_that_collide_are_made_new():
    then = branch("t", [constant("w", weight(0)), product("t", "w")])
    then.value_info.append(value("w", [8, 8]))
    other = branch("e", [product("e", "w")], [tensor("w", weight(1)), tensor("s", weight(2, 3))])
    other.quantization_annotation.add(tensor_name="w")
    result = both_ways(choice(then, other))
    graph = result.model.graph
    assert [t.name for t in graph.initializer] == ["w_1", "w_2"]
    bodies = [attribute.g for attribute in graph.node[0].attribute]
    assert [[t.name for t in body.initializer] for body in bodies] in ([[], ["s"]], [["s"], []])
    assert not any(body.value_info for body in bodies)
    assert {a.tensor_name for b in bodies for a in b.quantization_annotation} == {"w_1"}
    assert result.notes == ("moved 2 weights out of subgraphs",)


def test_a_unique_name_is_kept_and_equal_weights_are_stored_once():
    then = branch("t", [product("t", "mine")], [tensor("mine", weight(0))])
    other = branch("e", [constant("yours", weight(0)), product("e", "yours")])
    result = both_ways(choice(then, other))
    assert [t.name for t in result.model.graph.initializer] == ["yours"]  # else comes first
    assert result.notes == ("moved 2 weights out of subgraphs, 1 of them different",)


def test_a_branch_that_outputs_a_weight_copies_it():
    then = branch("t", [constant("w", weight(0))], output="w")
    other = branch("e", [], [tensor("v", weight(1))], output="v")
    m = choice(then, other)
    result = normalize(m)  # onnxruntime refuses a branch that outputs an initializer
    assert {t.name for t in result.model.graph.initializer} == {"w_1", "v_1"}
    for on, array in ((True, weight(0)), (False, weight(1))):
        (got,) = run(result.model, {"x": weight(2), "c": np.array(on)})
        np.testing.assert_array_equal(got, array)
    assert normalize(result.model).model == result.model


def test_weights_leave_nested_bodies():
    inner = helper.make_node(
        "If",
        ["go"],
        ["turned"],
        then_branch=branch(
            "t",
            [helper.make_node("MatMul", ["state", "deep"], ["t_y"])],
            [tensor("deep", weight(1))],
        ),
        else_branch=branch(
            "e",
            [constant("deep", weight(2)), helper.make_node("MatMul", ["state", "deep"], ["e_y"])],
        ),
    )
    body = helper.make_graph(
        [
            inner,
            helper.make_node("MatMul", ["turned", "loop"], ["next"]),
            helper.make_node("Identity", ["go"], ["going"]),
        ],
        "body",
        [
            value("i", [], TensorProto.INT64),
            value("go", [], TensorProto.BOOL),
            value("state", [3, 8]),
        ],
        [value("going", [], TensorProto.BOOL), value("next", [3, 8])],
        [tensor("loop", weight(3))],
    )
    step = helper.make_graph(
        [helper.make_node("Mul", ["row", "scale"], ["scaled"])],
        "step",
        [value("row", [8])],
        [value("scaled", [8])],
        [tensor("scale", weight(4, 16)[:8].repeat(2)[:8])],
    )
    step.initializer[0].CopyFrom(tensor("scale", weight(4, 8).astype(np.float64)))
    step.node[0].CopyFrom(helper.make_node("Mul", ["wide", "scale"], ["product"]))
    step.node.insert(0, helper.make_node("Cast", ["row"], ["wide"], to=TensorProto.DOUBLE))
    step.node.append(helper.make_node("Cast", ["product"], ["scaled"], to=FLOAT))
    m = model(
        [
            helper.make_node("Loop", ["count", "", "x"], ["z"], body=body),
            helper.make_node("Scan", ["z"], ["y"], body=step, num_scan_inputs=1),
        ],
        [tensor("count", np.array(2))],
        [value("x", [3, 8])],
    )
    result = checked(m)
    names = {t.name for t in result.model.graph.initializer}
    assert names == {"count", "loop", "deep_1", "deep_2", "scale"}
    assert unpack(pack(result.model).model) == result.model


def test_subgraphs_of_unknown_operators_are_left_with_a_reason():
    body = branch("b", [product("b", "w")], [tensor("w", weight(0))])
    node = helper.make_node("Search", ["x"], ["y"], domain="mine", decoder=body)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    m = model([node], opset_imports=imports)
    result = normalize(m)
    assert result.model == m
    assert "mine.Search" in result.reasons["w"]


def test_weights_in_attributes_are_named():
    node = helper.make_node("Odd", ["x"], ["y"], domain="mine", table=[0.5] * 300)
    m = model([node], opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)])
    assert normalize(m).reasons == {"y": "table is an attribute of Odd"}


# --- functions ---

MINE = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]


def function(name: str, inputs, outputs, nodes, domain: str = "f", **rest) -> onnx.FunctionProto:
    return helper.make_function(domain, name, inputs, outputs, nodes, MINE, **rest)


def call(name: str, inputs, outputs, domain: str = "f") -> NodeProto:
    return helper.make_node(name, inputs, outputs, domain=domain)


def test_weights_leave_functions_through_every_call():
    inner = function(
        "inner",
        ["a", "b"],
        ["c"],
        [constant("w", weight(0)), helper.make_node("MatMul", ["a", "w"], ["c"])],
    )
    outer = function(
        "outer",
        ["a"],
        ["c"],
        [
            call("inner", ["a"], ["h"]),
            constant("w", weight(1)),
            constant("again", weight(1)),
            helper.make_node("MatMul", ["h", "w"], ["i"]),
            helper.make_node("MatMul", ["i", "again"], ["c"]),
        ],
    )
    then = branch("t", [call("outer", ["x"], ["t_y"])])
    other = branch("e", [call("inner", ["x"], ["e_y"])])
    m = choice(then, other, opset_imports=MINE, functions=[outer, inner])
    result = both_ways(m)
    signatures = {f.name: list(f.input) for f in result.model.functions}
    assert signatures == {"inner": ["a", "b", "w"], "outer": ["a", "w", "w_1"]}
    graph = result.model.graph
    assert [t.name for t in graph.initializer] == ["w_1", "w_2"]
    calls = {a.name: a.g.node[0] for a in graph.node[0].attribute}
    assert list(calls["else_branch"].input) == ["x", "", "w_1"]
    assert list(calls["then_branch"].input) == ["x", "w_2", "w_1"]
    assert result.notes == (
        "moved 3 weights out of functions, which have new inputs for them, 2 of them different",
    )
    packed = pack(result.model).model
    assert unpack(packed) == result.model


def test_a_function_that_outputs_a_weight_copies_it():
    given = function("given", ["a"], ["w"], [constant("w", weight(0))])
    m = model(
        [call("given", ["x"], ["h"]), helper.make_node("MatMul", ["x", "h"], ["y"])],
        opset_imports=MINE,
        functions=[given],
    )
    result = checked(m)
    (f,) = result.model.functions
    assert list(f.output) == ["w"] and f.node[0].op_type == "Identity"


def test_weights_leave_bodies_in_functions():
    chosen = helper.make_node(
        "If",
        ["on"],
        ["c"],
        then_branch=branch(
            "t", [helper.make_node("MatMul", ["a", "w"], ["t_y"])], [tensor("w", weight(0))]
        ),
        else_branch=branch("e", [helper.make_node("Identity", ["a"], ["e_y"])]),
    )
    m = model(
        [call("pick", ["x", "c"], ["y"])],
        inputs=["x", value("c", [], TensorProto.BOOL)],
        opset_imports=MINE,
        functions=[function("pick", ["a", "on"], ["c"], [chosen])],
    )
    result = both_ways(m)
    assert list(result.model.functions[0].input) == ["a", "on", "w_1"]
    assert [t.name for t in result.model.graph.initializer] == ["w"]


def test_what_stays_in_functions_has_a_reason():
    def holding(name, domain="f", more=()):
        nodes = [constant(f"{name}_w", weight(0)), *more]
        nodes.append(helper.make_node("MatMul", ["a", f"{name}_w"], ["c"]))
        return function(name, ["a"], ["c"], nodes, domain)

    asked = function("asked", ["a"], ["c"], [], attributes=["v"])
    node = asked.node.add(op_type="Constant", output=["c"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="v")
    m = model(
        [
            call("known", ["x"], ["h"], "com.microsoft"),
            call("one", ["h"], ["i"]),
            helper.make_node("asked", ["i"], ["y"], domain="f", v=tensor("", weight(1))),
        ],
        opset_imports=[*MINE, helper.make_opsetid("com.microsoft", 1)],
        functions=[
            holding("known", "com.microsoft"),
            holding("one", more=[call("two", ["a"], ["unused"])]),
            holding("two", more=[call("one", ["a"], ["unused"])]),
            holding("dead"),
            asked,
        ],
    )
    result = normalize(m)
    assert result.model == m
    assert "runtimes know" in result.reasons["known_w"]
    assert "each other" in result.reasons["one_w"] and "each other" in result.reasons["two_w"]
    assert "never called" in result.reasons["dead_w"]


def test_a_packed_model_stays_packed():
    array = np.zeros((200, 200), np.float32)
    array[::9] = 0.5
    m = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [tensor("w", array)],
        [value("x", ["N", 200])],
    )
    packed = pack(m).model
    assert packed != m and normalize(packed).model == packed


# --- opset 7 to 12 ---

OLD = {
    "upsample 7": (7, "(float[1,2,3,4] x) => (y)", "y = Upsample<scales=[1.0,1.0,2.0,3.0]>(x)"),
    "upsample 9 linear": (
        9,
        "(float[1,2,3,4] x) => (y)",
        's = Constant<value=float[4] {1,1,2,2}>() y = Upsample<mode="linear">(x, s)',
    ),
    "upsample 9 fraction": (
        9,
        "(float[1,2,5,7] x) => (y)",
        "s = Constant<value=float[4] {1,1,1.7,2.3}>() y = Upsample(x, s)",
    ),
    "resize 10 down": (
        10,
        "(float[1,2,9,9] x) => (y, z)",
        "s = Constant<value=float[4] {1,1,0.4,0.6}>() y = Resize(x, s)"
        ' z = Resize<mode="linear">(x, s)',
    ),
    "resize 10 up": (
        10,
        "(float[1,2,5,5] x) => (y)",
        "s = Constant<value=float[4] {1,1,1.3,2.7}>() y = Resize(x, s)",
    ),
    "slice": (9, "(float[5,6,7] x) => (y)", "y = Slice<starts=[1,2],ends=[4,-1],axes=[0,2]>(x)"),
    "slice all axes": (7, "(float[5,6] x) => (y)", "y = Slice<starts=[1,2],ends=[4,9]>(x)"),
    "topk": (9, "(float[5,6] x) => (y)", "y, i = TopK<k=3,axis=0>(x)"),
    "clip": (10, "(float[5,6] x) => (y)", "a = Clip<max=0.5>(x) y = Clip<min=-0.25,max=0.3>(a)"),
    "clip without bounds": (7, "(float[5] x) => (y)", "y = Clip(x)"),
    "clip half": (7, "(float16[5,6] x) => (float16[5,6] y)", "y = Clip<min=-0.5,max=0.5>(x)"),
    "pad": (
        10,
        "(float[2,3,4] x) => (y, z)",
        "y = Pad<pads=[0,1,2,0,0,-1],value=1.5>(x) z = Pad<pads=[0,0,1,0,0,1],mode='edge'>(x)",
    ),
    "pad double": (7, "(double[2,3] x) => (double[4,3] y)", "y = Pad<pads=[1,0,1,0],value=2.0>(x)"),
    "dropout": (7, "(float[5,6] x) => (y)", "y, m = Dropout<ratio=0.3>(x)"),
    "dropout 10": (11, "(float[5,6] x) => (y)", "y = Dropout(x)"),
    "batch normalization": (
        8,
        "(float[2,3,4,4] x) => (y)",
        "s = Constant<value=float[3] {1,2,3}>() y = BatchNormalization<spatial=1>(x, s, s, s, s)",
    ),
    "scatter": (
        9,
        "(float[3,4] x, float[1,2] u) => (y)",
        "i = Constant<value=int64[1,2] {0,2}>() y = Scatter<axis=1>(x, i, u)",
    ),
    "axes": (
        11,
        "(float[3,1,4] x) => (y, z, w)",
        "a = Squeeze<axes=[1]>(x) b = Unsqueeze<axes=[0,-1]>(a) y = ReduceSum<axes=[-2]>(b)"
        " z = ReduceSum(a) w = Squeeze(x)",
    ),
    "split": (11, "(float[3,5] x) => (y, z)", "y, z = Split<axis=1,split=[2,3]>(x)"),
    "split evenly": (7, "(float[3,4] x) => (y, z)", "y, z = Split<axis=1>(x)"),
    "softmax of a class axis": (12, "(float[N,5] x) => (y)", "y = Softmax(x)"),
    "softmax of pixels": (9, "(float[2,5,1,1] x) => (y)", "y = Softmax<axis=1>(x)"),
    "softmax of several axes": (11, "(float[N,2,3] x) => (y)", "y = Softmax(x)"),
    "softmax of the last axis": (11, "(float[N,2,3] x) => (y)", "y = LogSoftmax<axis=-1>(x)"),
    "softmax of all": (11, "(float[2,3,4] x) => (y)", "y = LogSoftmax<axis=0>(x)"),
    "hardmax": (11, "(float[2,3,4] x) => (y)", "y = Hardmax<axis=1>(x)"),
    "in a branch": (
        11,
        "(float[3,4] x, bool c) => (y)",
        "y = If(c)<then_branch = t () => (float[] a) { a = ReduceSum<axes=[1]>(x) },"
        "else_branch = e () => (float[] b) { p = Softmax<axis=0>(x) b = ReduceSum<axes=[1]>(p) }>",
    ),
    "nothing to do": (7, "(float[3,4] x, float[4] b) => (y)", "y = Add(x, b)"),
}


@pytest.mark.parametrize(("opset", "signature", "nodes"), OLD.values(), ids=OLD)
def test_old_operators_are_rewritten(opset, signature, nodes):
    nodes = nodes.replace("'", '"')
    outputs = signature.split("=>")[1]
    if " y)" not in outputs or "[" not in outputs:
        typed = outputs.replace("(", "(float[] ").replace(",", ", float[]")
        signature = signature.replace(outputs, typed)
    m = parser.parse_model(
        f'<ir_version: 7, opset_import: ["": {opset}]> g {signature} {{{nodes}}}'
    )
    for output in m.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    result = checked(m)
    assert result.notes[0] == f"converted from opset {opset} to 13"


def test_softmax_becomes_one_node_where_the_shape_is_known():
    for name, axis in (
        ("softmax of a class axis", -1),
        ("softmax of pixels", 1),
        ("softmax of the last axis", -1),
    ):
        opset, signature, nodes = OLD[name]
        signature = signature.replace("(y)", "(float[] y)")
        text = f'<ir_version: 7, opset_import: ["": {opset}]> g {signature} {{{nodes}}}'
        (node,) = normalize(parser.parse_model(text)).model.graph.node
        assert helper.get_node_attr_value(node, "axis") == axis


def test_conversion_keeps_everything_but_operators():
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["u"], "name", "doc", axes=[0]),
        helper.make_node("Squeeze", ["u"], ["s"], axes=[0]),
        helper.make_node("Thing", ["s"], ["t"], domain="mine", f=1.5),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ]
    nodes[0].metadata_props.add(key="k", value="v")
    imports = [helper.make_opsetid("", 11), helper.make_opsetid("mine", 3)]
    m = model(nodes, [tensor("w", weight(0))], opset_imports=imports, producer_name="somebody")
    m.metadata_props.add(key="author", value="me")
    m.graph.value_info.append(value("u", [1, "N", 8]))
    m.graph.quantization_annotation.add(tensor_name="w")
    m.training_info.add().algorithm.name = "kept"
    result = normalize(m).model
    assert [n.op_type for n in result.graph.node] == [
        "Constant", "Unsqueeze", "Squeeze", "Thing", "MatMul",
    ]  # fmt: skip
    changed = result.graph.node[1]
    assert (changed.name, changed.doc_string) == ("name", "doc") and changed.metadata_props
    assert list(result.graph.node[2].input) == ["u", changed.input[1]]
    assert list(result.graph.node[3:]) == list(m.graph.node[2:])
    for field in ("producer_name", "metadata_props", "training_info", "ir_version"):
        assert getattr(result, field) == getattr(m, field)
    for field in ("input", "output", "value_info", "initializer", "quantization_annotation"):
        assert list(getattr(result.graph, field)) == list(getattr(m.graph, field))


def test_functions_of_an_old_opset_are_converted():
    old = [helper.make_opsetid("", 11), helper.make_opsetid("f", 1)]
    f = helper.make_function(
        "f", "soft", ["a"], ["b"], [helper.make_node("Softmax", ["a"], ["b"], axis=1)], old
    )
    m = model(
        [call("soft", ["x"], ["y"])],
        inputs=[value("x", [2, 3, 4])],
        opset_imports=old,
        functions=[f],
    )
    result = checked(m)
    assert [n.op_type for n in result.model.functions[0].node] == [
        "Shape", "Flatten", "Softmax", "Reshape",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("opset", "nodes", "message"),
    [
        (5, "y = Relu(x)", "opset 5.*export"),
        (6, "y = BatchNormalization(x,x,x,x,x)", "y: BatchNormalization .* training mode"),
        (6, "y = Upsample(x)", "y: Upsample .* no scales"),
        (
            8,
            "y = BatchNormalization<spatial=0>(x,x,x,x,x)",
            r"y: BatchNormalization .*\(spatial=0\)",
        ),
        (8, "a, m = Dropout(x) y = Add(a, m)", "a, m: Dropout .* mask"),
        (10, "s = Constant<value=float[2] {0.5,2}>() y = Resize(x, s)", "y: Resize .* shrinks"),
    ],
)
def test_what_cannot_be_converted_is_named(opset, nodes, message):
    text = (
        f'<ir_version: 7, opset_import: ["":{opset}]> g (float[4,4] x) => (float[] y) {{{nodes}}}'
    )
    with pytest.raises(Prune2OnnxError, match=message):
        normalize(parser.parse_model(text))


def test_computed_scales_are_noted():
    text = (
        '<ir_version: 7, opset_import: ["":10]> g (float[1,1,4,4] x, float[4] s) => (float[] y)'
        "{y = Resize(x, s)}"
    )
    m = parser.parse_model(text)
    m.graph.output[0].type.tensor_type.ClearField("shape")
    scales = np.array([1, 1, 2.5, 1.5], np.float32)
    result = checked(m, {**feeds(m), "s": scales})
    assert "y: its scales are computed" in result.notes[1]


# --- onnx's own models ---


def backend_models() -> list[Path]:
    """Every tenth of the small ones that the installed onnx ships, and one large one."""
    paths = [
        path
        for folder in ("simple", "pytorch-converted")
        for path in (BACKEND / folder).rglob("*.onnx")
    ]
    key = {path: hashlib.sha256(path.parent.name.encode()).digest() for path in paths}
    light = BACKEND / "light" / "light_squeezenet.onnx"
    return [*sorted(paths, key=key.get)[:10], *([light] if light.exists() else [])]


@pytest.mark.parametrize("path", backend_models(), ids=lambda path: path.parent.name)
def test_models_of_onnx_are_checked_and_give_their_outputs(path):
    m = onnx.load(path)
    result = normalize(m)
    assert any(note.startswith("converted from opset") for note in result.notes)
    if path.parent.name == "light":
        given = feeds(m)
        np.testing.assert_array_equal(*(run(n, given)[0] for n in (m, result.model)))
    folder = path.parent / "test_data_set_0"
    if m.opset_import[0].version == 6 and folder.exists():
        # onnxruntime has no kernels for some operators of opset 6; the outputs come with the model
        stored = [
            [
                numpy_helper.to_array(TensorProto.FromString(file.read_bytes()))
                for file in sorted(folder.glob(f"{kind}_*.pb"))
            ]
            for kind in ("input", "output")
        ]
        names = [value.name for value in result.model.graph.input]
        got = run(result.model, dict(zip(names, stored[0], strict=True)))
        for one, other in zip(got, stored[1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "shape", "expected"),
    [
        ("Add<broadcast=1, axis=1>", [3], lambda x, b: x + b[:, None, None]),
        ("Add<broadcast=1, axis=-3>", [3], lambda x, b: x + b[:, None, None]),
        ("Mul<broadcast=1, axis=1>", [3, 4], lambda x, b: x * b[:, :, None]),
        ("Sub<broadcast=1>", [4, 5], lambda x, b: x - b),
        ("Div<broadcast=1, axis=0>", [2, 3, 4, 5], lambda x, b: x / b),
        ("PRelu", [3], lambda x, b: np.where(x < 0, x * b[:, None, None], x)),
        ("PRelu", [1], lambda x, b: np.where(x < 0, x * b, x)),
    ],
)
def test_broadcasting_of_opset_6_is_that_of_numpy(node, shape, expected):
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(2, 3, 4, 5)), rng.uniform(0.5, 2, size=shape)
    x, b = x.astype(np.float32), b.astype(np.float32)
    m = parser.parse_model(
        f"""<ir_version: 3, opset_import: ["":6]>
        g (float[2,3,4,5] x, float{shape} b) => (float[2,3,4,5] y) {{ y = {node}(x, b) }}"""
    )
    m.graph.initializer.append(numpy_helper.from_array(b, "b"))
    (y,) = run(normalize(m).model, {"x": x})
    np.testing.assert_allclose(y, expected(x, b), rtol=1e-6)


def test_softmax_behind_a_computed_shape_becomes_one_node():
    """Its rank follows from the number of entries of the shape."""
    text = """<ir_version: 7, opset_import: ["": 9]> g (float[N,6,1,1] x) => (float[] y) {
        s = Shape(x) n = Slice<axes=[0], starts=[0], ends=[1]>(s)
        m = Constant<value = int64[1] {-1}>() r = Concat<axis=0>(n, m)
        f = Reshape(x, r) e = Expand(f, r) y = Softmax(e) }"""
    result = normalize(parser.parse_model(text))
    assert [n.op_type for n in result.model.graph.node][-3:] == ["Reshape", "Expand", "Softmax"]
    assert result.notes == ("converted from opset 9 to 13",)


def test_softmax_that_takes_more_operators_is_noted():
    text = """<ir_version: 7, opset_import: ["": 9]> g (float[2,3,4] x) => (float[] y) {
        y = Softmax(x) }"""
    result = checked(parser.parse_model(text))
    assert any("y: Softmax over several axes" in note for note in result.notes)
