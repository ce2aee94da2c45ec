"""Each kind of layer is its rows times its matrix: what onnxruntime computes from them."""

import networks
import numpy as np
import pytest
from onnx import helper, numpy_helper

from prune2onnx.packing.approximation.subject import Subject
from prune2onnx.packing.calibration.layers import layers_of
from prune2onnx.runtime.compare import run_all

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def every(total: int) -> np.ndarray:
    return np.arange(total)


def of(nodes, weights, x: np.ndarray):
    made = networks.model(nodes, weights, {"x": x.shape}, {"y": None})
    (layer,) = layers_of(Subject(made, None))
    (outputs,) = run_all(made, [{"x": x}])
    return layer, outputs[0]


def product(layer, x: np.ndarray) -> np.ndarray:
    """[rows, groups, outputs]"""
    rows = layer.uses[0].rows(x, every)
    matrices = layer.matrices(layer.weight.rows)
    assert np.array_equal(layer.as_rows(matrices), layer.weight.rows)
    assert np.array_equal(layer.weight.unfolded(layer.weight.rows), layer.weight.array)
    return np.einsum("ngi,gio->ngo", rows, matrices)


@pytest.mark.parametrize(
    ("shape", "weight", "attributes"),
    [
        ((2, 6, 9, 8), (10, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((2, 6, 9, 8), (10, 6, 3, 2), {"strides": [2, 1], "dilations": [1, 2]}),
        ((2, 6, 9, 8), (12, 2, 3, 3), {"group": 3, "pads": [0, 1, 2, 1], "strides": [2, 2]}),
        ((2, 6, 9, 8), (12, 1, 3, 3), {"group": 6, "auto_pad": "VALID"}),
        ((3, 4, 20), (8, 4, 5), {"pads": [2, 0], "dilations": [2]}),
    ],
)
def test_convolutions(shape, weight, attributes):
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    layer, y = of([node], {"w": normal(*weight)}, x := normal(*shape))
    made = product(layer, x)
    want = np.moveaxis(y, 1, -1).reshape(-1, layer.groups, y.shape[1] // layer.groups)
    np.testing.assert_allclose(made, want, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_gemm(first, turned):
    weight, x = normal(6, 8), normal(5, 6)
    if first:  # y' = W' x'
        names, attributes = ["w", "x"], {"transA": int(not turned), "transB": 1}
        stored = weight.T if turned else weight
    else:
        names, attributes = ["x", "w"], {"transB": int(turned)}
        stored = weight.T if turned else weight
    node = helper.make_node("Gemm", names, ["y"], **attributes)
    layer, y = of([node], {"w": np.ascontiguousarray(stored)}, x)
    want = y.T if first else y
    np.testing.assert_allclose(product(layer, x)[:, 0], want, atol=1e-5)


def test_products_of_matrices_on_either_side_and_behind_a_transpose():
    x = normal(2, 4, 7)
    layer, y = of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(7, 9)}, x)
    np.testing.assert_allclose(product(layer, x).reshape(y.shape), y, atol=1e-5)
    layer, y = of([helper.make_node("MatMul", ["w", "x"], ["y"])], {"w": normal(9, 4)}, x)
    np.testing.assert_allclose(product(layer, x).reshape(2, 7, 9), y.swapaxes(1, 2), atol=1e-5)
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    layer, y = of(nodes, {"w": normal(9, 7)}, x)
    np.testing.assert_allclose(product(layer, x).reshape(y.shape), y, atol=1e-5)


def test_transposed_convolutions_whose_windows_do_not_overlap():
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], group=2)
    layer, y = of([node], {"w": normal(6, 4, 2, 2)}, x := normal(2, 6, 5, 5))
    made = product(layer, x).reshape(2, 5, 5, 8, 2, 2)
    want = y.reshape(2, 8, 5, 2, 5, 2).transpose(0, 2, 4, 1, 3, 5)
    np.testing.assert_allclose(made, want, atol=1e-5)


def test_recurrent_layers_see_their_inputs_and_their_states():
    weights = {"w": normal(2, 20, 6), "r": normal(2, 20, 5)}
    node = helper.make_node(
        "LSTM", ["x", "w", "r"], ["y"], hidden_size=5, direction="bidirectional"
    )
    made = networks.model([node], weights, {"x": (7, 3, 6)}, {"y": None})
    first, second = layers_of(Subject(made, None))
    read, again = first.uses[0], second.uses[0]
    assert (read.source, first.groups, again.source, second.groups) == ("x", 1, "y", 2)
    assert read.rows(normal(7, 3, 6), every).shape == (21, 1, 6)
    states = normal(7, 2, 3, 5)
    assert np.array_equal(again.rows(states, every)[:, 1].reshape(7, 3, 5), states[:, 1])


