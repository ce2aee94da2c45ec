"""Stripping: a smaller file, with the same outputs under the same names."""

import numpy as np
import onnx
import pytest
from networks import (
    MODELS,
    branches,
    convnet,
    mlp,
    model,
    operators,
    optimised,
    run,
    value,
    weights,
)
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from prune2onnx.graph.domain import MARK
from prune2onnx.graph.names import anonymize, rename
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.strip import strip
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack

each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def long_names(made: ModelProto, text: str) -> None:
    """Renames every inner value."""
    given = {value.name for value in made.graph.output}
    inner = [name for node in made.graph.node for name in node.output if name not in given]
    for node in made.graph.node:
        node.output[:] = [text.format(name) if name in inner else name for name in node.output]
    rename(made.graph, {name: text.format(name) for name in inner})


def annotated(dense: ModelProto) -> ModelProto:
    """Adds everything that exporters write and no runtime reads."""
    result = ModelProto()
    result.CopyFrom(dense)
    result.producer_name, result.producer_version = "exporter", "1.2"
    result.domain, result.model_version, result.doc_string = "com.example", 3, "a model"
    result.metadata_props.add(key="author", value="me")
    result.graph.doc_string = "a graph"
    for number, node in enumerate(result.graph.node):
        node.name, node.doc_string = f"node_{number}_of_a_long_path/module", "stack trace"
        node.metadata_props.add(key="namespace", value="a.b.c")
    long_names(result, "/module/layer/{}_output_0")
    inferred = onnx.shape_inference.infer_shapes(result)
    assert inferred.graph.value_info
    return inferred


def floats(model: ModelProto) -> dict:
    """Its weights without constants of int64, which get other names."""
    return {n: each for n, each in weights(model).items() if each[0] != TensorProto.INT64}


def assert_equal(one: ModelProto, other: ModelProto) -> None:
    for got, want in zip(run(one), run(other), strict=True):
        np.testing.assert_array_equal(got, want)


@each_model
def test_outputs_are_equal_and_weights_inputs_and_outputs_keep_their_names(build):
    dense = build()
    before = dense.SerializeToString()
    small = strip(dense).model
    onnx.checker.check_model(small, full_check=True)
    assert dense.SerializeToString() == before
    assert small.ByteSize() <= dense.ByteSize()
    assert floats(small) == floats(dense)
    assert list(small.graph.input) == list(dense.graph.input)
    assert list(small.graph.output) == list(dense.graph.output)
    assert operators(optimised(small, "ORT_ENABLE_ALL")) == operators(
        optimised(dense, "ORT_ENABLE_ALL")
    )
    assert_equal(small, dense)
    assert strip(small).model == small


@pytest.mark.parametrize("build", [mlp, convnet])
def test_what_no_runtime_reads_is_gone(build):
    long = annotated(build())
    small = strip(long).model
    assert_equal(small, build())
    assert small.ByteSize() < long.ByteSize() - 80 * len(long.graph.node)
    assert small.SerializeToString() == strip(small).model.SerializeToString()
    for word in (b"exporter", b"author", b"stack trace", b"namespace", b"/module", b"a graph"):
        assert word not in small.SerializeToString()
    assert not small.graph.value_info
    # Annotations change nothing, but for the names that have to be made.
    assert small.ByteSize() <= strip(build()).model.ByteSize() + 4 * len(long.graph.node)


def attributes(m: ModelProto) -> list[set[str]]:
    return [{attribute.name for attribute in node.attribute} for node in m.graph.node]


def pooled(*nodes) -> ModelProto:
    rng = np.random.default_rng(0)
    return model(
        nodes,
        {"w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32)},
        {"x": [1, 3, 9, 9]},
        {"y": None},
    )


def test_attributes_that_repeat_a_default_are_gone():
    full = pooled(
        helper.make_node(
            "Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], strides=[1, 1], dilations=[1, 1],
            group=1, pads=[0, 0, 0, 0], auto_pad="NOTSET",
        ),
        helper.make_node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2], strides=[1, 1], ceil_mode=0),
        helper.make_node("LeakyRelu", ["m"], ["l"], alpha=0.01),
        helper.make_node("Softmax", ["l"], ["y"], axis=-1),
    )  # fmt: skip
    small = strip(full).model
    assert attributes(small) == [set(), {"kernel_shape"}, set(), set()]
    assert_equal(small, full)


