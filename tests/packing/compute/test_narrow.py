"""Models that compute in int8 and int4: operators, outputs, tables, tied weights, what stays."""

import numpy as np
import onnx
import pytest
from networks import tokens
from onnx import TensorProto, helper, numpy_helper

from prune2onnx.graph.normalize import normalize
from prune2onnx.packing.compute.codes import BLOCK, blobs, in_blocks, in_bytes
from prune2onnx.packing.compute.narrow import narrowed
from prune2onnx.packing.quantized import Quantized
from prune2onnx.runtime.compare import output_error, run_all

ALL = ("int8", "int8-weights", "int4")
LARGEST_ERROR = {
    "int8": 0.02,
    "int8-weights": 0.02,
    "int4": 0.2,
}  # of four layers, one after another


def made(nodes, weights, inputs, outputs=("y",), opset=13, **kwargs):
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        **kwargs,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return normalize(model).model


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


IDS = {"ids": np.random.default_rng(1).integers(0, 50, (3, 7))}


def stored(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("compute", ALL)
def test_outputs_are_close_and_every_weight_is_stored_once_and_narrow(compute):
    model = tokens()
    got = narrowed(model, compute)
    assert output_error(model, [IDS])(got.model) < LARGEST_ERROR[compute]
    assert [layer.compute for layer in got.layers] == [compute] * 5
    assert all(
        array.dtype.itemsize == 1 for array in stored(got.model).values() if array.size > 700
    )
    names = {"table", "w0", "w1", "w2", "w3"}
    assert names <= stored(got.model).keys()
    size = sum(stored(got.model)[name].nbytes for name in names)
    floats = sum(array.nbytes for array in stored(model).values())
    assert size <= floats / (5.5 if compute == "int4" else 2.7)


def test_activations_of_several_products_are_rounded_once():
    got = narrowed(tokens(), "int8").model
    ops = [node.op_type for node in got.graph.node]
    assert ops.count("DynamicQuantizeLinear") == 3  # e, s and t
    assert ops.count("MatMulInteger") == 5 and "MatMul" not in ops


def test_int8_is_exact_where_codes_are_known():
    """Activations that are whole numbers from 0 to 255 lose nothing either."""
    codes = np.random.default_rng(0).integers(-9, 10, (64, 40))
    scale = (2.0 ** -np.arange(40) / 3).astype(np.float32)[None]
    levels, place = np.unique(codes, return_inverse=True)
    book = levels[levels != 0].astype(np.float32)
    index = (np.cumsum(levels != 0) * (levels != 0))[place.reshape(codes.shape)]
    known = Quantized(index, book, scale)
    model = made(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": known.dense()},
        {"x": (TensorProto.FLOAT, ["n", 64])},
    )
    x = np.random.default_rng(1).integers(0, 256, (5, 64)).astype(np.float32)
    x[0, :2] = 0, 255
    got = narrowed(model, "int8", {"w": known})
    assert np.array_equal(stored(got.model)["w"], codes)
    ((y,),) = run_all(got.model, [{"x": x}])
    np.testing.assert_allclose(y, x @ codes * scale, rtol=1e-6)
    assert not got.quantized


@pytest.mark.parametrize("compute", ALL)
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("factors", [{}, {"alpha": 0.5, "beta": 0.0}, {"alpha": 2.0, "beta": 3.0}])
def test_gemm_with_factors_and_a_bias(compute, turned, factors):
    shape = (24, 50) if turned else (50, 24)
    model = made(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=turned, **factors)],
        {"w": normal(*shape), "b": normal(24)},
        {"x": (TensorProto.FLOAT, ["n", 50])},
    )
    got = narrowed(model, compute)
    assert [layer.compute for layer in got.layers] == [compute]
    error = output_error(model, [{"x": normal(6, 50, seed=3)}])(got.model)
    assert 0 < error < LARGEST_ERROR[compute]


@pytest.mark.parametrize("compute", ALL)
def test_a_weight_with_two_readers_and_different_factors(compute):
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], alpha=0.5),
        helper.make_node("MatMul", ["x", "w"], ["b"]),
        helper.make_node("Sub", ["b", "a"], ["y"]),
    ]
    model = made(nodes, {"w": normal(40, 30)}, {"x": (TensorProto.FLOAT, ["n", 40])})
    got = narrowed(model, compute).model
    x = {"x": normal(4, 40, seed=5)}
    assert output_error(model, [x])(got) < LARGEST_ERROR[compute]
    assert sum(tensor.name == "w" for tensor in got.graph.initializer) == 1


