"""Validation: correct files pass, and every kind of fault is found."""

import copy
import dataclasses
import importlib
import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from networks import custom, mlp
from onnx import TensorProto, helper, numpy_helper
from tiny import blobs, tiny_conv

from prune2onnx.data import batches
from prune2onnx.errors import MismatchError, Prune2OnnxError
from prune2onnx.graph.file import file_nbytes, save
from prune2onnx.packing.decoding import coded
from prune2onnx.packing.inline import is_packed, outlined
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.report import Measured
from prune2onnx.runtime import latency
from prune2onnx.runtime.compare import check_outputs, check_same, error_percent
from prune2onnx.runtime.folding import Folding, folds, operators
from prune2onnx.runtime.inputs import random_inputs
from prune2onnx.runtime.latency import latencies, measured
from prune2onnx.runtime.session import UnrunnableError, session
from prune2onnx.runtime.validate import check_weights, validate
from prune2onnx.training.export import export


def shared_network() -> torch.nn.Module:
    """A convolution and a linear layer with few distinct values and many zeros."""
    model = tiny_conv().eval()
    with torch.no_grad():
        for parameter in (model[0].weight, model[5].weight):
            parameter.copy_((parameter * 20).round() / 20)
    del model[1]  # BatchNorm, which the exporter would fold
    return model


@pytest.fixture(scope="module")
def dense():
    return export(shared_network(), (1, 6, 6))


@pytest.fixture(scope="module")
def packed(dense):
    return pack(dense).model


def test_packed_weights_equal_the_numpy_decoders(packed):
    assert check_weights(packed) >= 1


def test_a_weight_that_onnxruntime_decodes_differently_is_found(packed, monkeypatch):
    right = coded(packed)
    wrong = {name: value + np.float32(1e-7) for name, value in right.arrays.items()}
    module = importlib.import_module(
        "prune2onnx.runtime.validate"
    )  # the name means the function too
    monkeypatch.setattr(module, "coded", lambda _: dataclasses.replace(right, arrays=wrong))
    with pytest.raises(MismatchError, match=r"\.weight: onnxruntime .* other bits"):
        check_weights(packed)


def test_the_optimised_graph_is_the_dense_one(dense, packed):
    assert folds(packed)
    level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert sorted(operators(packed, level)) == sorted(operators(dense, level))
    assert is_packed(packed)


def test_a_decoder_that_stays_in_the_graph_is_found(packed):
    """A stream that a caller may replace is no constant, so nothing after it can be folded."""
    kept = copy.deepcopy(packed)
    call = next(node for node in outlined(kept).graph.node if node.domain == "prune2onnx")
    stream = next(t for t in kept.graph.initializer if t.name == call.input[0])
    kept.graph.input.append(
        helper.make_tensor_value_info(stream.name, stream.data_type, stream.dims)
    )
    assert not folds(kept, unpack(packed))


def test_outputs_within_rounding_pass_and_others_do_not():
    want = np.float32([[1.0, -200.0], [3.0, 4.0]])
    assert check_outputs("m", want + np.float32(1e-3), want) == pytest.approx(1e-3, rel=0.1)
    with pytest.raises(MismatchError, match=r"m: outputs differ from the reference's by up to 0.1"):
        check_outputs("m", want + np.float32(0.1), want)
    with pytest.raises(MismatchError, match="output shape"):
        check_outputs("m", want[:1], want)
    with pytest.raises(MismatchError):
        check_outputs("m", np.float32([[np.nan, 0], [0, 0]]), want)


def test_error_percent_counts_wrong_labels():
    outputs = np.float32([[1, 0], [0, 1], [0, 1], [1, 0]])
    assert error_percent(outputs, np.array([0, 1, 0, 0])) == 25.0