def test_attributes_that_differ_from_the_default_stay():
    full = pooled(
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 1], dilations=[1, 2], pads=[1] * 4),
        helper.make_node("AveragePool", ["c"], ["m"], kernel_shape=[2, 2], count_include_pad=1),
        helper.make_node("LeakyRelu", ["m"], ["l"], alpha=0.02),
        helper.make_node("Softmax", ["l"], ["y"], axis=1),
    )
    small = strip(full).model
    assert attributes(small) == attributes(full)
    assert_equal(small, full)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_stays(auto_pad):
    full = pooled(
        helper.make_node(
            "Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], strides=[1, 1], auto_pad=auto_pad
        ),
        helper.make_node(
            "MaxPool", ["c"], ["y"], kernel_shape=[3, 3], strides=[1, 1], auto_pad=auto_pad
        ),
    )
    small = strip(full).model
    assert attributes(small) == attributes(full)
    assert_equal(small, full)


def test_defaults_are_those_of_the_models_own_operator_set():
    """Softmax had another axis before opset 13."""
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    old = model(nodes, {}, {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, opset=11)
    assert attributes(strip(old).model) == [set()]
    assert_equal(strip(old).model, old)
    new = model(nodes, {}, {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, opset=13)
    assert attributes(strip(new).model) == [{"axis"}]


def test_bodies_keep_the_outer_values_they_use():
    """The bodies of `branches` use an input; these use inner values with long names too."""
    long = branches()
    long_names(long, "a_long_name_of_{}")
    inner = helper.make_graph(
        [helper.make_node("Neg", ["a_long_name_of_l"], ["negative"])],
        "inner",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["a_long_name_of_l"], ["kept"])],
        "other",
        [],
        [helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)],
    )
    last = long.graph.node.pop()
    choice = helper.make_node(
        "If", ["a_long_name_of_flag"], ["a_long_name"], then_branch=inner, else_branch=other
    )
    last.input[0] = "a_long_name"
    long.graph.node.extend([choice, last])
    onnx.checker.check_model(long, full_check=True)
    small = strip(long).model
    assert b"a_long_name" not in small.SerializeToString()
    assert_equal(small, long)
    assert strip(small).model == small


def test_short_names_stay():
    dense = mlp()
    assert [list(n.output) for n in strip(dense).model.graph.node] == [
        list(n.output) for n in dense.graph.node
    ]


def test_many_values_are_renamed_once():
    count = 1500  # more than there are names of two letters
    names = ["x", *(f"value_{number}" for number in range(count - 1)), "y"]
    nodes = [
        helper.make_node("Abs" if number else "Neg", [names[number]], [names[number + 1]])
        for number in range(count)
    ]
    long = model(nodes, {}, {"x": [2]}, {"y": [2]})
    small = strip(long).model
    assert small.ByteSize() < long.ByteSize() - 10 * count
    assert strip(small).model == small
    assert len({name for node in small.graph.node for name in node.output}) == count


@each_model
def test_a_packed_model_stays_packed_and_can_be_unpacked(build):
    packed = pack(build()).model
    small = strip(packed).model
    assert is_packed(small) and small.ByteSize() <= packed.ByteSize()
    assert any(entry.key == MARK for entry in small.metadata_props)
    assert floats(unpack(small)) == floats(normalize(build()).model)
    assert_equal(small, packed)


