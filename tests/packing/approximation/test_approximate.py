"""Approximating weights: what may change, by how much, and for how many bits."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import networks
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from prune2onnx import pack
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.packing.approximation.approximate import approximate, search
from prune2onnx.runtime.session import session


def model(nodes, weights, opset=18, **shapes):
    return networks.model(nodes, weights, {"x": shapes.get("x", ["N", 64])}, {"y": None}, opset)


def normal(*shape, seed=0, scale=0.05):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def convnet():
    """conv 3x3 - relu - conv 3x3 - relu - mean - gemm, with biases."""
    return networks.model(
        [
            helper.make_node("Conv", ["x", "a", "a.bias"], ["c1"], pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "b"], ["c2"], pads=[1] * 4),
            helper.make_node("Relu", ["c2"], ["r2"]),
            helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "c", "c.bias"], ["y"], transB=1),
        ],
        {
            "a": normal(24, 3, 3, 3, scale=0.2),
            "a.bias": normal(24, seed=1),
            "b": normal(32, 24, 3, 3, seed=2, scale=0.1),
            "c": normal(10, 32, seed=3, scale=0.2),
            "c.bias": normal(10, seed=4),
        },
        {"x": ["N", 3, 12, 12]},
        {"y": ["N", 10]},
    )


def values(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def rows(made):
    return {row.name: row for row in made.rows}


def images():
    """Inputs whose neighbouring pixels are alike."""
    coarse = np.random.default_rng(5).random((8, 3, 4, 4)).astype(np.float32)
    return coarse.repeat(3, 2).repeat(3, 3)


def output_error(reference, inputs):
    (want,) = session(reference).run(None, {"x": inputs})

    def evaluate(other):
        (got,) = session(other).run(None, {"x": inputs})
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    return evaluate


# What is asked for


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "nothing to do"),
        ({"bits": 0.5}, "0.5 bits"),
        ({"bits": 9}, "9 bits for each weight, expected 1 to 8"),
        ({"bits": math.nan}, "nan bits"),
        ({"prune": 1.0}, "0 <= D < 1"),
        ({"prune": -0.1}, "0 <= D < 1"),
        ({"max_rel_error": 0.0}, "expected a number above 0"),
        ({"max_rel_error": math.inf}, "expected a number above 0"),
        ({"bits": 4, "max_rel_error": 0.1}, "give one of them"),
    ],
)
def test_arguments_out_of_range_are_named(asked, says):
    with pytest.raises(RecipeError, match=says):
        approximate(convnet(), **asked)


def test_a_packed_model_is_refused():
    packed = pack(approximate(convnet(), bits=3).model).model
    with pytest.raises(Prune2OnnxError, match="unpack it"):
        approximate(packed, bits=3)


def test_the_model_given_is_not_modified_and_the_result_repeats():
    given_model = convnet()
    before = given_model.SerializeToString()
    first = approximate(given_model, bits=4, prune=0.2)
    assert given_model.SerializeToString() == before
    again = approximate(given_model, bits=4, prune=0.2)
    assert first.model.SerializeToString() == again.model.SerializeToString()
    assert first.rows == again.rows


# Bits


@pytest.mark.parametrize("bits", [2, 3.5, 5, 8])
def test_bits_are_an_average_over_all_weights_with_all_they_cost(bits):
    made = approximate(convnet(), bits=bits)
    weights = [rows(made)[name] for name in "abc"]
    assert made.bits <= bits + 0.01
    assert made.bits > bits - 0.6  # small weights have few candidates, which leaves some bits
    total = 8 * sum(row.nbytes - 32 for row in weights)  # a call of each is not counted
    assert total == pytest.approx(made.bits * sum(row.size for row in weights), rel=0.01)


def test_more_bits_err_less_and_one_bit_halves_the_error():
    errors = {bits: rows(approximate(convnet(), bits=bits))["b"].relative_error for bits in (3, 5)}
    assert errors[3] / errors[5] == pytest.approx(4, rel=0.35)


DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails": lambda rng, shape: rng.standard_t(2, size=shape),
    "uniform": lambda rng, shape: rng.random(shape),
    "mostly zeros": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.1),
    "few levels": lambda rng, shape: 0.03 * rng.integers(-7, 8, shape),
    "rows of other sizes": lambda rng, shape: (
        rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, (shape[0], 1))
    ),
    "outliers": lambda rng, shape: (
        rng.normal(size=shape) * np.where(rng.random(shape) < 0.01, 50, 1)
    ),
}


@pytest.mark.parametrize("first", DISTRIBUTIONS)
def test_more_bits_never_err_more(first):
    """Within a percent: where errors are made to cancel in outputs, those of weights vary a bit."""
    rng = np.random.default_rng(len(first))
    names = [first, *rng.choice(list(DISTRIBUTIONS), 2)]
    weights = {
        f"w{at}": DISTRIBUTIONS[name](rng, (24, 24)).astype(np.float32)
        for at, name in enumerate(names)
    }
    values = ["x", "h", "k", "y"]
    nodes = [
        helper.make_node("MatMul", [values[at], f"w{at}"], [values[at + 1]]) for at in range(3)
    ]
    given = networks.model(nodes, weights, {"x": ["N", 24]}, {"y": ["N", 24]})
    errors = [
        sum(row.relative_error**2 for row in approximate(given, bits=float(bits)).rows)
        for bits in sorted(rng.uniform(1, 8, 5))
    ]
    assert errors[-1] < errors[0]
    assert all(more <= 1.01 * fewer for fewer, more in itertools.pairwise(errors)), errors


def test_weights_with_more_influence_get_more_bits():
    made = rows(approximate(convnet(), bits=4))
    # equal slopes: the error energy of a weight is in proportion to its elements
    assert made["c"].relative_error < made["b"].relative_error
    assert 8 * made["c"].nbytes / made["c"].size > 8 * made["b"].nbytes / made["b"].size


def test_codes_codebook_and_scale_give_the_initializer_bit_for_bit():
    made = approximate(convnet(), bits=5)
    assert set(made.quantized) == {"a", "b", "c"}
    for name, quantized in made.quantized.items():
        dense = values(made.model)[name]
        assert quantized.dense().tobytes() == dense.tobytes()
        assert len(quantized.codebook) < 256 and 0 not in quantized.codebook
        assert (quantized.codebook == np.rint(quantized.codebook)).all()
        assert quantized.scale.ndim == dense.ndim and (quantized.scale > 0).all()
        halved = quantized.scale.astype(np.float16)  # what a file may store
        assert (halved.astype(np.float32) == quantized.scale).all()


def test_onnxruntime_multiplies_levels_and_scale_to_the_same_bits():
    quantized = approximate(convnet(), bits=5).quantized["b"]
    levels = np.concatenate([np.zeros(1, np.float32), quantized.codebook])[quantized.codes]
    proto = networks.model(
        [helper.make_node("Mul", ["x", "s"], ["y"])],
        {"s": quantized.scale},
        {"x": list(levels.shape)},
        {"y": list(levels.shape)},
    )
    (got,) = session(proto).run(None, {"x": levels})
    assert got.tobytes() == quantized.dense().tobytes()


def test_outputs_have_channels_of_their_own_steps_where_that_takes_fewer_bits():
    w = normal(16, 32, seed=7) * np.float32(4.0) ** np.arange(-8, 8)[:, None]
    proto = model([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": w}, x=["N", 32])
    made = approximate(proto, bits=7)
    row = rows(made)["w"]
    assert row.relative_error < 0.02
    if row.how == "channel grid":
        assert made.quantized["w"].scale.shape == (16, 1)


def test_errors_cancel_in_outputs_of_a_network():
    proto = convnet()
    evaluate = output_error(proto, images())
    made = approximate(proto, bits=5)
    spread = approximate(proto, max_rel_error=rows(made)["b"].relative_error)
    assert evaluate(made.model) < 0.8 * evaluate(spread.model)


# Zeros


@given(st.floats(0, 0.95), st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_pruning_meets_the_fraction_and_zeros_stay(fraction, seed):
    w = normal(20, 16, 3, 3, seed=seed)
    w[np.random.default_rng(seed).random(w.shape) < 0.3] = 0
    proto = model([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": w}, x=["N", 16, 8, 8])
    new = values(approximate(proto, prune=fraction).model)["w"]
    assert np.mean(new == 0) == pytest.approx(max(fraction, np.mean(w == 0)), abs=1 / w.size)
    assert (new[w == 0] == 0).all() and not np.signbit(new[new == 0]).any()


def test_pruning_is_spread_over_layers_and_empties_none():
    made = rows(approximate(convnet(), prune=0.9))
    density = {name: made[name].nnz / made[name].size for name in "abc"}
    assert all(value > 0.02 for value in density.values())
    assert sum(made[n].nnz for n in "abc") == pytest.approx(
        0.1 * sum(made[n].size for n in "abc"), abs=2
    )


def test_neighbours_compensate_for_pruned_elements():
    proto = convnet()
    evaluate = output_error(proto, images())
    made = approximate(proto, prune=0.4)
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for tensor in plain.graph.initializer:
        mask = values(made.model)[tensor.name] != 0
        kept = np.where(mask, numpy_helper.to_array(tensor), np.float32(0))
        tensor.raw_data = kept.tobytes()
    assert evaluate(made.model) < 0.8 * evaluate(plain)


def test_pruned_weights_are_rounded_around_their_zeros():
    both = approximate(convnet(), prune=0.5, bits=3)
    zeros = {
        name: array == 0 for name, array in values(approximate(convnet(), prune=0.5).model).items()
    }
    for name in "abc":
        assert (values(both.model)[name][zeros[name]] == 0).all()
    assert both.bits <= 3.01


# An error for each weight


@pytest.mark.parametrize("limit", [0.3, 0.02, 0.003, 1e-4, 1e-7])
def test_each_weight_keeps_the_error(limit):
    proto = convnet()
    made = approximate(proto, max_rel_error=limit)
    for name, old in values(proto).items():
        off = np.linalg.norm(values(made.model)[name].astype(float) - old)
        assert off <= limit * np.linalg.norm(old.astype(float)) * (1 + 1e-12)
    assert [row.relative_error <= limit for row in made.rows]


def test_a_looser_error_takes_fewer_bytes():
    sizes = [approximate(convnet(), max_rel_error=e).nbytes for e in (1e-7, 1e-3, 0.01, 0.1)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


# An error of the outputs


def test_search_finds_the_fewest_bits_within_the_limit():
    proto = convnet()
    evaluate = output_error(proto, images())
    calls = []

    def counted(other):
        calls.append(evaluate(other))
        return calls[-1]

    made = search(proto, counted, 0.01, evaluations=8, single=0)
    assert made.output_error <= 0.01 and made.output_error == evaluate(made.model)
    assert len(calls) <= 8
    coarser = approximate(proto, bits=made.bits - 0.7)
    assert evaluate(coarser.model) > 0.01


def test_search_measures_each_weight_where_there_are_few():
    proto = convnet()
    calls = []
    evaluate = output_error(proto, images())
    made = search(proto, lambda m: calls.append(1) or evaluate(m), 0.01, evaluations=6, single=3)
    assert 3 < len(calls) <= 6 + 3
    assert evaluate(made.model) <= 0.01


def test_search_says_so_when_pruning_alone_exceeds_the_error():
    proto = convnet()
    with pytest.raises(Prune2OnnxError, match="prune less"):
        search(proto, output_error(proto, images()), 1e-4, prune=0.9, evaluations=4)
    with pytest.raises(Prune2OnnxError, match="inf"):
        search(proto, lambda _: math.nan, 0.1, evaluations=3)


@pytest.mark.parametrize(("limit", "evaluations"), [(0.0, 5), (0.1, 1)])
def test_search_checks_its_arguments(limit, evaluations):
    with pytest.raises(RecipeError):
        search(convnet(), lambda _: 0.0, limit, evaluations=evaluations)


# Types


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_keep_their_type(dtype):
    w = normal(40, 64).astype(dtype)
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w.T.copy()})
    for asked in ({"bits": 4}, {"bits": 1.5}, {"max_rel_error": 0.05}, {"prune": 0.5}):
        made = approximate(proto, **asked)
        new = values(made.model)["w"]
        assert new.dtype == dtype and made.model.graph.initializer[0].data_type == (
            proto.graph.initializer[0].data_type
        )
        if quantized := made.quantized.get("w"):
            assert quantized.scale is None
            assert quantized.dense().tobytes() == new.tobytes()
    assert rows(approximate(proto, bits=4))["w"].relative_error < 0.15


def quantised(dtype=np.int8, per_channel=False, op="qdq"):
    rng = np.random.default_rng(3)
    info = np.iinfo(dtype)
    middle = 0 if dtype == np.int8 else 120
    w = np.clip(np.rint(rng.normal(middle, 30, (32, 64))), info.min, info.max).astype(dtype)
    channels = 32 if per_channel else 1
    shape = (channels,) if per_channel else ()
    points = np.full(shape, middle, dtype)
    if per_channel and middle:
        points = (middle + np.arange(32) % 3).astype(dtype)
    weights = {"w": w, "s": np.full(shape, 0.01, np.float32), "z": points}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0),
        helper.make_node("Gemm", ["x", "d"], ["y"], transB=1),
    ]
    return model(nodes, weights), w.astype(int), points.astype(int).reshape(-1, 1)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_integers_stay_on_a_coarser_part_of_their_grid(dtype, per_channel):
    proto, old, points = quantised(dtype, per_channel)
    made = approximate(proto, bits=4)
    new = values(made.model)["w"]
    assert new.dtype == dtype and "w" not in made.quantized
    steps = np.unique((new.astype(int) - points)[new.astype(int) != points])
    assert np.gcd.reduce(steps) > 1
    assert (new[old == points] == np.broadcast_to(points, old.shape)[old == points]).all()
    assert rows(made)["w"].relative_error < 0.15
    for name in ("s", "z"):
        assert (values(made.model)[name] == values(proto)[name]).all()


def test_pruned_integers_become_the_zero_point():
    proto, old, points = quantised(np.uint8, True)
    new = values(approximate(proto, prune=0.5).model)["w"].astype(int)
    assert np.mean(new == points) == pytest.approx(0.5, abs=0.01)
    assert (new[new != points] == old[new != points]).all()


def test_integer_operators_read_weights_too():
    w = np.random.default_rng(0).integers(-90, 90, (64, 32)).astype(np.int8)
    proto = model(
        [helper.make_node("MatMulInteger", ["x", "w", "", "z"], ["y"])], {"w": w, "z": np.int8(3)}
    )
    assert rows(approximate(proto, bits=3))["w"].how == "grid"


# Roles: what is touched and what is not


def test_small_vectors_are_halved_where_that_is_safe():
    norm = {
        "g": normal(32, seed=1) + 1,
        "b": normal(32, seed=2),
        "m": normal(32, seed=3),
        "v": np.float32([1e-9] + [0.5] * 31),
    }
    proto = model(
        [
            helper.make_node("Conv", ["x", "w", "cb"], ["c"]),
            helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"]),
        ],
        {"w": normal(32, 16, 3, 3), "cb": normal(32, seed=5), **norm},
        x=["N", 16, 8, 8],
    )
    made = approximate(proto, bits=5)
    new = values(made.model)
    assert (new["v"] == norm["v"]).all()  # 1e-9 would become 0
    for name in ("g", "b", "m", "cb"):
        half = values(proto)[name].astype(np.float16).astype(np.float32)
        assert (new[name] == half).all() and rows(made)[name].how == "float16"
    only_pruned = values(approximate(proto, prune=0.3).model)
    assert all((only_pruned[name] == values(proto)[name]).all() for name in (*norm, "cb"))
    tight = values(approximate(proto, max_rel_error=1e-5).model)
    assert all((tight[name] == values(proto)[name]).all() for name in (*norm, "cb"))


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([("Mul", ["x", "w"], ["y"])], "read by Mul"),
        ([("MatMul", ["x", "w"], ["h"]), ("Mul", ["h", "w"], ["y"])], "read by Mul"),
        ([("PRelu", ["x", "w"], ["y"])], "read by PRelu"),
        ([("QuantizeLinear", ["w", "s"], ["q"]), ("Identity", ["q"], ["y"])], "read by Identity"),
        ([("Identity", ["x"], ["y"])], "used by no node"),
        ([("Gather", ["w", "i"], ["y"], {"axis": 1})], "read by Gather"),
    ],
)
def test_what_is_no_weight_is_left_alone(nodes, reason):
    made_nodes = [helper.make_node(*n[:3], **(n[3] if len(n) > 3 else {})) for n in nodes]
    weights = {"w": normal(64, 64), "s": np.float32(0.1), "i": np.arange(40)}
    proto = model(made_nodes, weights)
    made = approximate(proto, bits=2, prune=0.5)
    assert reason in rows(made)["w"].reason
    assert rows(made)["i"].reason == "int64 is not approximated"
    assert made.model.SerializeToString() == proto.SerializeToString()


def test_inputs_outputs_and_unknown_operators_are_left_alone():
    gemm = helper.make_node("MatMul", ["x", "w"], ["y"])
    proto = model([gemm], {"w": normal(64, 64)})
    proto.graph.input.append(networks.value("w", [64, 64]))
    assert "input of the graph" in rows(approximate(proto, bits=2))["w"].reason
    proto = model([gemm], {"w": normal(64, 64)})
    proto.graph.output.append(networks.value("w", [64, 64]))
    assert "output of the graph" in rows(approximate(proto, bits=2))["w"].reason
    custom = helper.make_node("MatMul", ["x", "w"], ["y"], domain="com.example")
    proto = model([custom], {"w": normal(64, 64)})
    assert "com.example.MatMul" in rows(approximate(proto, bits=2))["w"].reason


def test_what_is_not_finite_is_left_alone():
    w = normal(64, 64)
    w[3, 4] = np.inf
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w})
    made = approximate(proto, bits=2)
    assert rows(made)["w"].reason == "it holds NaN or infinity"
    assert (values(made.model)["w"] == w).all()


READERS = {
    "conv": ([("Conv", ["x", "w"], ["y"], {"group": 2})], (8, 4, 3, 3)),
    "depthwise": ([("Conv", ["x", "w"], ["y"], {"group": 16})], (16, 1, 3, 3)),
    "conv1d": ([("Conv", ["x", "w"], ["y"])], (8, 4, 5)),
    "transposed": ([("ConvTranspose", ["x", "w"], ["y"], {"group": 2})], (8, 6, 2, 2)),
    "gemm": ([("Gemm", ["x", "w"], ["y"])], (64, 20)),
    "left": ([("MatMul", ["w", "x"], ["y"])], (20, 64)),
    "batched": ([("MatMul", ["x", "w"], ["y"])], (3, 64, 20)),
    "lstm": ([("LSTM", ["x", "w", "r"], ["y"], {"hidden_size": 8})], (1, 32, 64)),
    "table": ([("Gather", ["w", "i"], ["y"])], (50, 16)),
    "behind": ([("Transpose", ["w"], ["t"]), ("MatMul", ["x", "t"], ["y"])], (20, 64)),
    "reshaped": ([("Reshape", ["w", "i"], ["t"]), ("MatMul", ["x", "t"], ["y"])], (20, 64)),
    "tied": ([("Gather", ["w", "i"], ["g"]), ("Gemm", ["x", "w"], ["y"], {"transB": 1})], (50, 64)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "asked", [{"bits": 4}, {"bits": 7.5}, {"prune": 0.5, "max_rel_error": 0.1}]
)
def test_every_reader_of_weights(name, asked):
    nodes, shape = READERS[name]
    made_nodes = [helper.make_node(*n[:3], **(n[3] if len(n) > 3 else {})) for n in nodes]
    weights = {"w": normal(*shape), "r": normal(1, 32, 8, seed=1), "i": np.arange(9)}
    proto = model(made_nodes, weights)
    made = approximate(proto, **asked)
    row = rows(made)["w"]
    assert not row.reason and row.how != "kept"
    assert 0 < row.relative_error < (0.8 if "prune" in asked else 0.3)
    if quantized := made.quantized.get("w"):
        assert quantized.dense().tobytes() == values(made.model)["w"].tobytes()


def test_degenerate_weights():
    weights = {
        "zero": np.zeros((64, 64), np.float32),
        "same": np.full((64, 64), 0.3, np.float32),
        "tiny": normal(64, 64, scale=1e-36),
        "huge": normal(64, 64, scale=1e36),
        "spike": normal(64, 64, scale=1e-6) + np.float32(1000) * np.eye(64, dtype=np.float32),
        "few": normal(2, 3),
        "empty": np.zeros((64, 0), np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in weights]
    proto = model(nodes, weights)
    for asked in ({"bits": 3}, {"prune": 0.3}, {"max_rel_error": 0.1}):
        made = approximate(proto, **asked)
        for name, new in values(made.model).items():
            assert np.isfinite(new).all()
            assert rows(made)[name].relative_error < 1
        assert not values(made.model)["zero"].any()
        assert "too few" in rows(made)["few"].reason and "too few" in rows(made)["empty"].reason


def test_large_weights_are_judged_by_a_sample():
    w = normal(600, 500)
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}, x=["N", 600])
    made = approximate(proto, bits=4)
    assert made.bits == pytest.approx(3.9, abs=0.15)
    tight = approximate(proto, max_rel_error=0.02)
    assert rows(tight)["w"].relative_error <= 0.02


def test_typed_fields_are_replaced():
    w = normal(64, 8)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, w.shape, w.reshape(-1).tolist())
    tensor.doc_string = "kept"
    made = approximate(
        model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": tensor}), bits=3
    )
    (new,) = made.model.graph.initializer
    assert new.doc_string == "kept" and not new.float_data
    assert len(np.unique(numpy_helper.to_array(new))) < 30


# A real network


def test_resnet20_takes_a_fifth_of_the_bytes_at_three_percent_error(real_data):
    """Estimated bytes of all weights against float32, outputs on smooth random images."""
    file = real_data / "weights" / "resnet20_cifar10.safetensors"
    if not file.exists():
        pytest.skip(f"no {file}")
    from safetensors.torch import load_file

    from prune2onnx.callables import load_callable
    from prune2onnx.training.export import export

    network = load_callable("models/resnet_cifar.py:resnet20")()
    network.load_state_dict(load_file(file), strict=False)
    proto = export(network, (3, 32, 32))
    x = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    x = x.repeat(4, 2).repeat(4, 3)
    (want,) = session(proto).run(None, {"input": x})
    made = approximate(proto, bits=6.5)
    (got,) = session(made.model).run(None, {"input": x})
    assert proto.ByteSize() / (proto.ByteSize() + made.nbytes - 1_077_796) > 4.5
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.03
