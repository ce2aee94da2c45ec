"""Layers timed by themselves: each weight has a time, and more work takes longer."""

import numpy as np
import pytest
from networks import model
from onnx import ModelProto, helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.runtime.layer_times import layer_times


def network(side: object = 24) -> ModelProto:
    """A wide convolution, a narrow one of the same pixels twice, and a linear layer."""
    rng = np.random.default_rng(0)
    shapes = {"wide": (64, 3, 3, 3), "big": (64, 64, 3, 3), "last": (64, 10)}
    nodes = [
        helper.make_node("Conv", ["x", "wide"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "big"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["b", "big"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "last"], ["y"]),
    ]
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return model(nodes, tensors, {"x": ["N", 3, side, side]}, {"y": ["N", 10]})


@pytest.mark.parametrize("int8", [False, True])
def test_each_weight_has_its_time(int8):
    times = layer_times(network(), int8=int8)
    assert list(times) == ["wide", "big", "last"]
    # twice 64 inputs in place of 3; 24 x 24 places in place of one
    assert times["big"] > 1.5 * times["wide"] > 0
    assert times["big"] > 2 * times["last"] > 0


def test_more_examples_take_longer():
    assert layer_times(network(), batch=16)["big"] > 2 * layer_times(network())["big"]


def test_an_unknown_shape_is_an_error():
    with pytest.raises(Prune2OnnxError, match=r"wide: the shape .* --channels-price macs"):
        layer_times(network("height"))


def test_what_is_no_layer_takes_nothing():
    node = helper.make_node("Relu", ["x"], ["y"])
    assert layer_times(model([node], {}, {"x": ["N", 3]}, {"y": ["N", 3]})) == {}