def test_constants_of_int64_get_short_names_and_few_bytes():
    shape = numpy_helper.from_array(np.array([8], np.int64), "a_long_name_of_a_shape")
    nodes = [helper.make_node("Reshape", ["x", shape.name], ["y"])]
    long = model(nodes, {shape.name: numpy_helper.to_array(shape)}, {"x": [2, 4]}, {"y": [8]})
    (tensor,) = strip(long).model.graph.initializer
    assert len(tensor.name) == 1 and not tensor.HasField("raw_data")
    assert numpy_helper.to_array(tensor).tolist() == [8]
    assert_equal(strip(long).model, long)


def test_stripped_then_packed_is_smaller_still():
    long = annotated(mlp())
    assert pack(strip(long).model).model.ByteSize() < pack(long).model.ByteSize()
    assert unpack(pack(strip(long).model).model) == strip(long).model


def test_weights_that_nothing_uses_go():
    m = parser.parse_model(
        """<ir_version: 8, opset_import: ["":17]> g (float[2] x, bool c) => (float[2] y)
        <float[2] w = {1, 2}, float[2] inside = {3, 4}, float[2] given = {5, 6},
         float[2] n = {7, 8}>
        { a = Add(x, w)
          y = If (c) <then_branch = t () => (float[2] s) { s = Mul(a, inside) },
                      else_branch = e () => (float[2] z) { z = Identity(given) }> }"""
    )
    assert [tensor.name for tensor in strip(m).model.graph.initializer] == ["w", "inside", "given"]


@pytest.mark.parametrize(
    ("inner", "shape", "becomes"),
    [
        ([2, 3, 4], [-1, 24], "Flatten"),
        ([24], [-1, 24], "Flatten"),
        ([2, 3, 4], [-1, 12], "Reshape"),
        ([2, "C", 4], [-1, 24], "Reshape"),
        ([2, 3, 4], [2, -1], "Reshape"),
    ],
)
def test_a_reshape_that_only_flattens_is_flatten(inner, shape, becomes):
    dense = model(
        [
            helper.make_node("Relu", ["x"], ["h"]),
            helper.make_node("Reshape", ["h", "shape"], ["y"], allowzero=1),
        ],
        {"shape": np.array(shape, np.int64)},
        {"x": ["N", *inner]},
        {"y": ["M", "K"]},
    )
    small = strip(dense).model
    assert [node.op_type for node in small.graph.node] == ["Relu", becomes]
    assert len(small.graph.initializer) == (becomes == "Reshape")
    onnx.checker.check_model(small, full_check=True)
    assert_equal(small, dense)


@each_model
def test_anonymous_weights_are_the_same_weights(build):
    dense = normalize(build()).model
    short = anonymize(dense)
    made, renamed = short.model, short.new_name
    onnx.checker.check_model(made, full_check=True)
    assert list(made.graph.input) == list(dense.graph.input)
    assert list(made.graph.output) == list(dense.graph.output)
    for one, other in zip(made.graph.initializer, dense.graph.initializer, strict=True):
        assert one.name == renamed.get(other.name, other.name)
        assert one.raw_data == other.raw_data
    assert_equal(made, dense)


def test_shapes_of_what_is_added_before_a_layer_normalization_stay():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["long_name_of_a_product"]),
        helper.make_node("Add", ["x", "long_name_of_a_product"], ["long_name_of_a_sum"]),
        helper.make_node("LayerNormalization", ["long_name_of_a_sum", "s"], ["n"]),
        helper.make_node("Add", ["n", "x"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(8, 8)).astype(np.float32), "s": np.ones(8, np.float32)}
    made = model(nodes, weights, {"x": ["a", "b", 8]}, {"y": ["a", "b", 8]})
    made.graph.value_info.extend(
        value(name, ["a", "b", 8]) for name in ("long_name_of_a_product", "long_name_of_a_sum", "n")
    )
    made.graph.value_info[0].doc_string = "a note"
    stripped = strip(made).model
    (stated,) = stripped.graph.value_info
    assert stated.name == stripped.graph.node[0].output[0] and len(stated.name) == 1
    assert [axis.dim_param or axis.dim_value for axis in stated.type.tensor_type.shape.dim] == [
        "a",
        "b",
        8,
    ]
    assert not stated.doc_string
    assert strip(stripped).model == stripped
