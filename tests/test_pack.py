"""Packing changes bytes and nothing else: weights, nodes, results and optimised graphs stay."""

import numpy as np
import onnx
import onnxruntime
import pytest
from fixtures import freeze
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.codecs import CODECS, DOMAIN
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pack import decode_graph, decoded_weights, inspect, load, pack, unpack

LEVELS = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def pruned(shape: tuple[int, ...], density: float, levels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = (np.clip(np.round(rng.normal(0, levels / 6, shape)), -levels // 2, levels // 2)).astype(
        np.float32
    ) / np.float32(37)
    array[rng.random(shape) >= density] = 0
    return array


def model(
    nodes, initializers, inputs, outputs, opset=18, ir_version=8, **graph_fields
) -> ModelProto:
    values = [
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in group.items()
        ]
        for group in (inputs, outputs)
    ]
    tensors = [
        array if isinstance(array, TensorProto) else numpy_helper.from_array(array, name)
        for name, array in initializers.items()
    ]
    graph = helper.make_graph(nodes, "net", *values, tensors, **graph_fields)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def mlp(opset: int = 18, ir_version: int = 8) -> ModelProto:
    rng = np.random.default_rng(5)
    return model(
        [
            helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "fc2.weight", "fc2.bias"], ["l"], transB=1),
            helper.make_node("Relu", ["l"], ["q"]),
            helper.make_node("MatMul", ["q", "fc3"], ["y"]),
        ],
        {
            "fc1.weight": pruned((100, 300), 0.05, 31),
            "fc1.bias": (rng.integers(-30, 30, 100) / 64).astype(np.float32),
            "fc2.weight": pruned((80, 100), 0.9, 15, seed=1),
            "fc2.bias": rng.normal(size=80).astype(np.float32),
            "fc3": rng.normal(size=(80, 10)).astype(np.float32),
        },
        {"x": ["N", 300]},
        {"y": ["N", 10]},
        opset,
        ir_version,
    )


