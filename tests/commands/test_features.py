"""Features: the output of a layer for each example, whether or not the file is packed."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from networks import custom, model
from onnx import ModelProto, helper

from prune2onnx import load_data, pack
from prune2onnx.cli.main import main
from prune2onnx.commands.features import features, layer_value
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.file import save
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.int8 import quantize_int8


def classifier() -> ModelProto:
    """[N, 1, 8, 8] -> 300 -> 20 neurons -> 10 scores; few values, so that packing saves bytes."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (300, 64), "b.weight": (20, 300), "c.weight": (10, 20)}
    tensors = {
        name: (rng.integers(-2, 3, shape) * (rng.random(shape) < 0.3) * 0.25).astype(np.float32)
        for name, shape in shapes.items()
    }
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "a.weight"], ["h"], transB=1, name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b.weight"], ["g"], transB=1),
        helper.make_node("Relu", ["g"], ["s"]),
        helper.make_node("Gemm", ["s", "c.weight"], ["y"], transB=1),
        helper.make_node("Softmax", ["y"], ["p"]),
    ]
    return model(nodes, tensors, {"x": ["N", 1, 8, 8]}, {"p": ["N", 10]})


def by_hand(x: np.ndarray) -> dict[str, np.ndarray]:
    """The values of `classifier`, by numpy."""
    a, b = (onnx.numpy_helper.to_array(t) for t in classifier().graph.initializer[:2])
    h = x.reshape(len(x), -1) @ a.T
    g = np.maximum(h, 0) @ b.T
    return {"h": h, "g": g, "s": np.maximum(g, 0)}


BATCH = [(np.random.default_rng(1).random((7, 1, 8, 8), np.float32), np.arange(7))]


@pytest.mark.parametrize(
    ("layer", "value"),
    [(None, "s"), ("s", "s"), ("h", "h"), ("first", "h"), ("a.weight", "h"), ("b.weight", "g")],
)
def test_a_layer_is_known_by_its_value_its_node_or_its_weight(layer, value):
    assert layer_value(classifier(), layer) == value
    for given in (classifier(), pack(classifier()).model):
        x, y = features(given, BATCH, layer)
        np.testing.assert_allclose(x, by_hand(BATCH[0][0])[value], atol=1e-4)
        assert x.dtype == np.float32 and y.tolist() == list(range(7))


def test_names_of_an_anonymous_packed_file_are_not_needed():
    packed = pack(classifier(), anonymize=True).model
    assert "s" not in {t.name for t in unpack(packed).graph.initializer}
    x, _ = features(packed, BATCH)
    np.testing.assert_allclose(x, by_hand(BATCH[0][0])["s"], atol=1e-4)


def test_an_int8_file_has_the_features_of_the_float_file_nearly():
    made = quantize_int8(classifier(), [{"x": BATCH[0][0]}]).model
    x, _ = features(made, BATCH)
    want = by_hand(BATCH[0][0])["s"]
    assert np.abs(x - want).max() < 0.05 * np.abs(want).max()


def test_an_unknown_layer_is_named_with_the_nearest_known_one():
    with pytest.raises(RecipeError, match=r"'a.weigth': no value.*did you mean 'a.weight'"):
        layer_value(classifier(), "a.weigth")
    with pytest.raises(RecipeError, match=r"known are flat, h, r, g, s, y and|known are .*"):
        layer_value(classifier(), "???")
    bare = model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": ["N", 3]}, {"y": ["N", 3]})
    with pytest.raises(Prune2OnnxError, match=r"no layer with a weight.*--layer: y"):
        layer_value(bare)
    assert layer_value(bare, "y") == "y"


def test_a_value_without_one_row_per_example_is_refused():
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    made = model(nodes, {}, {"x": ["N", 3]}, {"y": []})
    with pytest.raises(Prune2OnnxError, match=r"of shape \[\] for 4 examples, expected one"):
        features(made, [(np.ones((4, 3), np.float32), np.zeros(4, np.int64))], "y")


def test_the_command_writes_what_the_npz_source_reads(tmp_path):
    save(pack(classifier()).model, tmp_path / "model.onnx")
    target = tmp_path / "new" / "features.npz"
    arguments = ["features", str(tmp_path / "model.onnx"), "--data", "digits", "-o", str(target)]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    shapes = {"x_train": [1438, 20], "y_train": [1438], "x_test": [359, 20], "y_test": [359]}
    assert json.loads(result.stdout) == {"layer": "s", "shapes": shapes}
    assert "x_test [359, 20]" in CliRunner().invoke(main, arguments).stderr
    found = load_data(f"npz:{target}")
    assert found.input_shape == (20,) and len(found.test) == 359
    digits = load_data("digits").test
    x = np.stack([np.asarray(one) for one, _ in digits])
    np.testing.assert_allclose(found.test.x, by_hand(x)["s"], atol=1e-4)
    assert found.test.y.tolist() == [int(y) for _, y in digits]


def test_data_that_do_not_fit_are_an_error_and_nothing_is_written(tmp_path):
    save(classifier(), tmp_path / "model.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones((40, 5), np.float32), y=np.arange(40) % 2)
    arguments = ["features", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "f.npz")]
    result = CliRunner().invoke(main, [*arguments, "--data", f"npz:{tmp_path / 'd.npz'}"])
    assert result.exit_code == 1 and "does not take the data" in result.stderr
    assert not (tmp_path / "f.npz").exists()
    with pytest.raises(Prune2OnnxError):
        features(custom(), BATCH)