def test_a_weight_that_also_goes_elsewhere_is_left_alone():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Softmax", ["w"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    made = networks.model(nodes, {"w": normal(8, 8)}, {"x": (1, 8)}, {"y": None})
    assert not layers_of(Subject(made, None))


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
def test_convolutions_that_keep_places(pad):
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=pad, strides=[2, 1])
    layer, y = of([node], {"w": normal(5, 3, 4, 2)}, x := normal(2, 3, 9, 7))
    want = np.moveaxis(y, 1, -1).reshape(-1, 1, 5)
    np.testing.assert_allclose(product(layer, x), want, atol=1e-4)


def test_a_bias_is_known_where_it_is_the_layers_own():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["b", "m"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["n"]),
        helper.make_node("Add", ["n", "c"], ["z"]),
        helper.make_node("Add", ["z", "c"], ["y"]),
    ]
    weights = {"w": normal(8, 8), "b": normal(8), "v": normal(8, 8), "c": normal(8)}
    made = networks.model(nodes, weights, {"x": (1, 8)}, {"y": None})
    assert [layer.bias for layer in layers_of(Subject(made, None))] == ["b", ""]


@pytest.mark.parametrize(
    ("behind", "shape", "bias"),
    [
        (("Add", ["c", "b"]), (6, 1, 1), "b"),
        (("Add", ["b", "c"]), (1, 6, 1, 1), "b"),
        (("Add", ["c", "b"]), (6,), ""),  # along a row of each channel
        (("Mul", ["c", "b"]), (6, 1, 1), ""),
        (("BatchNormalization", ["c", "v", "v", "b", "v"]), (6,), "b"),
    ],
)
def test_what_follows_a_convolution_may_be_its_bias(behind, shape, bias):
    op, names = behind
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node(op, names, ["y"])]
    weights = {"w": normal(6, 8, 3, 3), "b": normal(*shape), "v": np.abs(normal(6)) + 0.1}
    used = {name: weights[name] for name in weights if name in {"w", *names}}
    x = normal(1, 8, 8, 8)
    made = networks.model(nodes, used, {"x": x.shape}, {"y": None})
    (layer,) = layers_of(Subject(made, None))
    assert layer.bias == bias and layer.is_mean == (op == "BatchNormalization")
    if bias:
        more = normal(6).astype(np.float64)
        shifted = networks.model(
            nodes, used | {"b": layer.with_bias(used["b"], more)}, {"x": x.shape}, {"y": None}
        )
        (first,), (second,) = (run_all(one, [{"x": x}])[0] for one in (made, shifted))
        factor = 1 if op == "Add" else np.sqrt(used["v"] / (1 + 1e-5 / used["v"]))
        want = np.broadcast_to((factor * more)[:, None, None], first.shape[1:])
        np.testing.assert_allclose((second - first)[0], want, rtol=1e-3, atol=1e-4)


def test_the_bias_of_a_constant_node_is_left_alone():
    small = numpy_helper.from_array(normal(4), "small")
    nodes = [
        helper.make_node("Constant", [], ["b"], value=small),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    made = networks.model(nodes, {"w": normal(8, 4)}, {"x": (1, 8)}, {"y": None})
    assert [layer.bias for layer in layers_of(Subject(made, None))] == [""]


def test_layers_share_moments_where_they_see_the_same():
    """Convolutions of one shape and source may have other windows."""
    nodes = [
        helper.make_node("Conv", ["x", f"w{n}"], [f"y{n}"], dilations=[d, d], pads=[d] * 4)
        for n, d in enumerate((1, 2, 1))
    ]
    nodes.append(helper.make_node("Sum", ["y0", "y1", "y2"], ["y"]))
    weights = {f"w{n}": normal(4, 4, 3, 3) for n in range(3)}
    made = networks.model(nodes, weights, {"x": (1, 4, 9, 9)}, {"y": None})
    first, second, third = (layer.view for layer in layers_of(Subject(made, None)))
    assert first == third != second