def test_measured_files_are_loaded_in_processes_of_their_own(dense, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(dense.SerializeToString())
    given = {"input": np.zeros((1, 1, 6, 6), np.float32)}
    (one,) = measured([path], latencies([path], [session(path)], given), [None])
    assert one.nbytes == path.stat().st_size
    assert (
        one.load_ms > 0
        and one.load_cpu_ms > 0
        and one.latency_ms["p95"] >= one.latency_ms["p50"] > 0
    )
    assert 1e7 < one.peak_rss_bytes < 1e9  # an interpreter with onnxruntime, not torch besides


def test_weights_that_onnxruntime_cannot_decode_are_a_mismatch(packed, monkeypatch):
    module = importlib.import_module("prune2onnx.runtime.validate")

    def failing(*given):
        raise RuntimeError("Non-zero status code")

    monkeypatch.setattr(module, "run", failing)
    with pytest.raises(MismatchError, match="cannot decode the weights: Non-zero status"):
        check_weights(packed)


def test_a_reference_that_differs_from_itself_proves_nothing(monkeypatch):
    compare = importlib.import_module("prune2onnx.runtime.compare")
    made, changed = mlp(), mlp()
    bias = changed.graph.initializer[-1]
    bias.CopyFrom(numpy_helper.from_array(np.ones(list(bias.dims), np.float32), bias.name))
    with pytest.raises(MismatchError):
        check_same("m", changed, made)
    real, drawn = compare.run_once, iter(range(1, 100))
    monkeypatch.setattr(
        compare, "run_once", lambda *given: [next(drawn) * each for each in real(*given)]
    )
    with pytest.raises(UnrunnableError, match="other outputs each time"):
        check_same("m", made, made)


def test_slow_loads_are_repeated_less_and_each_session_serves_for_all(dense, tmp_path, monkeypatch):
    """onnxruntime takes 8 s to open 50,000 nodes; `validate` opened 22 sessions."""
    path = tmp_path / "m.onnx"
    path.write_bytes(dense.SerializeToString())
    opened: list[object] = []
    real = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *given, **more: opened.append(1) or real(*given, **more)
    )
    loads = []
    load = latency.load_in_fresh_process
    monkeypatch.setattr(
        latency, "load_in_fresh_process", lambda path: loads.append(path) or load(path)
    )
    monkeypatch.setattr(latency, "_LOADS_SECONDS", 1e9)
    validate(path)
    assert len(opened) == 2 and len(loads) == 14
    monkeypatch.setattr(latency, "_LOADS_SECONDS", 0.0)
    assert validate(path).compressed.load_ms > 0
    assert len(opened) == 4 and len(loads) == 16


def test_a_report_has_the_promised_schema(dense, packed, tmp_path):
    paths = tmp_path / "dense.onnx", tmp_path / "model.onnx"
    for path, model in zip(paths, (dense, packed), strict=True):
        path.write_bytes(model.SerializeToString())
    report = validate(paths[1], paths[0], batches=batches(blobs(90, 3)))
    content = json.loads(report.to_json())
    assert " ".join(content) == (
        "schema task metric version seed environment dense compressed ratio drop paired density "
        "parameters folded unfolded max_abs_diff skipped budget validation notes weights layers"
    )
    assert (
        " ".join(content["dense"])
        == "nbytes error load_ms peak_rss_bytes latency_ms macs load_cpu_ms metrics"
    )
    assert list(content["compressed"]) == list(content["dense"])
    assert " ".join(content["weights"][0]) == (
        "name shape dtype nnz density codec nbytes bits_per_nonzero bits_per_weight reason "
        "entropy_nbytes sparse_nbytes zipped_nbytes"
    )
    sizes = [path.stat().st_size for path in paths]
    assert content["ratio"] == sizes[0] / sizes[1]
    # the same weights, so the same answers
    assert content["drop"] == 0 and content["folded"] and content["max_abs_diff"] == 0


