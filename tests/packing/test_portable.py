"""A packed file without functions: for engines that do not expand them."""

import itertools
import json
from functools import partial

import freeze
import numpy as np
import pytest
from engines import OPENVINO, in_openvino
from networks import convnet, mlp, model, pruned, run, scaled, weights
from onnx import ModelProto, helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.file import load, save
from prune2onnx.graph.walk import bodies
from prune2onnx.packing.decoding import coded
from prune2onnx.packing.inline import FACTS_KEY, is_packed, outlined
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.pack import pack
from prune2onnx.packing.portable import portable
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.folding import folds
from prune2onnx.runtime.validate import check_weights

FROZEN = sorted(
    path.name
    for path in freeze.FOLDER.glob("v[23]-*.onnx")
    if not path.name.startswith("v3-staged")  # with matrices in shape, which --portable never has
)

FOLDED = {
    *("Add", "Cast", "Clip", "Concat", "ConstantOfShape", "Div", "Expand", "Gather", "Identity"),
    *("Less", "MatMul", "Max", "Mod", "Mul", "Neg", "Not", "Pow", "Range", "ReduceSum", "Reshape"),
    *("ScatterElements", "ScatterND", "Slice", "Split", "Sub", "TopK", "Transpose"),
}
"""What OpenVINO 2026.4 computes while it compiles a model."""


def large(opset: int = 18) -> ModelProto:
    """Weights of every kind that is decoded in stages, in a network with one input."""
    rng = np.random.default_rng(4)
    short = rng.normal(size=(64, 128)).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    special = rng.normal(size=(128, 64)).astype(np.float32)
    special.view(np.uint32)[0, :2] = [0x80000000, 1]
    arrays = {
        "levels": pruned((64, 1024), 1.0, 40),
        "sparse": pruned((1024, 128), 0.05, 15, seed=1),
        "special": special,
        "short": short.view(np.float32),
        "book": rng.choice(rng.normal(size=90).astype(np.float32), (128, 64)),
    }
    nodes, at = [], "x"
    for number, name in enumerate(arrays):
        nodes.append(helper.make_node("MatMul", [at, name], [f"y{number}"]))
        at = f"y{number}"
    return model(nodes, arrays, {"x": ["N", 64]}, {at: ["N", 64]}, opset)


NETWORKS = [
    *itertools.product([mlp, convnet, scaled], ["small", "balanced", "fast"]),
    *[(large, "balanced"), (large, "fast"), (partial(large, 13), "balanced")],
]


def alone(packed: ModelProto) -> None:
    """Checks that no function, foreign operator or subgraph is left, and nothing that stays."""
    assert not packed.functions and [entry.domain for entry in packed.opset_import] == [""]
    decoder = outlined(packed).functions[0].node
    assert {node.op_type for node in decoder} <= FOLDED
    assert not any(list(bodies(node)) for node in decoder)


@pytest.mark.parametrize("name", FROZEN)
def test_every_method_is_written_out_and_comes_back(name):
    frozen = load(freeze.FOLDER / name)
    if not frozen.functions:
        pytest.skip("it has no functions")
    out = portable(frozen, coded(frozen).arrays)
    alone(out)
    assert unpack(out) == unpack(frozen) and unpack(unpack(out)) == unpack(out)
    assert not inspect(out).warning
    methods = {row.name: row.codec for row in inspect(frozen).rows}
    assert {row.name: row.codec for row in inspect(out).rows} == methods
    assert check_weights(out) == len(coded(frozen).arrays) and folds(out)


@pytest.mark.parametrize(("build", "load"), NETWORKS)
def test_a_network_gives_the_same_in_onnxruntime(build, load):
    dense = build()
    packed = pack(dense, portable=True, load=load).model
    if is_packed(packed):
        alone(packed)
    assert unpack(packed) == unpack(pack(dense, load=load).model)
    assert weights(unpack(packed)) == weights(unpack(pack(dense).model))
    assert folds(packed)
    for one, other in zip(run(packed), run(dense), strict=True):
        assert one.tobytes() == other.tobytes()
    assert unpack(pack(packed).model) == unpack(packed)


def test_weights_without_gates_take_hardly_more_bytes():
    assert pack(large(), portable=True).model.ByteSize() < 0.2 * large().ByteSize()


@pytest.mark.skipif(not OPENVINO, reason="openvino is not installed")
@pytest.mark.parametrize(("build", "load"), NETWORKS)
def test_openvino_is_left_with_the_plain_graph_and_gives_equal_outputs(build, load, tmp_path):
    packed = pack(build(), portable=True, load=load).model
    got, operators = in_openvino(packed, tmp_path)
    want, plain = in_openvino(unpack(packed), tmp_path)
    assert operators == plain
    assert [one.tobytes() for one in got] == [one.tobytes() for one in want]


@pytest.mark.skipif(not OPENVINO, reason="openvino is not installed")
@pytest.mark.parametrize("name", FROZEN)
def test_openvino_decodes_every_method(name, tmp_path):
    frozen = load(freeze.FOLDER / name)
    if not frozen.functions:
        pytest.skip("it has no functions")
    got, operators = in_openvino(portable(frozen, coded(frozen).arrays), tmp_path)
    want, plain = in_openvino(unpack(frozen), tmp_path)
    assert operators == plain
    assert [one.tobytes() for one in got] == [one.tobytes() for one in want]


def test_damage_is_found_by_the_checksum(tmp_path):
    packed = pack(mlp(), portable=True).model
    path = tmp_path / "portable.onnx"
    save(packed, path)
    assert is_packed(load(path))
    entry = next(one for one in packed.metadata_props if one.key == FACTS_KEY)
    facts = json.loads(entry.value)
    assert list(facts[1]) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc3"]
    entry.value = json.dumps([facts[0] ^ 1, facts[1]])
    with pytest.raises(Prune2OnnxError, match="do not have the checksum"):
        unpack(packed)
    entry.value = json.dumps([facts[0], {**facts[1], "other": [0, 0, 0]}])
    with pytest.raises(Prune2OnnxError, match=r"other: named in prune2onnx\.weights or decoded"):
        unpack(packed)


@pytest.mark.parametrize(
    "text", ["", "[1]", "[1, []]", "[1, {}, 2]", '[1, {"a": [1, 2]}]', "[" * 9999]
)
def test_a_damaged_entry_is_an_error(text):
    packed = pack(mlp(), portable=True).model
    entry = next(one for one in packed.metadata_props if one.key == FACTS_KEY)
    entry.value = text
    with pytest.raises(Prune2OnnxError, match=r"prune2onnx\.weights: not a checksum and three"):
        unpack(packed)


def test_anonymized_it_has_no_facts():
    packed = pack(mlp(), portable=True, anonymize=True).model
    assert FACTS_KEY not in {entry.key for entry in packed.metadata_props}
    alone(packed)
    assert folds(packed) and run(packed)[0].tobytes() == run(mlp())[0].tobytes()