def convnet() -> ModelProto:
    rng = np.random.default_rng(6)
    channels = {name: rng.random(64).astype(np.float32) + 0.5 for name in ("s", "b", "m", "v")}
    return model(
        [
            helper.make_node("Conv", ["x", "conv1.weight"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
            helper.make_node("Relu", ["n"], ["r"]),
            helper.make_node("Conv", ["r", "conv2.weight"], ["d"], group=64),
            helper.make_node("Conv", ["d", "conv3.weight"], ["e"], strides=[2, 2]),
            helper.make_node("Add", ["e", "shift"], ["y"]),
        ],
        {
            "conv1.weight": pruned((64, 3, 3, 3), 0.5, 15),
            **channels,
            "conv2.weight": pruned((64, 1, 3, 3), 0.5, 15, seed=1),
            "conv3.weight": pruned((32, 64, 3, 3), 0.1, 15, seed=2),
            "shift": pruned((1, 32, 1, 1), 1.0, 15, seed=3),
        },
        {"x": ["N", 3, 12, 12]},
        {"y": ["N", 32, 4, 4]},
    )


def quantized() -> ModelProto:
    rng = np.random.default_rng(7)
    weight = np.clip(np.round(rng.normal(0, 9, (64, 16, 3, 3))), -127, 127).astype(np.int8)
    weight[rng.random(weight.shape) < 0.8] = 0
    return model(
        [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["weight", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("Conv", ["xd", "wd"], ["c"]),
            helper.make_node("QuantizeLinear", ["c", "xs", "xz"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "xs", "xz"], ["y"]),
        ],
        {
            "xs": np.array(0.05, np.float32),
            "xz": np.array(3, np.int8),
            "weight": weight,
            "ws": (np.round(rng.random(64) * 16 + 1) / 512).astype(np.float32),
            "wz": np.zeros(64, np.int8),
        },
        {"x": ["N", 16, 9, 9]},
        {"y": ["N", 64, 7, 7]},
    )


MODELS = {"mlp": mlp, "convnet": convnet, "quantized": quantized}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def session(onnx_model: ModelProto, level: str, path=None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    return onnxruntime.InferenceSession(
        onnx_model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(running: onnxruntime.InferenceSession) -> np.ndarray:
    rng = np.random.default_rng(8)
    given = running.get_inputs()[0]
    shape = [3 if isinstance(extent, str) else extent for extent in given.shape]
    return running.run(None, {given.name: rng.normal(size=shape).astype(np.float32)})[0]


@each_model
@pytest.mark.parametrize("level", LEVELS)
def test_the_optimised_graph_is_that_of_the_dense_file(build, level, tmp_path):
    dense = build()
    packed = pack(dense).model
    assert packed.ByteSize() < dense.ByteSize()
    one, other = session(dense, level, tmp_path / "a"), session(packed, level, tmp_path / "b")
    graphs = [onnx.load(tmp_path / name).graph for name in "ab"]
    # Sorted: onnxruntime may write two nodes that do not depend on each other in another order.
    kinds = [sorted((node.domain, node.op_type) for node in graph.node) for graph in graphs]
    assert kinds[0] == kinds[1]
    np.testing.assert_array_equal(run(one), run(other))


@each_model
def test_results_are_equal_without_any_optimisation(build):
    dense = build()
    level = "ORT_DISABLE_ALL"
    np.testing.assert_array_equal(
        run(session(dense, level)), run(session(pack(dense).model, level))
    )


@each_model
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_unpack_gives_the_same_file_whatever_the_codec(build, codec):
    dense = build()
    before = dense.SerializeToString()
    packed = pack(dense, [codec]).model
    onnx.checker.check_model(packed, full_check=True)
    assert unpack(packed).SerializeToString() == before
    assert dense.SerializeToString() == before


@each_model
def test_packing_twice_is_packing_once(build):
    once = pack(build())
    twice = pack(once.model)
    assert twice.model.SerializeToString() == once.model.SerializeToString()
    assert twice.rows == once.rows
    assert unpack(unpack(once.model)) == build()


@each_model
def test_rows_name_every_initializer_and_their_bytes_add_up(build):
    dense = build()
    packed = pack(dense)
    assert [row.name for row in packed.rows] == [t.name for t in dense.graph.initializer]
    for row, tensor in zip(packed.rows, dense.graph.initializer, strict=True):
        assert row.shape == tuple(tensor.dims)
        assert row.nnz == np.count_nonzero(numpy_helper.to_array(tensor))
        assert bool(row.reason) == (row.codec == "dense")
    graph = packed.model.graph
    calls = [node for node in graph.node if node.domain == DOMAIN]
    part = onnx.GraphProto(node=calls, initializer=graph.initializer)
    assert sum(row.nbytes for row in packed.rows) == part.ByteSize()
    seen = inspect(packed.model)
    assert [(r.name, r.codec, r.nbytes, r.nnz) for r in seen] == [
        (r.name, r.codec, r.nbytes, r.nnz) for r in packed.rows
    ]


def test_the_planner_pays_functions_once_and_picks_by_bytes():
    packed = pack(mlp())
    codecs = {row.name: row.codec for row in packed.rows}
    assert codecs["fc1.weight"] == "gap-codebook-huffman"
    assert codecs["fc1.bias"] == "half"
    assert codecs["fc2.bias"] == codecs["fc3"] == "dense"
    for codec in CODECS:
        assert packed.model.ByteSize() <= pack(mlp(), [codec]).model.ByteSize()
    names = [function.name for function in packed.model.functions]
    assert len(names) == len(set(names))


def test_decode_calls_keep_the_weights_names_and_come_first():
    dense, packed = mlp(), pack(mlp()).model
    calls = [node for node in packed.graph.node if node.domain == DOMAIN]
    assert calls == list(packed.graph.node[: len(calls)])
    assert list(packed.graph.node[len(calls) :]) == list(dense.graph.node)
    assert {node.output[0] for node in calls} <= {t.name for t in dense.graph.initializer}


@each_model
def test_decode_graph_gives_the_weights_and_folds(build, tmp_path):
    dense = {t.name: numpy_helper.to_array(t) for t in build().graph.initializer}
    packed = pack(build()).model
    oracle = decoded_weights(packed)
    assert oracle
    decoding = decode_graph(packed)
    onnx.checker.check_model(decoding, full_check=True)
    running = session(decoding, "ORT_ENABLE_BASIC", tmp_path / "optimised")
    assert not onnx.load(tmp_path / "optimised").graph.node
    names = [value.name for value in running.get_outputs()]
    for name, array in zip(names, running.run(None, {}), strict=True):
        np.testing.assert_array_equal(array, oracle[name])
        assert oracle[name].tobytes() == dense[name].tobytes() == array.tobytes()
    assert set(names) == set(oracle)


def test_a_file_is_never_made_larger():
    dense = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)},
        {"x": ["N", 40]},
        {"y": ["N", 40]},
    )
    packed = pack(dense)
    assert packed.model == dense
    (row,) = packed.rows
    assert row.codec == "dense" and "256 distinct values" in row.reason


def test_a_gain_smaller_than_the_functions_is_no_gain():
    dense = model(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        {"w": np.arange(32, dtype=np.float32) % 2},
        {"x": ["N", 32]},
        {"y": ["N", 32]},
    )
    packed = pack(dense)
    assert packed.model == dense
    assert "decode function" in packed.rows[0].reason


def test_what_stays_dense_says_why():
    weights = {name: pruned((40, 40), 0.1, 15) for name in ("in", "out", "sub", "both", "unused")}
    body = helper.make_graph(
        [helper.make_node("Add", ["sub", "both"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, [40, 40])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["both"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, [40, 40])],
    )
    dense = model(
        [
            helper.make_node("Cast", ["on"], ["flag"], to=TensorProto.BOOL),
            helper.make_node("If", ["flag"], ["i"], then_branch=body, else_branch=other),
            helper.make_node("Sum", ["i", "in", "out", "both", "a", "small"], ["s"]),
            helper.make_node("Reshape", ["s", "shape"], ["y"]),
        ],
        {
            **weights,
            "small": np.array([1], np.float32),
            "shape": np.full(2, 40, np.int64),
            "a": pruned((40, 40), 0.1, 15, seed=4),
        },
        {"in": [40, 40], "on": [1]},
        {"out": [40, 40], "y": [40, 40]},
    )
    packed = pack(dense)
    onnx.checker.check_model(packed.model)
    rows = {row.name: row for row in packed.rows}
    assert "input of the graph" in rows["in"].reason
    assert "output of the graph" in rows["out"].reason
    assert "inside a subgraph" in rows["sub"].reason
    assert "by no node" in rows["unused"].reason
    assert "int64" in rows["shape"].reason and "4 bytes" in rows["small"].reason
    assert rows["both"].codec == rows["a"].codec != "dense"
    assert unpack(packed.model) == dense
    on = {"on": np.ones(1, np.float32)}
    results = [session(m, "ORT_ENABLE_ALL").run(["y"], on)[0] for m in (dense, packed.model)]
    np.testing.assert_array_equal(*results)


def test_storage_notes_and_metadata_survive():
    dense = mlp(ir_version=7)
    dense.producer_name, dense.doc_string = "somebody", "kept"
    dense.metadata_props.add(key="author", value="me")
    first, second, *_ = dense.graph.initializer
    first.doc_string = "a note"
    typed = helper.make_tensor(
        second.name, TensorProto.FLOAT, second.dims, numpy_helper.to_array(second)
    )
    assert not typed.HasField("raw_data")
    second.CopyFrom(typed)
    half = helper.make_tensor("h", TensorProto.FLOAT16, (60, 60), pruned((60, 60), 0.1, 9).ravel())
    dense.graph.initializer.append(half)
    dense.graph.node.add(op_type="Cast", input=["h"], output=["unused"]).attribute.append(
        helper.make_attribute("to", TensorProto.FLOAT)
    )
    packed = pack(dense)
    assert packed.model.ir_version == 8
    assert "dense" not in {
        row.codec for row in packed.rows if row.name in (first.name, second.name, "h")
    }
    assert unpack(packed.model).SerializeToString() == dense.SerializeToString()


def test_equal_streams_are_stored_once():
    dense = model(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("MatMul", ["h", "b"], ["y"]),
        ],
        {"a": pruned((90, 90), 0.1, 15), "b": pruned((90, 90), 0.1, 15)},
        {"x": ["N", 90]},
        {"y": ["N", 90]},
    )
    packed = pack(dense)
    first, second = packed.rows
    assert second.nbytes < first.nbytes
    assert unpack(packed.model) == dense


def test_bfloat16_weights_are_restored_whatever_onnx_makes_of_them():
    patterns = (np.arange(6000) % 7 * 64 + 0x3F80).astype(np.uint16)
    tensor = TensorProto(
        name="w", dims=[60, 100], data_type=TensorProto.BFLOAT16, raw_data=patterns.tobytes()
    )
    dense = model(
        [
            helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "f"], ["y"]),
        ],
        {"w": tensor},
        {"x": ["N", 60]},
        {"y": ["N", 100]},
    )
    packed = pack(dense)
    assert (packed.rows[0].codec == "dense") == ("numpy type" in packed.rows[0].reason)
    assert unpack(packed.model).SerializeToString() == dense.SerializeToString()
    np.testing.assert_array_equal(*(run(session(m, LEVELS[0])) for m in (dense, packed.model)))