def test_without_reference_or_data_a_file_is_compared_with_what_it_unpacks_to(packed, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(packed.SerializeToString())
    report = validate(path)
    assert report.ratio > 1 and report.drop is None and report.max_abs_diff == 0


def test_a_network_that_onnxruntime_cannot_run_is_validated_as_far_as_possible(
    tmp_path, monkeypatch
):
    plain, path = tmp_path / "plain.onnx", tmp_path / "model.onnx"
    save(custom(), plain)
    save(pack(custom()).model, path)
    report = validate(path)
    assert "com.example" in report.skipped and str(tmp_path) not in report.skipped
    assert report.folded and report.max_abs_diff is None and report.ratio > 5
    assert report.compressed == Measured(path.stat().st_size)
    assert json.loads(report.to_json())["skipped"] == report.skipped
    # A dense one has nothing to fold.
    assert validate(plain).folded
    assert validate(path, plain).dense.nbytes == plain.stat().st_size
    # A decoder that does not fold is found without running the network, too.
    module = importlib.import_module("prune2onnx.runtime.validate")
    left = Folding(("w",), level="basic")
    monkeypatch.setattr(
        module, "folding", lambda model, *_, **__: left if len(model.graph.node) == 1 else Folding()
    )
    assert validate(path).unfolded == ("w",) and not validate(path).folded


def test_files_count_their_data_files(tmp_path):
    files = save(mlp(), tmp_path / "m.onnx", "m.data")
    assert len(files) == 2
    assert file_nbytes(files[0]) == sum(path.stat().st_size for path in files)
    assert file_nbytes(save(mlp(), tmp_path / "one.onnx")[0]) == mlp().ByteSize()


def test_a_model_is_compared_with_the_one_that_it_was_made_from():
    assert check_same("m", pack(mlp()).model, mlp()) == 0
    wrong = mlp()
    array = numpy_helper.to_array(wrong.graph.initializer[0]) * 2
    wrong.graph.initializer[0].raw_data = array.tobytes()
    with pytest.raises(MismatchError, match="m: outputs differ"):
        check_same("m", wrong, mlp())
    with pytest.raises(UnrunnableError, match=r"com\.example"):
        check_same("m", custom(), custom())


def test_a_reference_with_other_inputs_is_refused(packed, tmp_path):
    path, other = tmp_path / "model.onnx", tmp_path / "other.onnx"
    path.write_bytes(packed.SerializeToString())
    renamed = copy.deepcopy(packed)
    renamed.graph.input[0].name = "x"
    for node in renamed.graph.node:
        node.input[:] = ["x" if name == "input" else name for name in node.input]
    other.write_bytes(renamed.SerializeToString())
    with pytest.raises(Prune2OnnxError, match="its inputs are"):
        validate(path, other)


def test_data_that_does_not_fit_the_model_is_named(packed, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(packed.SerializeToString())
    with pytest.raises(Prune2OnnxError, match=r"does not take the data.*\[1, 7, 7\]"):
        validate(path, batches=batches(blobs(6, 1, (1, 7, 7))))


def test_a_model_onnxruntime_refuses_is_an_error_with_its_reason():
    graph = helper.make_graph(
        [helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("nowhere", 1)])
    model.ir_version = 8
    with pytest.raises(Prune2OnnxError, match="cannot open it"):
        session(model)


def test_random_inputs_fit_types_and_dynamic_shapes():
    inputs = [
        helper.make_tensor_value_info("f", TensorProto.FLOAT16, ["n", 3]),
        helper.make_tensor_value_info("i", TensorProto.INT64, [2]),
    ]
    nodes = [helper.make_node("Identity", [n], [n + "o"]) for n in "fi"]
    outputs = [
        helper.make_tensor_value_info("fo", TensorProto.FLOAT16, None),
        helper.make_tensor_value_info("io", TensorProto.INT64, None),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    (made,) = random_inputs(model)
    assert made["f"].shape == (1, 3) and made["f"].dtype == np.float16
    assert made["i"].tolist() == [0, 0] and made["i"].dtype == np.int64
