"""Weights that several nodes read, that stand in bodies, whose elements move, or that are integers.

Each is compared with the same weight rounded without examples, in about as many bits.
"""

import networks
import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from prune2onnx.graph.normalize import normalize
from prune2onnx.packing.approximation.approximate import approximate
from prune2onnx.packing.approximation.subject import Subject
from prune2onnx.packing.calibration.calibrate import Calibration
from prune2onnx.packing.calibration.layers import layers_of
from prune2onnx.packing.calibration.zeros import Pattern
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.compare import output_error, run_all

RNG = np.random.default_rng(0)
MIXED = np.random.default_rng(0).normal(size=(16, 16)) / 4  # inputs that depend on each other


@pytest.fixture(autouse=True)
def _seeded():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)


def mixed(count: int, seed: int, *shape: int) -> list[dict[str, np.ndarray]]:
    """Batches whose last axis, of 16, is correlated."""
    rng = np.random.default_rng(seed)
    return [{"x": (rng.normal(size=shape) @ MIXED).astype(np.float32)} for _ in range(count)]


def better(model: ModelProto, batches, held, *, names, than: float = 0.8, bits: float = 3) -> None:
    """These weights, and no others, are calibrated, with less error than without examples."""
    subject = Calibration(model, batches, run_all)
    assert set(subject.names) == set(names)
    made = subject.at(subject.slope(bits))
    assert {row.how for row in made.rows if row.name in names} == {"calibrated grid"}
    error = output_error(model, held)
    without = approximate(model, bits=min(max(made.bits, 1), 8))
    assert error(made.model) < than * error(without.model)
    packed = pack(made.model, quantized=made.quantized)
    stored = {tensor.name: tensor for tensor in unpack(packed.model).graph.initializer}
    for tensor in made.model.graph.initializer:
        assert stored[tensor.name].raw_data == tensor.raw_data