@pytest.mark.parametrize("opset", [13, 15, 17, 21])
def test_files_of_old_and_new_opsets(opset):
    dense = mlp(opset)
    packed = pack(dense).model
    np.testing.assert_array_equal(run(session(dense, LEVELS[-1])), run(session(packed, LEVELS[-1])))


def test_an_older_opset_is_refused_with_what_to_do():
    with pytest.raises(Prune2OnnxError, match=r"opset 12.*convert_version"):
        pack(mlp(opset=12))


# --- frozen files ----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_frozen_files_keep_opening(codec):
    frozen = load(freeze.FOLDER / f"{codec.name}.onnx")
    dense = freeze.dense(codec.name)
    assert [row.codec for row in inspect(frozen)] == [codec.name]
    assert unpack(frozen).SerializeToString() == dense.SerializeToString()
    want = freeze.weight(codec.name)
    (output,) = session(decode_graph(frozen), LEVELS[0]).run(None, {})
    np.testing.assert_array_equal(output.view(np.uint32), want.view(np.uint32))


# --- loading and damage ----------------------------------------------------------------------


def test_load_reads_external_data_beside_the_file(tmp_path):
    dense = mlp()
    path = tmp_path / "model.onnx"
    onnx.save(dense, path, save_as_external_data=True, size_threshold=100, location="model.data")
    loaded = load(path)
    packed = pack(loaded).model
    assert pack(mlp()).model.graph.node == packed.graph.node
    arrays = [
        {t.name: numpy_helper.to_array(t).tobytes() for t in m.graph.initializer}
        for m in (mlp(), unpack(packed))
    ]
    assert arrays[0] == arrays[1]
    assert unpack(packed).SerializeToString() == loaded.SerializeToString()
    (tmp_path / "model.data").unlink()
    with pytest.raises(Prune2OnnxError, match=r"model\.onnx: external data"):
        load(path)


