"""Inputs that run: sizes, tokens, masks, states, shapes given by the user, arrays of a file."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from prune2onnx.cli.main import main
from prune2onnx.errors import MismatchError, RecipeError
from prune2onnx.runs.defaults import InputOptions
from prune2onnx.runtime.compare import answers, check_outputs, check_same
from prune2onnx.runtime.inputs import inputs_of, random_inputs
from prune2onnx.runtime.session import UnrunnableError, run, session


def parsed(text: str, **weights: np.ndarray) -> ModelProto:
    """A model of opset 17 from its nodes; weights become initializers."""
    made = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    made.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()
    )
    return made


def image(kernel: int = 7, strides: int = 4) -> ModelProto:
    weight = np.random.default_rng(0).normal(size=(4, 3, kernel, kernel)).astype(np.float32)
    nodes = f"c = Conv<strides=[{strides},{strides}]>(x, w) y = Relu(c)"
    return parsed(f"g (float[n,c,h,w] x) => (float[n,4,a,b] y) {{{nodes}}}", w=weight)


def text_model(vocabulary: int = 11) -> ModelProto:
    """Token ids through Cast and Unsqueeze, and a mask, both of [batch, length]."""
    table = np.random.default_rng(1).normal(size=(vocabulary, 4)).astype(np.float32)
    return parsed(
        "g (int64[batch,length] ids, int64[batch,length] attention_mask) => (float[n,l,e] y) {"
        "i = Cast<to=6>(ids) u = Unsqueeze(i, zero) e = Gather(table, u) s = Squeeze(e, zero)"
        "m = Cast<to=1>(attention_mask) k = Unsqueeze(m, last) y = Mul(s, k)}",
        table=table,
        zero=np.int64([0]),
        last=np.int64([2]),
    )


def test_open_sizes_grow_until_the_model_runs():
    (made,) = random_inputs(image())
    assert made["x"].shape[:2] == (1, 3) and made["x"].shape[2] >= 7
    assert run(session(image()), made)[0].size


def test_a_reshape_to_a_fixed_size_is_met():
    model = parsed(
        "g (float[n,1,h,w] x) => (float[n,c] y) { f = Reshape(x, s) y = MatMul(f, w1) }",
        s=np.int64([-1, 784]),
        w1=np.ones((784, 3), np.float32),
    )
    (made,) = random_inputs(model)
    assert made["x"].size % 784 == 0


def test_tokens_are_rows_of_their_table_and_masks_are_ones():
    (made,) = random_inputs(text_model())
    assert made["ids"].shape == made["attention_mask"].shape and made["ids"].shape[0] == 1
    assert made["ids"].max() < 11 and len(np.unique(made["ids"])) > 1
    assert (made["attention_mask"] == 1).all()
    bound, _ = random_inputs(text_model(2), (0, 1))
    assert bound["ids"].max() < 2


def test_sums_of_symbols_are_computed_and_states_are_zeros():
    model = parsed(
        "g (float[b,past,4] past_key, float[b,s,4] x, float[b,t,1] attention_mask) => "
        "(float[b,t,4] y) { k = Concat<axis=1>(past_key, x) y = Mul(k, attention_mask) }"
    )
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "past + s"
    (made,) = random_inputs(model)
    total = made["past_key"].shape[1] + made["x"].shape[1]
    assert made["attention_mask"].shape[1] == total and not made["past_key"].any()


def test_sizes_may_be_given_and_have_to_fit():
    (made,) = random_inputs(image(), shapes={"x": (2, 3, 9, 30)})
    assert made["x"].shape == (2, 3, 9, 30)
    with pytest.raises(RecipeError, match="no such input; its inputs are x"):
        random_inputs(image(), shapes={"images": (1,)})
    fixed = parsed("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    for shape in ((1, 5), (4,)):
        with pytest.raises(RecipeError, match="the model states"):
            random_inputs(fixed, shapes={"x": shape})
    with pytest.raises(RecipeError, match="batch is 2 in one input and 3"):
        random_inputs(text_model(), shapes={"ids": (2, 4), "attention_mask": (3, 4)})


@pytest.mark.parametrize(
    "model",
    [
        parsed("g (string[n] s) => (string[n] y) { y = Identity(s) }"),
        parsed("g (float[n,2] x) => (float[n,2] y) { z = Sub(x, x) y = Div(z, z) }"),
        parsed("g (float[n,1000000,1000000] x) => (float[n,a,b] y) { y = Relu(x) }"),
    ],
    ids=["strings", "NaN", "huge"],
)
def test_what_cannot_be_run_proves_nothing(model):
    with pytest.raises(UnrunnableError):
        random_inputs(model)
    with pytest.raises(UnrunnableError):
        check_same("m", model, model)


def test_random_operators_prove_nothing(tmp_path):
    model = parsed("g (float[n,2] x) => (float[n,2] y) { z = RandomNormalLike(x) y = Add(x, z) }")
    with pytest.raises(UnrunnableError, match="RandomNormalLike"):
        check_same("m", model, model)
    onnx.save(model, tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["validate", str(tmp_path / "m.onnx"), "--json"])
    assert result.exit_code == 0 and "random" in json.loads(result.stdout)["skipped"]


def test_half_precision_may_differ_by_steps_and_no_more():
    want = np.linspace(-8, 8, 50, dtype=np.float16)
    check_outputs("m", np.nextafter(want, np.float16(100)), want)
    with pytest.raises(MismatchError):
        check_outputs("m", want + np.float16(0.1), want)
    with pytest.raises(MismatchError):  # not where the model computes in float32
        check_outputs("m", (want + np.float16(0.02)).astype(np.float32), want.astype(np.float32))


def test_strings_maps_and_lists_are_compared_for_equality():
    want = [{"a": 0.5, "b": 0.25}, {"a": 0.0, "b": 1.0}]
    assert check_outputs("m", [dict(one) for one in want], want) == 0
    for wrong in (want[:1], [{"a": 0.5}, want[1]], [{"a": 0.9, "b": 0.25}, want[1]]):
        with pytest.raises(MismatchError):
            check_outputs("m", wrong, want)
    words = np.array(["cat", "dog"], object)
    check_outputs("m", words.copy(), words)
    with pytest.raises(MismatchError):
        check_outputs("m", words[::-1], words)


def test_a_fixed_batch_is_fed_as_it_is_declared():
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    fixed = parsed("g (float[2,4] x) => (float[2,3] y) { y = MatMul(x, w) }", w=weight)
    x = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    got, labels = answers(session(fixed), [(x, np.arange(7))])
    np.testing.assert_allclose(got, x @ weight, rtol=1e-5)
    assert labels.tolist() == list(range(7))


def test_arrays_for_each_input_need_no_labels(tmp_path):
    ids = np.random.default_rng(0).integers(0, 11, (5, 3))
    np.savez(tmp_path / "d.npz", ids=ids, attention_mask=np.ones((5, 3), np.int64))
    options = InputOptions(f"npz:{tmp_path / 'd.npz'}")
    found = inputs_of(text_model(), session(text_model()), options, count=9, examples=4, batch=2)
    assert [each["ids"].tolist() for each in found] == [ids[:2].tolist(), ids[2:4].tolist()]
    onnx.save(text_model(), tmp_path / "m.onnx")
    for arguments in (
        ["validate", tmp_path / "m.onnx"],
        ["benchmark", tmp_path / "m.onnx", "--seconds", "0.05"],
        ["shrink", tmp_path / "m.onnx", tmp_path / "o.onnx"],
        ["pack", tmp_path / "m.onnx", tmp_path / "o.onnx", "--bits", "4"],
    ):
        given = [*map(str, arguments), "--data", options.data]
        result = CliRunner().invoke(main, given)
        assert result.exit_code == 0, result.stderr


def test_examples_with_labels_give_an_error_also_where_the_input_is_called_x(tmp_path):
    weight = np.eye(4, 2, dtype=np.float32)
    model = parsed("g (float[1,4] x) => (float[1,2] y) { y = MatMul(x, w) }", w=weight)
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=(x @ weight).argmax(1))
    onnx.save(model, tmp_path / "m.onnx")
    given = ["validate", str(tmp_path / "m.onnx"), "--data", f"npz:{tmp_path / 'd.npz'}", "--json"]
    result = CliRunner().invoke(main, given)
    assert json.loads(result.stdout)["compressed"]["error"] == 0


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "INT4"])
def test_types_that_numpy_lacks_go_in_and_out(kind, tmp_path):
    number = TensorProto.DataType.Value(kind)
    values = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    stored = values.astype(helper.tensor_dtype_to_np_dtype(number))
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["w"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=number),
    ]
    one, two = (helper.make_tensor_value_info(n, number, ["n", 4]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [one], [two], [numpy_helper.from_array(stored, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (got,) = run(session(model), {"x": np.zeros_like(stored)})
    np.testing.assert_array_equal(got, stored.astype(np.float32))
    onnx.save(model, tmp_path / "m.onnx")
    for verb in (["validate"], ["inspect"], ["benchmark", "--seconds", "0.05"]):
        result = CliRunner().invoke(main, [*verb, str(tmp_path / "m.onnx")])
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("text", ["x", "=1,2", "x=1,b", "x=-1"])
def test_an_input_shape_that_is_none_is_refused(text, tmp_path):
    onnx.save(image(), tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["validate", str(tmp_path / "m.onnx"), "--input-shape", text])
    assert result.exit_code == 2 and "images=1,3,224,224" in result.stderr


def test_an_input_shape_is_used(tmp_path):
    onnx.save(image(), tmp_path / "m.onnx")
    given = ["validate", str(tmp_path / "m.onnx"), "--input-shape", "x=1,3,64,32", "--json"]
    assert CliRunner().invoke(main, given).exit_code == 0
    small = CliRunner().invoke(main, [*given[:3], "x=1,3,4,4", "--json"])
    assert "did not run" in json.loads(small.stdout)["skipped"]
