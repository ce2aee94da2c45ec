"""A decoder that is written out into the graph: fewer bytes, the same weights, the same answers."""

import freeze
import numpy as np
import pytest
from networks import model, optimised, run, weights
from onnx import ModelProto, helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.file import load, save
from prune2onnx.packing.approximation.approximate import approximate
from prune2onnx.packing.decoding import coded, decode_graph
from prune2onnx.packing.inline import inlined, is_packed, outlined
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack


def few() -> ModelProto:
    """The packed file of a small network."""
    return load(freeze.FOLDER / "v2-rice-few.onnx")


def test_the_frozen_file_keeps_opening():
    frozen = load(freeze.FOLDER / "v2-written-out.onnx")
    assert not frozen.functions and [e.domain for e in frozen.opset_import] == [""]
    want = {name: weight.array for name, weight in freeze.few().items()}
    got = coded(frozen).arrays
    assert {name: array.tobytes() for name, array in got.items()} == {
        name: array.tobytes() for name, array in want.items()
    }
    assert weights(unpack(frozen)) == weights(freeze.model_of(freeze.few()))
    assert unpack(frozen).graph.node == freeze.model_of(freeze.few()).graph.node
    assert not optimised(decode_graph(frozen)).node
    for name, array in zip(want, run(frozen), strict=True):
        assert array.tobytes() == want[name].tobytes()


def test_a_call_is_written_out_and_made_again():
    packed = few()
    out = inlined(packed)
    assert out.ByteSize() < packed.ByteSize() - 180
    assert is_packed(packed) and is_packed(out) and not is_packed(unpack(out))
    again = outlined(out)
    assert len(again.functions) == 1 and outlined(again) is again
    for one, other in zip(run(again), run(packed), strict=True):
        assert one.tobytes() == other.tobytes()
    assert unpack(unpack(out)) == unpack(out)


def test_functions_that_call_each_other_stay():
    packed = load(freeze.FOLDER / "v2-long.onnx")
    assert len(packed.functions) > 1
    assert inlined(packed) is packed
    dense = unpack(packed)
    assert inlined(dense) is dense and outlined(dense) is dense


def test_readers_do_not_see_the_difference(tmp_path):
    path = tmp_path / "out.onnx"
    save(inlined(few()), path)
    found = inspect(load(path))
    assert {row.name: row.codec for row in found.rows} == dict.fromkeys(freeze.few(), "written out")
    assert not found.warning and found.load.cpu_ratio > 1
    streams = sum(tensor.ByteSize() for tensor in load(path).graph.initializer)
    assert sum(row.nbytes for row in found.rows) >= streams
    with pytest.raises(Prune2OnnxError, match="the model is packed"):
        approximate(load(path), bits=4)
    again = pack(load(path), anonymize=True).model
    assert not again.functions and again.ByteSize() < few().ByteSize() - 180


def test_a_node_of_the_same_name_is_not_a_decoder():
    dense = model(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("MatMul", ["r", "m"], ["y"], name="w"),
        ],
        {"m": np.ones((4, 3), np.float32)},
        {"x": ["N", 4]},
        {"y": ["N", 3]},
    )
    dense.metadata_props.add(key="prune2onnx")
    assert outlined(dense) is dense and not is_packed(dense)
    out = inlined(few())
    del out.graph.initializer[0]
    assert outlined(out) is out
    nameless = inlined(few())
    for node in nameless.graph.node:
        node.ClearField("name")
    assert not is_packed(nameless)
    assert "took its decoder apart" in inspect(nameless).warning