def test_moments_of_several_readers_add_up():
    """One matrix, twice in a row, and on another input."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["b"]),
        helper.make_node("Clip", ["x"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    model = networks.model(nodes, {"w": normal(16, 16)}, {"x": ["N", 16]}, {"y": ["N", 16]})
    (layer,) = layers_of(Subject(model, None))
    assert [use.source for use in layer.uses] == ["x", "r", "t"]
    better(model, mixed(4, 1, 64, 16), mixed(2, 2, 64, 16), names=["w"], than=0.9)
    pruned = Calibration(model, mixed(4, 1, 64, 16), run_all, pattern=Pattern(0.5)).at(None)
    (row,) = pruned.rows
    assert row.nnz == pytest.approx(128, abs=8)


def test_embeddings_that_are_tied_to_logits():
    weights = {"e": normal(60, 16), "w": normal(16, 16)}
    nodes = [
        helper.make_node("Gather", ["e", "x"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["h"]),
        helper.make_node("Transpose", ["e"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    model = networks.model(nodes, weights, {}, {"y": ["N", "T", 60]})
    model.graph.input.append(networks.value("x", ["N", "T"], TensorProto.INT64))
    batches = [{"x": RNG.integers(0, 60, (8, 9)) ** 2 % 60} for _ in range(8)]
    better(model, batches[:6], batches[6:], names=["e", "w"], than=0.95)


def branches(then: list, other: list) -> list:
    """An If on whether the first input is above zero."""
    bodies = {}
    for name, nodes in (("then_branch", then), ("else_branch", other)):
        (last,) = nodes[-1].output
        output = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
        bodies[name] = helper.make_graph(nodes, name, [], [output])
    return [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Less", ["m", "limit"], ["c"]),
        helper.make_node("If", ["c"], ["y"], **bodies),
    ]


def test_weights_in_the_branches_of_an_if():
    """Both branches name their values alike; no example reaches the inside of the other one."""

    def body(end: str) -> list:
        return [
            helper.make_node("MatMul", ["x", f"{end}1"], ["a"]),
            helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("MatMul", ["r", f"{end}2"], [f"out_{end}"]),
        ]

    weights = {name: normal(16, 16) for name in ("t1", "t2", "e1", "e2")}
    weights["limit"] = np.float32(1000)
    model = networks.model(
        branches(body("t"), body("e")), weights, {"x": ["N", 16]}, {"y": ["N", 16]}
    )
    batches, held = mixed(4, 1, 64, 16), mixed(2, 2, 64, 16)
    subject = Calibration(model, batches, run_all)
    assert set(subject.names) == {"t1", "t2", "e1", "e2"}
    made = subject.at(subject.slope(3))
    hows = {row.name: row.how for row in made.rows}
    assert hows["t1"] == hows["t2"] == "calibrated grid"
    assert hows["e2"] in ("grid", "channel grid")  # without examples, and so told
    error = output_error(model, held)
    assert error(made.model) < 0.95 * error(approximate(model, bits=made.bits).model)
    pruned = Calibration(model, batches, run_all, pattern=Pattern(0.5)).at(None)
    zeros = {row.name: 1 - row.nnz / row.size for row in pruned.rows}
    assert zeros["t1"] > 0.2 and zeros["e2"] == 0


def test_a_weight_that_a_body_reads_twice():
    """Its first input is there early, when another layer is calibrated; its second one is not."""
    body = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("MatMul", ["h", "w"], ["d"]),
        helper.make_node("Sum", ["b", "d"], ["out"]),
    ]
    other = [helper.make_node("Identity", ["x"], ["same"])]
    nodes = [helper.make_node("MatMul", ["x", "v"], ["h"]), *branches(body, other)]
    weights = {"v": normal(16, 16), "w": normal(16, 16), "limit": np.float32(1000)}
    model = networks.model(nodes, weights, {"x": ["N", 16]}, {"y": ["N", 16]})
    better(model, mixed(4, 1, 64, 16), mixed(2, 2, 64, 16), names=["v", "w"], than=0.95)


def test_weights_in_a_loop_see_all_of_its_steps():
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "w"], ["a"]),
            helper.make_node("Tanh", ["a"], ["h2"]),
            helper.make_node("Identity", ["go"], ["go2"]),
        ],
        "body",
        [
            networks.value("i", [], TensorProto.INT64),
            networks.value("go", [], TensorProto.BOOL),
            networks.value("h", None),
        ],
        [networks.value("go2", [], TensorProto.BOOL), networks.value("h2", None)],
    )
    nodes = [helper.make_node("Loop", ["count", "", "x"], ["y"], body=body)]
    weights = {"w": 1.5 * normal(16, 16), "count": np.int64(3)}
    model = networks.model(nodes, weights, {"x": ["N", 16]}, {"y": ["N", 16]})
    batches = mixed(4, 1, 64, 16)
    (layer,) = layers_of(Subject(model, None))
    assert [use.source for use in layer.uses] == ["h"]
    better(model, batches, mixed(2, 2, 64, 16), names=["w"], than=0.9)


def test_the_gates_of_an_lstm_that_are_put_in_order_by_the_graph():
    """As torch exports them: i, f, g, o become i, o, f, g, by slices."""
    size = 16
    weights = {"w": normal(4 * size, 16), "r": normal(4 * size, size)}
    weights |= {"zero": np.array([0])}
    nodes = []
    for name in "wr":
        parts = []
        for part, (begin, end) in enumerate(((0, 1), (3, 4), (1, 3))):
            weights |= {f"b{part}": np.array([begin * size]), f"e{part}": np.array([end * size])}
            parts.append(f"{name}{part}")
            nodes.append(helper.make_node("Slice", [name, f"b{part}", f"e{part}"], [parts[-1]]))
        nodes.append(helper.make_node("Concat", parts, [f"{name}c"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}c", "zero"], [f"{name}u"]))
    nodes.append(helper.make_node("LSTM", ["x", "wu", "ru"], ["y"], hidden_size=size))
    model = networks.model(nodes, weights, {"x": ["T", "N", 16]}, {"y": ["T", 1, "N", size]})
    layers = layers_of(Subject(model, None))
    assert [layer.name for layer in layers] == ["w", "r"]
    w = weights["w"].reshape(4, size, 16)[[0, 3, 1, 2]].reshape(-1, 16)
    np.testing.assert_array_equal(layers[0].values()[0], w.T.astype(np.float64))
    np.testing.assert_array_equal(layers[0].restored(layers[0].weight.array), weights["w"])
    batches, held = mixed(4, 1, 6, 20, 16), mixed(2, 2, 6, 20, 16)
    better(model, batches, held, names=["w", "r"], than=0.9)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_integers_stay_on_their_grid(channels, kind):
    """int8 behind DequantizeLinear, with a scale for each output or one for all."""
    w = normal(16, 24)
    scale = (np.abs(w).max(0) if channels else np.abs(w).max()) / np.float32(100)
    middle = kind(128 if kind is np.uint8 else 0)
    q = (np.rint(w / scale) + int(middle)).astype(kind)
    points = np.full(scale.shape, middle, kind)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "point"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = {"q": q, "scale": np.float32(scale), "point": points}
    model = networks.model(nodes, weights, {"x": ["N", 16]}, {"y": ["N", 24]})
    (layer,) = layers_of(Subject(model, None))
    effective = (q.astype(np.float64) - int(middle)) * scale
    np.testing.assert_allclose(layer.values()[0], effective, rtol=1e-6)
    batches = mixed(4, 1, 64, 16)
    better(model, batches, mixed(2, 2, 64, 16), names=["q"], than=0.85)
    pruned = Calibration(model, batches, run_all, pattern=Pattern(0.5)).at(None)
    (row,) = (row for row in pruned.rows if row.name == "q")
    assert row.nnz == pytest.approx(192, abs=12)


def test_integers_that_are_cast_and_scaled():
    q = RNG.integers(-100, 100, (16, 24)).astype(np.int8)
    nodes = [
        helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = {"q": q, "scale": RNG.uniform(0.5, 2, 24).astype(np.float32)}
    model = networks.model(nodes, weights, {"x": ["N", 16]}, {"y": ["N", 24]})
    better(model, mixed(4, 1, 64, 16), mixed(2, 2, 64, 16), names=["q"])


def test_scales_of_blocks_are_left_to_the_grid_without_examples():
    q = RNG.integers(-100, 100, (16, 24)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=0, block_size=8),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = {"q": q, "scale": RNG.uniform(0.5, 2, (2, 24)).astype(np.float32)}
    model = networks.model(nodes, weights, {"x": ["N", 16]}, {"y": ["N", 24]}, opset=21)
    assert not layers_of(Subject(normalize(model).model, None))