def test_pack_wants_external_data_loaded(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, size_threshold=100, location="model.data")
    with pytest.raises(Prune2OnnxError, match=r"fc1\.weight: its external data is not loaded"):
        pack(onnx.load(path, load_external_data=False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"this is text, not a model", "not an ONNX model|no graph"),
        (b"\x08\x08", "no graph"),
        (b"\x08\x08\x3a\x03\x12\x01a", "no graph"),
    ],
)
def test_load_says_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Prune2OnnxError, match=rf"model\.onnx: .*({message})"):
        load(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_cut_short_is_refused_wherever_the_cut(packed, tmp_path):
    whole = (pack(mlp()).model if packed else mlp()).SerializeToString()
    path = tmp_path / "model.onnx"
    tail = range(max(len(whole) - 2600, 0), len(whole), 23)
    for end in [*range(1, len(whole), len(whole) // 40), *tail, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(Prune2OnnxError, match=r"model\.onnx: "):
            load(path)
    path.write_bytes(whole)
    assert load(path).SerializeToString() == whole


def broken(change) -> ModelProto:
    packed = pack(mlp()).model
    call = next(node for node in packed.graph.node if node.output[0] == "fc1.weight")
    streams = {t.name: t for t in packed.graph.initializer}
    change(packed, call, streams)
    return packed


@pytest.mark.parametrize("verb", [unpack, inspect, decoded_weights, pack])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, call, s: m.graph.initializer.remove(s[call.input[0]]), "gap_data .* missing"),
        (lambda m, call, s: call.input.pop(), "7 streams"),
        (lambda m, call, s: call.attribute.pop(), "attribute . of .* missing"),
        (lambda m, call, s: setattr(call, "op_type", "zz"), "unknown decode function"),
        (lambda m, call, s: setattr(s[call.input[1]], "raw_data", b"\xff" * 12), "impossible"),
        (lambda m, call, s: s[call.input[0]].dims.append(2**60), "damaged"),
        (lambda m, call, s: setattr(s[call.input[3]], "data_type", 3), "int8"),
        (lambda m, call, s: setattr(s[call.input[7]], "data_type", 6), "codebook of int32"),
        (lambda m, call, s: call.attribute[1].ints.append(2**60), "declared shape"),
    ],
)
def test_a_damaged_call_is_an_error_that_names_it(verb, change, message):
    with pytest.raises(Prune2OnnxError, match=rf"(fc1\.weight: |the stream ').*{message}"):
        verb(broken(change))
