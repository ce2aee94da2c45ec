"""`prune2onnx shrink`: from a file to a file without its dead channels."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from networks import model, run
from onnx import ModelProto, TensorProto, helper

import prune2onnx
from prune2onnx.cli.main import main
from prune2onnx.errors import MismatchError
from prune2onnx.graph.file import load
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.shrinking.shrink import Shrunk


def network(dead: int) -> ModelProto:
    """x [N, 6] -> 8 neurons, the first ones dead -> y [N, 3]."""
    rng = np.random.default_rng(1)
    tensors = {
        "a.weight": rng.normal(size=(8, 6)).astype(np.float32),
        "a.bias": rng.normal(size=8).astype(np.float32),
        "b.weight": rng.normal(size=(3, 8)).astype(np.float32),
    }
    tensors["a.weight"][:dead] = 0
    nodes = [
        helper.make_node("Gemm", ["x", "a.weight", "a.bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b.weight"], ["y"], transB=1),
    ]
    return model(nodes, tensors, {"x": ["N", 6]}, {"y": ["N", 3]})


def shrunk(given: ModelProto, folder: Path, *options: str) -> tuple[ModelProto, str, str]:
    """The result, and what was printed on stdout and on stderr."""
    onnx.save(given, folder / "in.onnx")
    arguments = ["shrink", str(folder / "in.onnx"), str(folder / "out.onnx"), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return load(folder / "out.onnx"), result.stdout, result.stderr


def test_dead_neurons_leave_the_file(tmp_path):
    made, out, stderr = shrunk(network(dead=3), tmp_path)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in made.graph.initializer}
    assert shapes == {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (3, 5), "b.bias": (3,)}
    np.testing.assert_allclose(run(made)[0], run(network(dead=3))[0], atol=1e-5)
    assert "removed 3 channels and neurons" in stderr and "8x6" in stderr and not out


def convolutions(dead: int) -> ModelProto:
    """x [N, 3, 6, 6] -> 12 channels, the first ones dead -> y [N, 4, 6, 6]."""
    rng = np.random.default_rng(2)
    tensors = {
        "a.weight": rng.normal(size=(12, 3, 1, 1)).astype(np.float32),
        "b.weight": rng.normal(size=(4, 12, 1, 1)).astype(np.float32),
    }
    tensors["a.weight"][:dead] = 0
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["h"]),
        helper.make_node("Conv", ["h", "b.weight"], ["y"]),
    ]
    return model(nodes, tensors, {"x": ["N", 3, 6, 6]}, {"y": ["N", 4, 6, 6]})


@pytest.mark.parametrize(("options", "left"), [((), 8), (("--multiple", "1"), 5)])
def test_convolutions_keep_as_many_channels_as_kernels_compute_at_a_time(options, left, tmp_path):
    made, _, stderr = shrunk(convolutions(dead=7), tmp_path, *options)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in made.graph.initializer}
    assert shapes == {"a.weight": (left, 3, 1, 1), "b.weight": (4, left, 1, 1)}
    np.testing.assert_allclose(run(made)[0], run(convolutions(dead=7))[0], atol=1e-5)
    assert ("a.weight[0, 1, 2]" in stderr) == (left == 8)


def test_pack_shrinks_first_where_asked(tmp_path):
    onnx.save(network(dead=3), tmp_path / "in.onnx")
    arguments = ["pack", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    result = CliRunner().invoke(main, [*arguments, "--shrink"])
    assert result.exit_code == 0, result.stderr
    assert "3 dead channels and neurons removed" in result.stderr
    assert "equal outputs before and after" in result.stderr
    made = load(tmp_path / "out.onnx")
    assert {t.name: tuple(t.dims) for t in unpack(made).graph.initializer}["a.weight"] == (5, 6)
    np.testing.assert_allclose(run(made)[0], run(network(dead=3))[0], atol=1e-5)
    assert "dead channels" not in CliRunner().invoke(main, arguments).stderr


def test_programs_get_json(tmp_path):
    given = network(dead=3)
    _, out, stderr = shrunk(given, tmp_path, "--json")
    facts = json.loads(out)
    assert facts["removed"] == 3 and 0 <= facts["difference"] < 1e-5
    assert facts["rows"][0] == {"name": "a.weight", "before": [8, 6], "after": [5, 6]}
    assert facts["nbytes_before"] == given.ByteSize() > facts["nbytes"]
    assert facts["files"] == [str(tmp_path / "out.onnx")]
    assert not stderr


def test_a_file_without_dead_channels_stays_as_it_is(tmp_path):
    given = network(dead=0)
    made, _, stderr = shrunk(given, tmp_path)
    assert made == given
    assert "nothing could be removed" in stderr


def test_a_packed_file_is_unpacked_and_says_so(tmp_path):
    rng = np.random.default_rng(2)
    given = network(dead=0)
    wide = rng.integers(-2, 3, (400, 6)).astype(np.float32) * (rng.random((400, 6)) < 0.2)
    reader = rng.integers(-2, 3, (3, 400)).astype(np.float32)
    dead = int((~wide.any(1)).sum())
    for tensor, array in zip(given.graph.initializer, (wide, np.zeros(400), reader), strict=True):
        value = np.asarray(array, np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    packed = pack(given).model
    assert is_packed(packed)
    made, _, stderr = shrunk(packed, tmp_path)
    assert "pack it again" in stderr and not made.functions
    assert tuple(made.graph.initializer[0].dims) == (400 - dead, 6)


def test_dead_channels_that_stay_have_a_reason(tmp_path):
    given = network(dead=5)
    given.graph.node[1].op_type = "Softmax"  # mixes all neurons
    made, _, stderr = shrunk(given, tmp_path)
    assert made == given
    assert "kept: a.weight[0, 1, 2] and 2 more: " in stderr


@pytest.mark.parametrize("content", [b"", b"no onnx"])
def test_what_is_no_onnx_is_named(content, tmp_path):
    (tmp_path / "in.onnx").write_bytes(content)
    arguments = ["shrink", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "in.onnx" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.onnx").exists()


def test_the_function_proves_its_result_or_says_that_it_cannot(monkeypatch):
    small = prune2onnx.shrink(network(2))
    assert small.removed == 2 and not any("not run" in note for note in small.notes)

    def broken(given: ModelProto, **_: object) -> Shrunk:
        wrong = ModelProto()
        wrong.CopyFrom(given)
        wrong.graph.initializer[2].raw_data = bytes(len(wrong.graph.initializer[2].raw_data))
        return Shrunk(wrong)

    monkeypatch.setattr("prune2onnx.commands.shrink.remove", broken)
    with pytest.raises(MismatchError, match="do not ship"):
        prune2onnx.shrink(network(2))


def test_a_model_that_takes_strings_is_shrunk_with_a_note():
    given = network(2)
    given.graph.input.append(helper.make_tensor_value_info("s", TensorProto.STRING, [1]))
    given.graph.node.append(helper.make_node("Identity", ["s"], ["t"]))
    given.graph.output.append(helper.make_tensor_value_info("t", TensorProto.STRING, [1]))
    small = prune2onnx.shrink(given)
    assert small.removed == 2 and "no random values" in small.notes[-1]
