"""Which initializers are weights, through whatever exporters put between them and a layer."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune2onnx.packing.approximation.approximate import approximate
from prune2onnx.packing.approximation.roles import roles


def behind(nodes: list[onnx.NodeProto], **tensors: np.ndarray) -> dict[str, str]:
    """Initializer -> its kind, or why it may not change, in a model of these nodes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    found = roles(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    return {name: role.kind or role.reason for name, role in found.items()}


INT8 = np.random.default_rng(0).integers(-127, 128, (64, 64)).astype(np.int8)
SCALE = np.random.default_rng(1).uniform(0.01, 0.02, (1, 64)).astype(np.float32)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("point", [None, np.float32(3), np.full((1, 64), 2, np.float32)])
def test_int8_weights_behind_a_cast_and_a_scale_are_weights(first, point):
    nodes = [helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT)]
    tensors = {"w": INT8, "s": SCALE}
    if point is not None:
        nodes.append(helper.make_node("Sub", ["f", "p"], ["g"]))
        tensors["p"] = point
    names = [nodes[-1].output[0], "s"]
    nodes.append(helper.make_node("Mul", names[::-1] if first else names, ["d"]))
    nodes.append(helper.make_node("MatMul", ["x", "d"], ["y"]))
    assert behind(nodes, **tensors)["w"] == "integer"


def test_a_difference_that_is_no_zero_point_keeps_the_weight():
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["f", "p"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    assert "no zero point" in behind(nodes, w=INT8, p=np.float32(0.5))["w"]
    assert behind(nodes, w=INT8, p=np.float32(2))["w"] == "integer"
    assert "integer" in behind(nodes, w=INT8.astype(np.float32), p=np.float32(2))["w"]


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent_weights_behind_slices_are_weights(op):
    """As torch exports them: rows of gates in another order, joined again."""
    nodes = []
    for name in ("w", "r"):
        for part, (begin, end) in enumerate((("a", "b"), ("b", "c"))):
            nodes.append(helper.make_node("Slice", [name, begin, end, "zero"], [f"{name}{part}"]))
        nodes.append(helper.make_node("Concat", [f"{name}1", f"{name}0"], [f"{name}c"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}c", "zero"], [f"{name}u"]))
    nodes.append(helper.make_node(op, ["x", "wu", "ru"], ["y"], hidden_size=16))
    numbers = {"a": [0], "b": [32], "c": [64], "zero": [0]}
    weights = {name: np.ones((64, 16), np.float32) for name in ("w", "r")}
    stored = {k: np.int64(v) for k, v in numbers.items()}
    found = behind(nodes, **weights, **stored)
    assert found["w"] == found["r"] == "weight"
    constant = helper.make_node("Constant", [], ["zero"], value_ints=[0])  # as in a body
    del stored["zero"]
    found = behind([constant, *nodes], **weights, **stored)
    assert found["w"] == found["r"] == "weight"


def test_weights_of_quantized_recurrent_layers_and_behind_quantize_are_weights():
    lstm = helper.make_node(
        "DynamicQuantizeLSTM",
        ["x", "w", "r", "", "", "", "", "", "ws", "wz", "rs", "rz"],
        ["y"],
        domain="com.microsoft",
        hidden_size=16,
    )
    point, scale = np.zeros(1, np.int8), np.ones(1, np.float32)
    stacked = INT8[None]
    found = behind([lstm], w=stacked, r=stacked, ws=scale, rs=scale, wz=point, rz=point)
    assert found["w"] == found["r"] == "integer"
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    given = {"w": INT8.astype(np.float32), "s": np.float32(0.1), "z": np.int8(0)}
    assert behind(nodes, **given)["w"] == "weight"


def test_what_stays_is_said_with_its_share():
    nodes = [
        helper.make_node("Erf", ["odd"], ["o"]),
        helper.make_node("Add", ["x", "o"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    values = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [numpy_helper.from_array(v, n) for n, v in zip(("odd", "w"), values, strict=True)],
    )
    made = approximate(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), bits=4
    )
    first, second = made.notes
    assert "with what stays" in first and "89% of the bytes stay: odd: read by Erf" in second
