"""int8: which layers, what it costs, and a packed file that is small and computes in int8."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from networks import model, session, weights
from onnx import ModelProto, helper, numpy_helper

from prune2onnx.cli.main import main
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.file import load
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.benchmark import Timing
from prune2onnx.runtime.folding import folds, operators
from prune2onnx.runtime.int8 import quantize_int8

ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
RNG = np.random.default_rng(4)
EXAMPLES = [{"x": RNG.normal(size=(8, 3, 10, 10)).astype(np.float32)} for _ in range(4)]


def network(step: float | None = None) -> ModelProto:
    """Two convolutions and a linear layer; with a step, half of the weights zero, few levels."""
    rng = np.random.default_rng(3)

    def weight(*shape: int) -> np.ndarray:
        if step is None:
            return (0.2 * rng.normal(size=shape)).astype(np.float32)
        levels = rng.integers(-3, 4, shape) * (rng.random(shape) < 0.5)
        return levels.astype(np.float32) * np.float32(step)

    tensors = {
        "a": weight(8, 3, 3, 3),
        "a.bias": rng.normal(size=8).astype(np.float32),
        "b": weight(16, 8, 3, 3),
        "c": weight(5, 16 * 36),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a", "a.bias"], ["p"]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Conv", ["q", "b"], ["r"]),
        helper.make_node("Relu", ["r"], ["s"]),
        helper.make_node("Flatten", ["s"], ["t"]),
        helper.make_node("Gemm", ["t", "c"], ["y"], transB=1),
    ]
    return model(nodes, tensors, {"x": ["N", 3, 10, 10]}, {"y": ["N", 5]})


def answers(m: ModelProto) -> np.ndarray:
    return session(m).run(None, EXAMPLES[0])[0]


def test_all_layers_compute_in_int8_and_answer_nearly_alike():
    made = quantize_int8(network(), EXAMPLES)
    assert [(layer.weight, layer.op, layer.is_int8) for layer in made.layers] == [
        ("a", "Conv", True),
        ("b", "Conv", True),
        ("c", "Gemm", True),
    ]
    left = {name.partition(":")[2] for name in operators(made.model, ALL)}
    assert {"QLinearConv", "QGemm"} <= left and not {"Conv", "Gemm", "FusedConv"} & left
    want, got = answers(network()), answers(made.model)
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_weights_on_levels_stay_as_they_are_and_the_packed_file_small():
    dense = network(0.037)
    made = quantize_int8(dense, EXAMPLES)
    stored = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    for name in "abc":
        codes = stored[f"{name}_quantized"]
        assert codes.dtype == np.int8 and np.abs(codes).max() == 3
        kept = codes * stored[f"{name}_scale"]
        original = next(t for t in dense.graph.initializer if t.name == name)
        assert np.array_equal(kept, numpy_helper.to_array(original))
    packed = pack(made.model, anonymize=True).model
    assert packed.ByteSize() < 0.6 * made.model.ByteSize()
    assert folds(packed) and np.array_equal(answers(packed), answers(made.model))
    assert sorted(weights(unpack(packed)).values()) == sorted(weights(made.model).values())


def test_a_layer_of_zeros_adds_its_bias_in_float():
    given = network()
    for tensor in given.graph.initializer:
        if tensor.name == "a":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 3, 3, 3), np.float32), "a"))
    wide = [{"x": 100 * example["x"]} for example in EXAMPLES]  # their step is coarse for a bias
    made = quantize_int8(given, wide)
    assert [layer.is_int8 for layer in made.layers] == [False, True, True]
    assert made.layers[0].reason == "all its weights are zero"
    np.testing.assert_allclose(answers(made.model), answers(given), atol=0.05)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm"])
@pytest.mark.parametrize("step", [None, 0.001])
def test_a_channel_of_zeros_among_others_keeps_its_bias(op, step):
    shape = {"Conv": [4, 6, 3, 3], "ConvTranspose": [6, 4, 3, 3], "Gemm": [6, 4]}[op]
    w = RNG.integers(-3, 4, shape) * 0.001 if step else 0.002 * RNG.normal(size=shape)
    bias = np.array([0.05, 0.21, 0.1, 0.3])
    index = (1,) if op == "Conv" else (slice(None), 1)
    w[index] = 0
    given = model(
        [helper.make_node(op, ["x", "w", "b"], ["y"])],
        {"w": w.astype(np.float32), "b": bias.astype(np.float32)},
        {"x": ["N", 6, 5, 5][: len(shape)]},
        {"y": ["N", 4, None, None][: len(shape)]},
    )
    # inputs have steps of 0.4, outputs much smaller ones
    examples = [{"x": RNG.uniform(0, 100, [9, 6, 5, 5][: len(shape)]).astype(np.float32)}]
    want = session(given).run(None, examples[0])[0]
    got = session(quantize_int8(given, examples).model).run(None, examples[0])[0]
    step_of_outputs = (max(want.max(), 0) - min(want.min(), 0)) / 255
    assert np.abs(want - got)[:, 1].max() < 0.6 * step_of_outputs


def test_layers_stay_float_until_the_error_is_met():
    def error(m: ModelProto) -> float:
        there = {tensor.name for tensor in m.graph.initializer}
        return 1.0 if "b" in there else 9.0  # b must not be quantized

    made = quantize_int8(network(), EXAMPLES, evaluate=error, max_drop=0.5)
    state = {layer.weight: layer for layer in made.layers}
    assert (made.float_error, made.error) == (1.0, 1.0)
    assert not state["b"].is_int8 and "0.5 points" in state["b"].reason
    # layers that disturb the outputs less than b are int8
    for layer in made.layers:
        assert layer.is_int8 == (layer.disturbance < state["b"].disturbance) or layer.weight == "b"
    never = quantize_int8(network(), EXAMPLES, evaluate=lambda m: float(m != network()))
    assert never.model == network() and not any(layer.is_int8 for layer in never.layers)
    gladly = quantize_int8(network(), EXAMPLES, evaluate=lambda m: 1.0)
    assert all(layer.is_int8 and layer.disturbance is None for layer in gladly.layers)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_what_is_to_be_kept_is_kept(method, capsys):
    made = quantize_int8(network(), EXAMPLES, method=method, keep=("a",))
    assert [layer.is_int8 for layer in made.layers] == [False, True, True]
    assert made.layers[0].reason == "as asked"
    assert "Conv" in {name.partition(":")[2] for name in operators(made.model, ALL)}
    assert not capsys.readouterr().out


def test_what_cannot_be_quantized_is_named():
    with pytest.raises(RecipeError, match="no layer has the weight 'd'; known are a, b, c"):
        quantize_int8(network(), EXAMPLES, keep=("d",))
    with pytest.raises(RecipeError, match="calibration method 'mean', expected minmax"):
        quantize_int8(network(), EXAMPLES, method="mean")
    with pytest.raises(RecipeError, match="no calibration example"):
        quantize_int8(network(), [])
    bare = model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": ["N"]}, {"y": ["N"]})
    with pytest.raises(Prune2OnnxError, match="no layer that onnxruntime's quantizer could do"):
        quantize_int8(bare, EXAMPLES)
    with pytest.raises(Prune2OnnxError, match=r"fails on x \[8, 3, 4, 4\]"):
        quantize_int8(network(), [{"x": np.zeros((8, 3, 4, 4), np.float32)}])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Path, str]:
    """A linear classifier of three patterns, and examples of them."""
    folder = tmp_path_factory.mktemp("classifier")
    rng = np.random.default_rng(5)
    patterns = rng.normal(size=(3, 48)).astype(np.float32)
    y = np.arange(300) % 3
    x = (patterns[y] + rng.normal(size=(300, 48))).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=y)
    hidden = (0.1 * rng.normal(size=(400, 48))).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "h"], ["a"], transB=1),
        helper.make_node("Gemm", ["a", "w"], ["y"], transB=1),
    ]
    tensors = {"h": hidden, "w": patterns @ np.linalg.pinv(hidden)}
    onnx.save(model(nodes, tensors, {"x": ["N", 48]}, {"y": ["N", 3]}), folder / "in.onnx")
    return folder / "in.onnx", f"npz:{folder / 'data.npz'}"


def test_a_file_is_quantized_with_its_data(classifier, tmp_path):
    source, data = classifier
    target = tmp_path / "out.onnx"
    arguments = ["quantize", str(source), str(target), "--data", data, "--max-drop", "4"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert not result.stdout and "int8" in result.stderr and "validation error" in result.stderr
    assert load(target).ByteSize() < 0.4 * source.stat().st_size
    facts = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert {layer["weight"] for layer in facts["layers"]} == {"h", "w"}
    assert facts["error"] <= facts["float_error"] + 4 and facts["float_error"] < 20
    assert facts["nbytes"] == target.stat().st_size and facts["timing"]["runs"] > 0


def test_a_packed_file_is_quantized_unpacked(classifier, tmp_path):
    source, data = classifier
    packed = tmp_path / "packed.onnx"
    assert (
        CliRunner().invoke(main, ["pack", str(source), str(packed), "--bits", "4"]).exit_code == 0
    )
    arguments = ["quantize", str(packed), str(tmp_path / "out.onnx"), "--data", data]
    stderr = CliRunner().invoke(main, arguments).stderr
    assert "pack it as the last step" in stderr
    assert not load(tmp_path / "out.onnx").functions


def test_wrong_usage_of_the_command(classifier, tmp_path):
    source, data = classifier
    target = tmp_path / "out.onnx"
    for arguments, status, says in (
        (["--data", "digits"], 1, "fails on x"),
        (["--data", data, "--examples", "0"], 2, "expected 1 or more"),
        (["--data", data, "--keep", "z"], 2, "no layer has the weight 'z'"),
        ([], 2, "--data"),
    ):
        result = CliRunner().invoke(main, ["quantize", str(source), str(target), *arguments])
        assert result.exit_code == status and says in result.stderr, arguments
        assert not target.exists()


@pytest.mark.parametrize("dead", [[0], [0, 3], [2]])
def test_channels_of_zeros_may_be_the_first(dead):
    """The quantizer takes ranges for each channel or for none."""
    given = network()
    weight = numpy_helper.to_array(given.graph.initializer[0]).copy()
    weight[dead] = 0
    given.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "a"))
    made = quantize_int8(given, EXAMPLES)
    assert all(layer.is_int8 for layer in made.layers)
    np.testing.assert_allclose(answers(made.model), answers(given), atol=0.2)


def two_readers() -> ModelProto:
    """x [N, 6] -> 6 -> 6, both with the weight `w`, whose rows and columns differ by far."""
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(6, 6)) * 10.0 ** np.arange(-2, 4)[:, None]).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        helper.make_node("Sigmoid", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["y"]),
    ]
    return model(nodes, {"w": weight}, {"x": ["N", 6]}, {"y": ["N", 6]})


def test_a_weight_that_is_read_along_two_axes_has_one_scale():
    """With a scale for each of one axis, the other reader would get wrong values."""
    x = [{"x": np.random.default_rng(i).normal(size=(8, 6)).astype(np.float32)} for i in range(3)]
    want = session(two_readers()).run(None, x[0])[0]
    (tied,) = quantize_int8(two_readers(), x).layers
    assert tied.is_int8
    got = session(quantize_int8(two_readers(), x).model).run(None, x[0])[0]
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_a_transposed_convolution_with_groups_stays_float_and_the_others_do_not():
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "t": rng.normal(size=(4, 2, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"]),
        helper.make_node("ConvTranspose", ["h", "t"], ["y"], group=2),
    ]
    given = model(nodes, tensors, {"x": ["N", 3, 10, 10]}, {"y": ["N", 4, 10, 10]})
    first, second = quantize_int8(given, EXAMPLES).layers
    assert first.is_int8 and not second.is_int8 and "groups" in second.reason


def test_a_layer_that_the_quantizer_refuses_stays_float(monkeypatch):
    import onnxruntime.quantization as quantizer

    quantize = quantizer.quantize_static

    def refuse(given, target, *rest, nodes_to_exclude=(), nodes_to_quantize=(), **options):
        second = [node.name for node in given.graph.node if "b" in node.input]
        if set(second) & set(nodes_to_quantize) or not {*nodes_to_exclude, *nodes_to_quantize}:
            raise ValueError("no such thing")
        which = {"nodes_to_exclude": nodes_to_exclude, "nodes_to_quantize": nodes_to_quantize}
        return quantize(given, target, *rest, **{k: list(v) for k, v in which.items()}, **options)

    monkeypatch.setattr(quantizer, "quantize_static", refuse)
    made = quantize_int8(network(), EXAMPLES)
    assert [layer.is_int8 for layer in made.layers] == [True, False, True]
    assert "no such thing" in made.layers[1].reason


def test_names_that_the_quantizer_would_make_are_free():
    """A bias that two layers share is copied, and called with a number behind its name."""
    rng = np.random.default_rng(0)
    weight = {name: rng.normal(size=(6, 6)).astype(np.float32) for name in ("w", "v", "w_scale")}
    tensors = {**weight, "b": rng.normal(size=6).astype(np.float32)}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["b0"]),
        helper.make_node("Gemm", ["b0", "v", "b"], ["h2"]),
        helper.make_node("Relu", ["h2"], ["b_quantized"]),
        helper.make_node("Gemm", ["b_quantized", "w_scale"], ["y"]),
    ]
    given = model(nodes, tensors, {"x": ["N", 6]}, {"y": ["N", 6]})
    x = [{"x": rng.normal(size=(8, 6)).astype(np.float32)} for _ in range(3)]
    made = quantize_int8(given, x)
    assert [layer.weight for layer in made.layers if layer.is_int8] == ["w", "v", "w_scale"]
    want, got = (session(m).run(None, x[0])[0] for m in (given, made.model))
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
    kept = quantize_int8(given, x, keep=["w_scale"])
    assert [layer.weight for layer in kept.layers if not layer.is_int8] == ["w_scale"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A network with two inputs and a picture as output, and examples for it without labels."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(5)
    tensors = {
        "a": (0.3 * rng.normal(size=(8, 3, 3, 3))).astype(np.float32),
        "b": (0.3 * rng.normal(size=(3, 8, 3, 3))).astype(np.float32),
        "g": rng.normal(size=(4, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["style", "g"], ["s"]),
        helper.make_node("Unsqueeze", ["s", "axes"], ["t"]),
        helper.make_node("Conv", ["image", "a"], ["p"], pads=[1] * 4),
        helper.make_node("Mul", ["p", "t"], ["q"]),
        helper.make_node("Relu", ["q"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["y"], pads=[1] * 4),
    ]
    given = model(
        nodes,
        {**tensors, "axes": np.array([2, 3])},
        {"image": ["N", 3, "h", "w"], "style": ["N", 4]},
        {"y": ["N", 3, "h", "w"]},
    )
    onnx.save(given, folder / "in.onnx")
    arrays = {
        "image": rng.normal(size=(40, 3, 12, 12)).astype(np.float32),
        "style": rng.normal(size=(40, 4)).astype(np.float32),
    }
    np.savez(folder / "inputs.npz", **arrays)
    return folder / "in.onnx", folder / "inputs.npz", arrays


def test_several_inputs_without_labels_are_limited_by_the_error_of_the_outputs(pair, tmp_path):
    source, data, arrays = pair
    target = tmp_path / "out.onnx"
    arguments = ["quantize", str(source), str(target), "--data", f"npz:{data}", "--json"]
    facts = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert facts["unit"] == "of the outputs" and 0 < facts["error"] < 0.05
    assert {one["weight"] for one in facts["layers"] if one["is_int8"]} == {"a", "b", "g"}
    want, got = (session(load(path)).run(None, arrays)[0] for path in (source, target))
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
    some = json.loads(CliRunner().invoke(main, [*arguments, "--max-rel-error", "0.033"]).stdout)
    assert 0 < sum(one["is_int8"] for one in some["layers"]) < 3 and some["error"] <= 0.033


def test_a_search_that_keeps_everything_float_says_what_it_tried(pair, tmp_path):
    source, data, _ = pair
    arguments = ["quantize", str(source), str(tmp_path / "out.onnx"), "--data", f"npz:{data}"]
    result = CliRunner().invoke(main, [*arguments, "--max-rel-error", "1e-6"])
    assert result.exit_code == 0
    assert "no layer could be int8" in result.stderr
    assert "of the 3 layers in float: an error of 0.0" in result.stderr
    assert "with 0, 0.0" in result.stderr and "0 + 1e-06 of the outputs" in result.stderr


def test_random_inputs_quantize_for_a_try_and_say_so(pair, tmp_path):
    source, _, _ = pair
    arguments = ["quantize", str(source), str(tmp_path / "out.onnx"), "--data", "random"]
    result = CliRunner().invoke(main, [*arguments, "--input-shape", "image=1,3,8,8"])
    assert result.exit_code == 0, result.stderr
    assert "not for use" in result.stderr and "relative error of the outputs 0.0" in result.stderr


def test_limits_that_the_data_cannot_measure_are_refused(pair, classifier, tmp_path):
    source, data, _ = pair
    for arguments, status, says in (
        ([source, "--data", f"npz:{data}", "--max-drop", "1"], 2, "--max-rel-error"),
        ([source, "--data", "random", "--max-drop", "1", "--max-rel-error", "1"], 2, "one of them"),
        ([source, "--data", "random", "--max-rel-error", "-1"], 2, "0 or more"),
        ([source, "--data", "digits"], 1, "an array for each input"),
        ([source, "--data", "digits", "--input-shape", "style=2,4"], 2, "leave it out"),
    ):
        target = tmp_path / "out.onnx"
        given = [str(one) for one in arguments]
        result = CliRunner().invoke(main, ["quantize", given[0], str(target), *given[1:]])
        assert result.exit_code == status and says in result.stderr, (arguments, result.stderr)
        assert not target.exists()


def test_a_model_that_takes_one_example_at_a_time_is_quantized(tmp_path):
    rng = np.random.default_rng(0)
    weight = {"w": rng.normal(size=(6, 3)).astype(np.float32)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    onnx.save(model([node], weight, {"x": [4, 6]}, {"y": [4, 3]}), tmp_path / "in.onnx")
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(64, 6)), y=rng.integers(0, 3, 64))
    arguments = ["quantize", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    for limit in (["--max-drop", "100"], ["--max-rel-error", "0.5"]):
        result = CliRunner().invoke(
            main, [*arguments, "--data", f"npz:{tmp_path / 'd.npz'}", *limit, "--json"]
        )
        facts = json.loads(result.stdout)
        assert facts["layers"][0]["is_int8"] and facts["timing"]["batch"] == 4


def test_layers_in_bodies_are_told_apart_from_none():
    """onnxruntime's quantizer does the main graph alone."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(6, 6)).astype(np.float32), "w")
    y = helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)
    node = helper.make_node("MatMul", ["x", "w"], ["b"])
    body = helper.make_graph([node], "then", [], [y], [weight])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    given = model(nodes, {}, {"x": ["N", 6]}, {"y": ["N", 6]})
    with pytest.raises(Prune2OnnxError, match="2 are in bodies of If"):
        quantize_int8(given, [{"x": rng.normal(size=(8, 6)).astype(np.float32)}])


