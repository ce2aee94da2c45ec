"""A walk through a network: its values, with weights that change on the way."""

import networks
import numpy as np
import pytest
from onnx import helper, numpy_helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.packing.calibration import walk as walks
from prune2onnx.packing.calibration.rows import states_of
from prune2onnx.packing.calibration.walk import Walk
from prune2onnx.runtime.compare import run_all

RNG = np.random.default_rng(0)


def residual():
    """x through two layers, the input of the first added at the end; `r` is read twice."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["n"]),
        helper.make_node("Add", ["n", "r"], ["s"]),
        helper.make_node("Add", ["s", "x"], ["y"]),
    ]
    weights = {name: RNG.normal(size=(8, 8)).astype(np.float32) for name in "ab"}
    return networks.model(nodes, weights, {"x": ["N", 8]}, {"y": ["N", 8]})


def values(model, name: str, batches):
    probe = type(model)()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(helper.make_empty_tensor_value_info(name))
    return [outputs[0] for outputs in run_all(probe, batches)]


@pytest.mark.parametrize("held", [1 << 30, 0])
def test_values_are_those_of_the_whole_network(held, monkeypatch):
    monkeypatch.setattr(walks, "HELD_NBYTES", held)
    model = residual()
    batches = [{"x": RNG.normal(size=(n, 8)).astype(np.float32)} for n in (3, 5)]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    with Walk(model, tensors, batches, run_all) as walk:
        for at, name in ((2, "r"), (4, "s")):
            walk.advance(at)
            for got, want in zip(walk.value(name), values(model, name, batches), strict=True):
                assert isinstance(got, np.memmap) == (not held)
                np.testing.assert_allclose(got, want, atol=1e-6)
        with pytest.raises(KeyError):
            walk._values[0]["m"]  # nobody reads it any more


def test_weights_may_change_before_their_node_runs():
    model = residual()
    batches = [{"x": RNG.normal(size=(3, 8)).astype(np.float32)}]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    other = numpy_helper.from_array(np.eye(8, dtype=np.float32), "b")
    with Walk(model, tensors, batches, run_all) as walk:
        walk.advance(2)
        r = walk.value("r")[0]
        tensors["b"] = other
        walk.advance(4)
        np.testing.assert_allclose(walk.value("s")[0], 2 * r, atol=1e-6)


def test_states_of_a_recurrent_layer_without_that_output():
    weights = {n: RNG.normal(size=(1, 20, k)).astype(np.float32) for n, k in (("w", 6), ("r", 5))}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "y"], hidden_size=5, name="lstm")
    model = networks.model([node], weights, {"x": [7, 2, 6]}, {"y": [1, 2, 5]})
    x = RNG.normal(size=(7, 2, 6)).astype(np.float32)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    with Walk(model, tensors, [{"x": x}], run_all) as walk:
        (states,) = walk.value(states_of(node))
    (outputs,) = run_all(model, [{"x": x}])
    assert states.shape == (7, 1, 2, 5)
    np.testing.assert_allclose(states[-1], outputs[0], atol=1e-6)


def test_a_sequence_is_refused():
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["s"]),
        helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
    ]
    model = networks.model(nodes, {}, {"x": [4, 2]}, {"y": [4, 2]})
    with (
        Walk(model, {}, [{"x": np.zeros((4, 2), np.float32)}], run_all) as walk,
        pytest.raises(Prune2OnnxError, match="cannot be calibrated"),
    ):
        walk.advance(1)
