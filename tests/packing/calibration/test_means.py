"""Means that a graph tells: what onnxruntime computes for inputs that are distributed so."""

import networks
import numpy as np
import pytest
from onnx import helper

from prune2onnx.packing.approximation.approximate import approximate
from prune2onnx.packing.approximation.subject import Subject
from prune2onnx.packing.calibration.means import Means
from prune2onnx.runtime.compare import run_all

RNG = np.random.default_rng(0)
SHAPE = (64, 32, 12, 12)  # of inputs
OUTPUTS = 64


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def norm() -> tuple[list, dict]:
    """A BatchNormalization whose statistics are those of normal inputs."""
    node = helper.make_node("BatchNormalization", ["x", "factor", "shift", "m", "v"], ["n"])
    channels = SHAPE[1]
    weights = {
        "factor": np.abs(normal(channels)) + 0.5,
        "shift": 2 * normal(channels),
        "m": np.zeros(channels, np.float32),
        "v": np.ones(channels, np.float32),
    }
    return [node], weights


def mean_error(model, made) -> float:
    """Of the means of the outputs' channels, relative to the errors' own power."""
    x = normal(*SHAPE)
    (before,), (after,) = (run_all(one, [{"x": x}])[0] for one in (model, made))
    off = after.astype(np.float64) - before
    return float(np.square(off.mean((0, 2, 3))).sum() / np.square(off).mean((0, 2, 3)).sum())


ACTIVATIONS = {
    "Relu": ([helper.make_node("Relu", ["n"], ["a"])], {}),
    "Clip": (
        [helper.make_node("Clip", ["n", "low", "high"], ["a"])],
        {"low": np.float32(0), "high": np.float32(6)},
    ),
    "SiLU": (
        [helper.make_node("Sigmoid", ["n"], ["s"]), helper.make_node("Mul", ["n", "s"], ["a"])],
        {},
    ),
    "a factor for each channel": (
        [helper.make_node("Mul", ["n", "f"], ["a"])],
        {"f": normal(SHAPE[1], 1, 1)},
    ),
}
READERS = {
    "bias": ([helper.make_node("Conv", ["a", "w", "b"], ["y"])], {"b": normal(OUTPUTS)}),
    "sum": (
        [helper.make_node("Conv", ["a", "w"], ["c"]), helper.make_node("Add", ["c", "b"], ["y"])],
        {"b": normal(OUTPUTS, 1, 1)},
    ),
    "mean": (
        [
            helper.make_node("Conv", ["a", "w"], ["c"]),
            helper.make_node("BatchNormalization", ["c", "b2", "b2", "b", "b2"], ["y"]),
        ],
        {"b": normal(OUTPUTS), "b2": np.abs(normal(OUTPUTS)) + 0.5},
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_means_of_outputs_stay(activation, reader):
    before, weights = norm()
    (between, more), (after, rest) = ACTIVATIONS[activation], READERS[reader]
    weights |= {"w": normal(OUTPUTS, SHAPE[1], 3, 3)} | more | rest
    model = networks.model([*before, *between, *after], weights, {"x": SHAPE}, {"y": None})
    subject = Subject(model, None)
    chosen = subject.within(2)
    plain = mean_error(model, subject.rounded(chosen).model)
    made = approximate(model, bits=2)
    shifted = mean_error(model, made.model)
    assert shifted < 0.15 * plain
    assert shifted < 0.01
    rows = {row.name: row for row in made.rows}
    assert rows["b"].how in ("shifted", "float16")


def test_layer_normalization_and_matrices():
    weights = {
        "factor": np.abs(normal(48)) + 0.5,
        "shift": normal(48),
        "w": normal(48, 96),
        "b": normal(96),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "factor", "shift"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    model = networks.model(nodes, weights, {"x": (1, 4, 48)}, {"y": None})
    subject = Subject(model, None)
    written = {"w": subject.weights["w"].write(subject.within(2)["w"])}
    off = written["w"].array.astype(np.float64) - weights["w"]
    found = Means(subject).shifts(written)
    np.testing.assert_allclose(found["b"], weights["b"] - weights["shift"] @ off, rtol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        # what comes in is not known
        [helper.make_node("Conv", ["x", "w", "b"], ["y"])],
        # another value is added
        [*norm()[0], helper.make_node("Add", ["n", "x"], ["a"]), *READERS["bias"][0]],
        # a layer has its own distribution
        [
            *norm()[0],
            helper.make_node("Conv", ["n", "v2"], ["a"]),
            helper.make_node("Conv", ["a", "w", "b"], ["y"]),
        ],
    ],
)
def test_biases_stay_where_means_are_not_known(nodes):
    weights = norm()[1] | {
        "w": normal(OUTPUTS, SHAPE[1], 3, 3),
        "v2": normal(SHAPE[1], SHAPE[1], 1, 1),
        "b": normal(OUTPUTS),
    }
    used = {name for node in nodes for name in node.input}
    given = {name: array for name, array in weights.items() if name in used}
    model = networks.model(nodes, given, {"x": SHAPE}, {"y": None})
    subject = Subject(model, None)
    chosen = subject.within(2)
    written = {name: weight.write(chosen[name]) for name, weight in subject.weights.items()}
    assert not Means(subject).shifts(written)