@pytest.mark.parametrize("width", [64, 33, 31])
def test_rows_of_a_table_in_4_bits_are_its_codes_times_scales(width):
    table = normal(40, width)
    model = made(
        [helper.make_node("Gather", ["t", "ids"], ["y"])], {"t": table}, {"ids": (7, ["n"])}
    )
    ids = np.array([0, 39, -1, 5])
    ((got,),) = run_all(narrowed(model, "int4").model, [{"ids": ids}])
    codes, scales = in_blocks(table)
    want = codes * np.repeat(scales, BLOCK, axis=1)[:, :width]
    assert np.array_equal(got, want[ids])


def test_one_row_that_is_looked_up_by_a_number():
    model = made(
        [helper.make_node("Gather", ["t", "at"], ["y"])], {"t": normal(40, 64)}, {"at": (7, [])}
    )
    for compute in ALL:
        ((got,),) = run_all(narrowed(model, compute).model, [{"at": np.array(3)}])
        assert got.shape == (64,)


def test_what_stays_float_says_why():
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["z"])],
        "body",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Gather", ["w", "ids"], ["b"]),
        helper.make_node("If", ["yes"], ["c"], then_branch=body, else_branch=body),
        helper.make_node("Conv", ["image", "kernel"], ["d"]),
        helper.make_node("MatMul", ["x", "small"], ["e"]),
        helper.make_node("Mul", ["x", "factor"], ["f"]),
    ]
    weights = {
        "w": normal(40, 40),
        "inner": normal(40, 40),
        "kernel": normal(16, 8, 3, 3),
        "small": normal(40, 2),
        "factor": normal(40, 40),
    }
    inputs = {
        "x": (TensorProto.FLOAT, [40, 40]),
        "ids": (TensorProto.INT64, [3]),
        "yes": (TensorProto.BOOL, []),
        "image": (TensorProto.FLOAT, [1, 8, 9, 9]),
    }
    model = made(nodes, weights, inputs, outputs="abcdef")
    got = narrowed(model, "int8")
    assert got.model.SerializeToString(deterministic=True) == model.SerializeToString(
        deterministic=True
    )
    reasons = {layer.name: layer.reason for layer in got.layers}
    assert "different axes" in reasons["w"]
    assert "body" in reasons["inner"]
    assert "quantize" in reasons["kernel"]
    assert "elements" in reasons["small"]
    assert "Mul" in reasons["factor"]
    assert "no matrix" in got.notes[0] and len(got.notes) == 6


def test_weights_in_half_precision_stay():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = made(
        nodes, {"w": normal(40, 40).astype(np.float16)}, {"x": (TensorProto.FLOAT16, ["n", 40])}
    )
    (layer,) = narrowed(model, "int8").layers
    assert layer.compute == "float32" and "float16" in layer.reason


def test_bytes_use_the_whole_range_of_each_output():
    rows = normal(20, 100) * 10.0 ** np.arange(-10, 10)[:, None].astype(np.float32)
    rows[3] = 0
    codes, scales = in_bytes(rows)
    assert (np.abs(codes).max(axis=1)[np.arange(20) != 3] == 127).all()
    assert (np.abs(codes * scales - rows) <= scales / 2 * 1.001).all()
    assert not codes[3].any()


def test_blocks_of_4_bits_keep_the_largest_and_are_better_than_rounding_to_it():
    rows = normal(30, 100)
    codes, scales = in_blocks(rows)
    assert codes.min() == -8 and codes.max() == 7 and codes.shape == rows.shape
    found = np.square(codes * np.repeat(scales, BLOCK, 1)[:, :100] - rows).sum()
    most = np.abs(rows).max()
    assert found < 0.3 * np.square(np.rint(rows / most * 7) * most / 7 - rows).sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_blobs_have_the_first_of_two_codes_in_the_low_bits(bits):
    codes = np.arange(-8, 8, dtype=np.int8).reshape(1, 16)
    found = blobs(codes, bits, 32)
    assert found.shape == (1, 1, 4 * bits)
    if bits == 4:
        assert found[0, 0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
        assert set(found[0, 0, 8:].tolist()) == {0x88}
    else:
        assert found[0, 0, :16].tolist() == list(range(120, 136))


def test_the_model_that_is_given_stays_as_it_is():
    model = tokens()
    before = model.SerializeToString(deterministic=True)
    for compute in ALL:
        onnx.shape_inference.infer_shapes(narrowed(model, compute).model)
    assert model.SerializeToString(deterministic=True) == before
