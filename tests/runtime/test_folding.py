"""Decoders that onnxruntime does not fold: found, and the weights named."""

import copy

import networks
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import helper

from prune2onnx.cli.main import main
from prune2onnx.graph.file import save
from prune2onnx.packing.load_cost import LoadCost, Prediction
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.report import Measured
from prune2onnx.runtime import folding as module
from prune2onnx.runtime.folding import Folding, folding, operators
from prune2onnx.runtime.session import session
from prune2onnx.runtime.validate import _memory_notes, validate


def levels(seed: int, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.rint(3 * rng.normal(size=shape)).astype(np.float32) * np.float32(0.01)


def branches(opset: int = 18) -> onnx.ModelProto:
    """x [N, 1024] times `a`, then in one branch of an If times `b`."""
    shapes = {name: helper.make_tensor_value_info(name, 1, ["N", 1024]) for name in ("t", "e", "y")}
    then = helper.make_graph(
        [helper.make_node("MatMul", ["h", "b"], ["t"])], "t", [], [shapes["t"]]
    )
    other = helper.make_graph([helper.make_node("Identity", ["h"], ["e"])], "e", [], [shapes["e"]])
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("ReduceMax", ["h"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    weights = {"a": levels(0, 1024, 1024), "b": levels(1, 1024, 1024)}
    return networks.model(nodes, weights, {"x": ["N", 1024]}, {"y": ["N", 1024]}, opset)


@pytest.fixture(scope="module")
def packed() -> onnx.ModelProto:
    made = pack(branches()).model
    assert "z" in {node.op_type for node in made.graph.node}  # in stages
    return made


@pytest.fixture(scope="module")
def closed(packed) -> onnx.ModelProto:
    """As a tool leaves it that drops `value_info`, without which NonZero has no known shape."""
    made = copy.deepcopy(packed)
    del made.graph.value_info[:]
    return made


def test_weights_of_an_if_body_are_folded_and_its_operators_compared(packed):
    assert folding(packed) == Folding()
    level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert operators(packed, level).count(":MatMul") == 2


@pytest.mark.parametrize("opset", [13, 17])
def test_stages_of_older_operator_sets_are_folded(opset):
    assert folding(pack(branches(opset)).model) == Folding()


def test_a_stage_that_onnxruntime_cannot_fold_is_found_and_its_weights_named(closed, packed):
    left = folding(closed, unpack(packed))
    assert set(left.weights) == {"a", "b"} and not left.complete and left.level == "basic"
    assert ":NonZero" in dict(left.more) and not left.fewer


def test_validate_refuses_such_a_file_with_status_4(closed, tmp_path):
    path = save(closed, tmp_path / "m.onnx")[0]
    result = CliRunner().invoke(main, ["validate", str(path)])
    assert result.exit_code == 4
    said = " ".join(result.stderr.split())
    assert "does not fold the decoders of a, b" in said and "at every inference" in said
    report = validate(path)
    assert report.unfolded == ("a", "b") and report.max_abs_diff < 1e-4


def test_a_runtime_without_constant_folding_is_found(packed, monkeypatch):
    def without(model, *, level, optimised):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(optimised)
        given = model.SerializeToString()
        return ort.InferenceSession(given, options, disabled_optimizers=["ConstantFolding"])

    unpacked = unpack(packed)
    monkeypatch.setattr(module, "session", without)
    left = folding(packed, unpacked, ("a", "b"))
    assert left.weights == ("a", "b") and ":Scan" in dict(left.more)  # gates that never open


def test_other_operators_without_a_weight_left_are_a_fault_too(packed):
    other = unpack(packed)
    other.graph.node[0].op_type = "Add"
    left = folding(packed, other)
    assert not left.weights and dict(left.more)[":MatMul"] == 1 and dict(left.fewer)[":Add"] == 1


def test_stages_that_free_no_memory_are_noted():
    load = Prediction(LoadCost(100.0, 100_000_000), LoadCost(50.0, 80_000_000), 8)
    (note,) = _memory_notes(load, Measured(1, peak_rss_bytes=200_000_000))
    assert "200.0 MB at its peak, 100.0 MB are expected" in note and "8 stages" in note
    assert not _memory_notes(load, Measured(1, peak_rss_bytes=140_000_000))
    assert not _memory_notes(load, Measured(1))
    alone = Prediction(load.packed, load.dense)
    assert not _memory_notes(alone, Measured(1, peak_rss_bytes=200_000_000))


def test_outputs_are_right_where_decoders_are_left(closed, packed):
    x = {"x": np.ones((2, 1024), np.float32)}
    one, other = (session(model).run(None, x)[0] for model in (closed, packed))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # of constants: other kernels