@pytest.mark.parametrize(
    ("compute", "kernel"), [("int8", "MatMulInteger"), ("int8-weights", "MatMulNBits")]
)
def test_convolutions_are_static_and_matrices_as_asked(compute, kernel):
    made = quantize_int8(network(), EXAMPLES, compute=compute)
    assert [(layer.weight, layer.compute, layer.is_int8) for layer in made.layers] == [
        ("a", "static", True),
        ("b", "static", True),
        ("c", compute, True),
    ]
    ops = [node.op_type for node in made.model.graph.node]
    assert kernel in ops and "Gemm" not in ops
    assert operators(made.model, ALL).count("com.microsoft:QLinearConv") == 2
    want = answers(network())
    assert np.linalg.norm(answers(made.model) - want) < 0.03 * np.linalg.norm(want)


def test_only_convolutions_where_matrices_are_to_be_float32():
    made = quantize_int8(network(), EXAMPLES, compute="float32")
    assert [layer.weight for layer in made.layers] == ["a", "b"]
    assert any(node.op_type == "Gemm" for node in made.model.graph.node)


def test_what_is_computed_between_matrices_keeps_its_precision():
    """A patch embedding, then sums and products of a transformer, which fixed ranges would hurt."""
    rng = np.random.default_rng(0)
    tensors = {"a": (0.3 * rng.normal(size=(40, 3, 5, 5))).astype(np.float32)}
    tensors |= {name: rng.normal(size=(40, 40)).astype(np.float32) / 6 for name in "uv"}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], strides=[5, 5]),
        helper.make_node("Reshape", ["p", "shape"], ["q"]),
        helper.make_node("Transpose", ["q"], ["r"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["r", "u"], ["s"]),
        helper.make_node("Add", ["r", "s"], ["t"]),
        helper.make_node("MatMul", ["t", "v"], ["y"]),
    ]
    tensors["shape"] = np.array([0, 40, -1])
    given = model(nodes, tensors, {"x": ["N", 3, 10, 10]}, {"y": ["N", 4, 40]})
    made = quantize_int8(given, EXAMPLES, compute="int8").model
    source = {name: node for node in made.graph.node for name in node.output}
    add = next(node for node in made.graph.node if node.op_type == "Add")
    assert all(source[name].op_type != "DequantizeLinear" for name in add.input)


