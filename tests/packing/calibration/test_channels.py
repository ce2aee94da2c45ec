"""Whole channels and neurons that go by examples, and what is refit to make up for them."""

import networks
import numpy as np
import pytest
from examples import BATCHES, HELD, convnet
from onnx import helper

from prune2onnx.commands.lossy import calibrate
from prune2onnx.packing.calibration.calibrate import Calibration
from prune2onnx.packing.calibration.channels import refit_inputs
from prune2onnx.packing.calibration.zeros import Pattern
from prune2onnx.runtime.compare import output_error, run_all
from prune2onnx.shrinking.shrink import shrink


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def twins(kept: int, copies: int):
    """Hidden neurons of which each has copies: a network of the few could do the same."""
    rng = np.random.default_rng(0)
    first = np.repeat(rng.normal(size=(12, kept)), copies, 1)
    weights = {
        "a": first + rng.normal(0, 1e-4, first.shape),
        "b": np.repeat(rng.normal(0, 0.1, kept), copies),
        "c": rng.normal(0, 0.2, (kept * copies, 6)),
        "d": np.zeros(6),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["n"]),
        helper.make_node("Relu", ["n"], ["h"]),
        helper.make_node("MatMul", ["h", "c"], ["o"]),
        helper.make_node("Add", ["o", "d"], ["y"]),
    ]
    weights = {name: np.float32(array) for name, array in weights.items()}
    return networks.model(nodes, weights, {"x": ["N", 12]}, {"y": ["N", 6]})


def test_neurons_that_others_can_replace_go_without_an_error():
    model = twins(10, 4)
    x = np.random.default_rng(1).normal(size=(6, 50, 12)).astype(np.float32)
    batches = [{"x": part} for part in x]
    made = calibrate(model, batches[:4], batches[4:], channels=0.74)
    assert shapes(made.model)["a"] == (12, 10) and shapes(made.model)["c"] == (10, 6)
    assert output_error(model, batches[4:])(made.model) < 0.02
    assert "30 channels and neurons are gone, with 75% of the weights" in made.notes[0]
    # by their size alone, neurons of which no copy is left would go, too
    mute = twins(10, 4)
    (weight,) = (t for t in mute.graph.initializer if t.name == "c")
    array = np.frombuffer(weight.raw_data, np.float32).reshape(40, 6).copy()
    array[np.argsort(np.abs(array).sum(1))[:30]] = 0
    weight.raw_data = array.tobytes()
    assert output_error(model, batches[4:])(mute) > 0.3


def heads_alike():
    """Attention of four heads of four places, of which the first two do the same."""
    rng = np.random.default_rng(0)
    weights = {}
    for name in ("q", "k", "v"):
        array = rng.normal(size=(16, 16))
        array[:, 4:8] = array[:, :4] + rng.normal(0, 1e-4, (16, 4))
        weights[name] = np.float32(array)
    weights |= {"o": np.float32(rng.normal(size=(16, 16)))}
    weights |= {"split": np.array([0, 0, 4, 4]), "join": np.array([0, 0, 16])}
    nodes = []
    for name, turned in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        nodes += [
            helper.make_node("MatMul", ["x", name], [f"{name}1"]),
            helper.make_node("Reshape", [f"{name}1", "split"], [f"{name}2"]),
            helper.make_node("Transpose", [f"{name}2"], [f"{name}3"], perm=turned),
        ]
    nodes += [
        helper.make_node("MatMul", ["q3", "k3"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v3"], ["h"]),
        helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "join"], ["r"]),
        helper.make_node("MatMul", ["r", "o"], ["y"]),
    ]
    return networks.model(nodes, weights, {"x": ["N", 10, 16]}, {"y": ["N", 10, 16]})


def test_a_head_that_another_one_can_replace_goes_without_an_error():
    model = heads_alike()
    x = np.random.default_rng(1).normal(size=(6, 40, 10, 16)).astype(np.float32)
    batches = [{"x": part} for part in x]
    made = calibrate(model, batches[:4], batches[4:], channels=0.2)
    found = shapes(made.model)
    assert [found[name] for name in "qkvo"] == [(16, 12)] * 3 + [(12, 16)]
    assert output_error(model, batches[4:])(made.model) < 0.02


def test_channels_of_convolutions_go_in_blocks_and_what_reads_them_is_refit():
    model = convnet()
    made = Calibration(model, BATCHES, run_all, pattern=Pattern(channels=0.4)).at(None)
    shrunk = shrink(made.model, multiple=4)
    left = shapes(shrunk.model)
    assert all(left[f"{name}.w"][0] % 4 == 0 for name in "abc")
    before, after = (
        sum(np.prod(shape) for name, shape in one.items() if name.endswith(".w"))
        for one in (shapes(model), left)
    )
    assert 0.4 <= 1 - after / before < 0.6
    error = output_error(model, HELD)
    np.testing.assert_allclose(error(shrunk.model), error(made.model), rtol=1e-3)
    alone = convnet()  # the same channels, without a refit
    zeros = {tensor.name: tensor for tensor in made.model.graph.initializer}
    for tensor in alone.graph.initializer:
        if tensor.name in ("b.w", "c.w", "d.w"):
            own = np.frombuffer(tensor.raw_data, np.float32)
            gone = np.frombuffer(zeros[tensor.name].raw_data, np.float32) == 0
            tensor.raw_data = np.where(gone, 0, own).astype(np.float32).tobytes()
    assert error(shrunk.model) < 0.8 * error(alone)


def test_channels_and_bits_go_together():
    model = convnet()
    made = calibrate(model, BATCHES, HELD, channels=0.3, bits=4)
    assert shapes(made.model) != shapes(model) and set(made.quantized) == {
        *("a.w", "b.w", "c.w", "d.w")
    }
    assert output_error(model, HELD)(made.model) < 0.7


def test_a_network_whose_channels_are_all_outputs_says_so():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights = {"w": np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)}
    model = networks.model(nodes, weights, {"x": ["N", 12]}, {"y": ["N", 12]})
    x = np.random.default_rng(1).normal(size=(4, 50, 12)).astype(np.float32)
    batches = [{"x": part} for part in x]
    made = calibrate(model, batches[:3], batches[3:], channels=0.5)
    assert made.model.graph.initializer[0] == model.graph.initializer[0]
    assert made.notes[0].startswith("0 channels and neurons are gone, with 0% of the weights, not")


def test_inputs_that_stay_are_refit_by_least_squares():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    first = rng.normal(size=(1, 6, 3))
    stay = np.array([[True, False, True, True, False, True]])
    found = refit_inputs(first, (x.T @ x)[None], stay)
    want = np.linalg.lstsq(x[:, stay[0]], x @ first[0], rcond=None)[0]
    np.testing.assert_allclose(found[0][stay[0]], want, atol=1e-8)
    assert not found[0][~stay[0]].any()
    with pytest.raises(np.linalg.LinAlgError):
        refit_inputs(first, np.zeros((1, 6, 6)), stay)