def test_matrices_stay_float_where_accuracy_is_lost():
    want = answers(network())

    def error(made: ModelProto) -> float:
        return float(np.linalg.norm(answers(made) - want) / np.linalg.norm(want))

    asked = {"compute": "int4", "evaluate": error, "unit": "of the outputs"}
    made = quantize_int8(network(), EXAMPLES, max_drop=0.03, **asked)
    assert [layer.compute for layer in made.layers] == ["static", "static", "float32"]
    assert made.layers[2].reason == "int8 would cost more than 0.03 of the outputs"
    kept = quantize_int8(network(), EXAMPLES, max_drop=1.0, keep=["c"], **asked)
    assert kept.layers[2].reason == "as asked" and kept.error < 0.03


def test_a_model_without_any_layer_to_quantize_says_what_was_expected():
    node = helper.make_node("Relu", ["x"], ["y"])
    given = model([node], {}, {"x": ["N", 3, 10, 10]}, {"y": ["N", 3, 10, 10]})
    with pytest.raises(Prune2OnnxError, match=r"a convolution .* or a matrix or table"):
        quantize_int8(given, EXAMPLES, compute="int8")


@pytest.mark.parametrize(("ratio", "chosen"), [(0.6, "chosen: static"), (1.1, "no narrower type")])
def test_auto_takes_the_fastest_or_float32(pair, tmp_path, monkeypatch, ratio, chosen):
    source, data, _ = pair
    timing = Timing("f", 1, 0, 100, 1.0, 1.0, 1.0, 1.0, ratio, (0.99 * ratio, 1.01 * ratio))
    monkeypatch.setattr("prune2onnx.runtime.int8_choice.timed", lambda *_: timing)
    arguments = ["quantize", str(source), str(tmp_path / "out.onnx"), "--data", f"npz:{data}"]
    result = CliRunner().invoke(main, [*arguments, "--compute", "auto", "--json"])
    facts = json.loads(result.stdout)
    assert facts["notes"][-1].startswith(chosen) and len(facts["notes"]) == 5
    static = {layer["compute"] for layer in facts["layers"]}
    assert static == ({"static"} if ratio < 1 else {"float32"})
    assert (facts["nbytes"] == facts["nbytes_before"]) == (ratio > 1)
