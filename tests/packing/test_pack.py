"""Packing changes bytes and nothing else: weights, nodes, results and optimised graphs stay."""

import freeze
import ml_dtypes
import numpy as np
import onnx
import pytest
from networks import (
    MODELS,
    branches,
    convnet,
    halves,
    int8,
    mlp,
    model,
    operators,
    optimised,
    pruned,
    run,
    session,
    value,
    weights,
)
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN, MARK
from prune2onnx.graph.file import load, save
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.protobuf import framed
from prune2onnx.packing.codecs import METHODS, entropy_nbytes
from prune2onnx.packing.codecs.staged import GATED
from prune2onnx.packing.decoding import coded, decode_graph
from prune2onnx.packing.inline import is_packed, outlined
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.large import are_many
from prune2onnx.packing.pack import pack, pack_normalized
from prune2onnx.packing.quantized import Quantized
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.folding import folds
from prune2onnx.runtime.validate import check_weights

LEVELS = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")

each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
either_load = pytest.mark.parametrize("load", ["small", "fast"])


def assert_equal(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


# --- in onnxruntime --------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("level", LEVELS)
def test_the_optimised_graph_is_that_of_the_dense_file(build, level):
    dense = build()
    packed = pack(dense).model
    assert packed.ByteSize() < dense.ByteSize() and is_packed(packed)
    # Packed weights of bodies stand in the main graph, as they do in the normalized model.
    assert operators(optimised(packed, level)) == operators(
        optimised(normalize(dense).model, level)
    )
    assert_equal(run(packed, level), run(dense, level))


@each_model
@either_load
def test_results_are_equal_without_any_optimisation(build, load):
    dense = build()
    packed = pack(dense, load=load).model
    pairs = zip(run(packed, "ORT_DISABLE_ALL"), run(dense, "ORT_DISABLE_ALL"), strict=True)
    for one, other in pairs:  # onnxruntime lays out constant weights alone for its fastest kernels
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@each_model
@either_load
def test_decode_graph_gives_the_weights_and_folds(build, load):
    packed = pack(build(), load=load).model
    want = weights(normalize(build()).model)
    if not is_packed(packed):
        assert load == "fast"  # full precision gets smaller only with an entropy code
        return
    oracle = coded(packed)
    assert oracle.arrays and oracle.work.nodes and oracle.work.made
    decoding = decode_graph(packed)
    onnx.checker.check_model(decoding, full_check=True)
    graph = optimised(decoding)
    assert not graph.node
    constants = {t.name: t for t in graph.initializer}
    for name, array in oracle.arrays.items():
        assert array.tobytes() == want[name][2] and array.shape == want[name][1]
        assert constants[name].data_type == want[name][0]
        assert numpy_helper.to_array(constants[name]).tobytes() == want[name][2]


@pytest.mark.parametrize("opset", [13, 15, 17, 21, 23])
def test_files_of_old_and_new_opsets(opset):
    dense = mlp(opset, ir_version=10)
    packed = pack(dense).model
    assert operators(optimised(packed)) == operators(optimised(dense))
    assert_equal(run(packed), run(dense))


def test_weights_of_bodies_are_packed_too():
    packed = pack(branches())
    codecs = {row.name: row.codec for row in packed.rows}
    for name in ("then.weight", "else.weight", "loop.weight", "last"):
        assert codecs[name] != "dense"
    assert packed.notes == ("moved 3 weights out of subgraphs",)
    assert_equal(run(packed.model), run(branches()))


# --- unpacking -------------------------------------------------------------------------------


@each_model
@either_load
def test_unpack_gives_the_same_file(build, load):
    dense = build()
    before = dense.SerializeToString()
    packed = pack(dense, load=load).model
    onnx.checker.check_model(packed, full_check=True)
    assert unpack(packed).SerializeToString() == normalize(dense).model.SerializeToString()
    assert dense.SerializeToString() == before
    assert unpack(dense).SerializeToString() == before


@each_model
def test_packing_twice_is_packing_once(build):
    once = pack(build())
    twice = pack(once.model)
    assert twice.model.SerializeToString() == once.model.SerializeToString()
    assert twice.rows == once.rows and twice.notes == ()
    assert unpack(unpack(once.model)) == normalize(build()).model


def wide() -> ModelProto:
    """Large enough for a Huffman code, and not for stages."""
    return product(pruned((160, 3200), 0.2, 31))


def test_packing_again_changes_the_load():
    small, fast = pack(wide()).model, pack(wide(), load="fast").model
    assert pack(small, load="fast").model == fast and pack(fast).model == small


def test_a_file_that_loads_fast_has_no_entropy_code():
    small, fast = pack(wide()), pack(wide(), load="fast")
    assert {f.name for f in small.model.functions} & {"m", "l"}
    assert [f.name for f in fast.model.functions] == ["w"]
    assert small.model.ByteSize() < fast.model.ByteSize() < wide().ByteSize()
    assert coded(fast.model).work.nodes < coded(small.model).work.nodes


def test_notes_order_and_metadata_survive():
    dense = mlp(ir_version=7)
    dense.producer_name, dense.doc_string = "somebody", "kept"
    dense.metadata_props.add(key="author", value="me")
    first, second, third, *_ = dense.graph.initializer
    first.doc_string = 'a note, "quoted": ä'
    second.metadata_props.add(key="doc_string", value="not the doc string")
    second.metadata_props.add(key=".dot", value="")
    second.metadata_props.add(key="twice", value="b")
    third.doc_string = " "
    for name in ("between", "after"):
        extra = numpy_helper.from_array(np.arange(9, dtype=np.int64), name)
        dense.graph.initializer.insert(3 if name == "between" else 9, extra)
    packed = pack(dense)
    assert packed.model.ir_version == 8
    assert "dense" not in (packed.rows[0].codec, packed.rows[2].codec)
    assert packed.model.metadata_props[0].key == "author"
    assert any(entry.key == MARK for entry in packed.model.metadata_props)
    assert unpack(packed.model).SerializeToString() == dense.SerializeToString()
    assert pack(mlp(ir_version=9)).model.ir_version == 9


def test_typed_weights_come_back_as_raw_ones():
    """The values are the same, bit for bit, but stored in another field."""
    dense = mlp()
    raw = dense.graph.initializer[0]
    array = numpy_helper.to_array(raw)
    typed = helper.make_tensor(raw.name, TensorProto.FLOAT, raw.dims, array)
    assert not typed.HasField("raw_data")
    raw.CopyFrom(typed)
    half = helper.make_tensor(
        "half", TensorProto.FLOAT16, (60, 60), pruned((60, 60), 0.1, 9).ravel()
    )
    brain = helper.make_tensor(
        "brain", TensorProto.BFLOAT16, (60, 60), pruned((60, 60), 0.1, 9).ravel()
    )
    dense.graph.initializer.extend([half, brain])
    for name in ("half", "brain"):
        dense.graph.node.append(
            helper.make_node("Cast", [name], [f"{name}.f"], to=TensorProto.FLOAT)
        )
    packed = pack(dense)
    assert "dense" not in {
        row.codec for row in packed.rows if row.name in ("fc1.weight", "half", "brain")
    }
    back = unpack(packed.model)
    assert weights(back) == weights(dense)
    assert list(weights(back)) == list(weights(dense))
    assert back.graph.initializer[0].HasField("raw_data")


# --- small files --------------------------------------------------------------------------------


def small_network(steps: dict[str, float]) -> ModelProto:
    """Two layers with biases, multiples of these steps; 10 % of the matrices are not zero."""
    rng = np.random.default_rng(5)

    def levels(*shape: int, density: float) -> np.ndarray:
        return (rng.integers(-7, 8, shape) * (rng.random(shape) < density)).astype(np.float32)

    arrays = {
        "layers.0.weight": levels(40, 100, density=0.1),
        "layers.0.bias": levels(40, density=1),
        "layers.1.weight": levels(10, 40, density=0.3),
        "layers.1.bias": levels(10, density=1),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "layers.0.weight", "layers.0.bias"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "layers.1.weight", "layers.1.bias"], ["y"], transB=1),
    ]
    tensors = {name: array * np.float32(steps[name]) for name, array in arrays.items()}
    return model(nodes, tensors, {"x": ["N", 100]}, {"y": ["N", 10]})


OWN_STEPS = {
    "layers.0.weight": 0.013,
    "layers.0.bias": 0.3,
    "layers.1.weight": 0.07,
    "layers.1.bias": 0.011,
}


@pytest.mark.parametrize("steps", [OWN_STEPS, dict.fromkeys(OWN_STEPS, 0.013)], ids=["own", "one"])
def test_multiples_of_a_step_are_found_and_written_together(steps):
    dense = small_network(steps)
    packed = pack(dense, short_names=True)
    assert {row.codec for row in packed.rows} == {"gap-levels"}
    assert packed.model.ByteSize() < 1800
    assert unpack(packed.model) == dense
    assert not optimised(decode_graph(packed.model)).node
    assert_equal(run(packed.model), run(dense))


def test_one_step_for_all_takes_fewer_bytes():
    one = pack(small_network(dict.fromkeys(OWN_STEPS, 0.013))).model
    assert one.ByteSize() < pack(small_network(OWN_STEPS)).model.ByteSize() - 100


def test_one_code_follows_weights_of_different_densities():
    rng = np.random.default_rng(6)
    thin = rng.integers(-2, 3, (100, 400)) * (rng.random((100, 400)) < 0.02)
    thick = rng.integers(-2, 3, (100, 16)) * (rng.random((100, 16)) < 0.7)
    nodes = [
        helper.make_node("MatMul", ["x", "thick"], ["a"]),
        helper.make_node("MatMul", ["x", "thin"], ["b"]),
    ]
    tensors = {"thick": thick.astype(np.float32), "thin": thin.astype(np.float32)}
    dense = model(nodes, tensors, {"x": ["N", 100]}, {"a": ["N", 16], "b": ["N", 400]})
    packed = pack(dense, short_names=True)
    assert {row.codec for row in packed.rows} == {"gap-levels"}
    assert unpack(packed.model) == dense
    assert_equal(run(packed.model), run(dense))
    entropy = sum(entropy_nbytes(array) for array in tensors.values())
    assert packed.model.ByteSize() < 1.1 * entropy + 1300


# --- rows ------------------------------------------------------------------------------------


@each_model
@either_load
def test_rows_name_every_initializer_and_account_for_their_bytes(build, load):
    dense = normalize(build()).model
    packed = pack(build(), load=load)
    assert [row.name for row in packed.rows] == [t.name for t in dense.graph.initializer]
    for row, tensor in zip(packed.rows, dense.graph.initializer, strict=True):
        array = numpy_helper.to_array(tensor)
        assert (row.shape, row.dtype) == (tuple(tensor.dims), str(array.dtype))
        assert row.nnz == np.count_nonzero(array)
        assert bool(row.reason) == (row.codec == "dense")
        if row.codec == "dense":
            assert row.nbytes == framed(tensor.ByteSize())
    streams = {name for node in outlined(packed.model).graph.node if node.domain == DOMAIN
               for name in node.input}  # fmt: skip
    held = sum(len(t.raw_data) for t in packed.model.graph.initializer if t.name in streams)
    own = sum(row.nbytes for row in packed.rows if row.codec != "dense")
    # The rest: lane starts, padded words, and tables for all weights.
    assert 0.85 * held - 100 < own <= held + len(packed.rows)
    seen = {row.name: row for row in inspect(packed.model).rows}
    exact = not any(entry.key == MARK and entry.value for entry in packed.model.metadata_props)
    for row in packed.rows:
        assert seen[row.name].codec == row.codec
        # With short names the file does not keep the bytes of each weight: they are estimated.
        assert seen[row.name].nbytes == row.nbytes or not exact


def test_names_of_streams_are_free_ones():
    dense = mlp()
    for node in dense.graph.node:  # a to e are taken
        node.output[0] = {"h": "a", "r": "b", "l": "c", "q": "d"}.get(node.output[0], "y")
        node.input[0] = {"h": "a", "r": "b", "l": "c", "q": "d"}.get(node.input[0], node.input[0])
    packed = pack(dense).model
    onnx.checker.check_model(packed, full_check=True)
    (call,) = (node for node in outlined(packed).graph.node if node.domain == DOMAIN)
    assert not set("abcdxy") & set(call.input)
    assert all(len(name) <= 2 for name in call.input)
    assert_equal(run(packed), run(dense))


def test_the_call_keeps_the_weights_names_and_comes_first():
    dense, packed = convnet(), outlined(pack(convnet()).model)
    call, *rest = packed.graph.node
    assert call.domain == DOMAIN and rest == list(dense.graph.node)
    order = [t.name for t in dense.graph.initializer]
    assert list(call.output) == [name for name in order if name in call.output]
    kept = [t.name for t in packed.graph.initializer if t.name not in call.input]
    assert sorted(kept + list(call.output)) == sorted(order)


def product(weight: np.ndarray | TensorProto, **more) -> ModelProto:
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": weight, **more},
        {"x": ["N", 40]},
        {"y": ["N", None]},
    )


def test_a_file_is_never_made_larger():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**16, (40, 40)).astype(np.uint16).view(np.float16)
    noise[~np.isfinite(noise)] = 1
    for weight in (rng.normal(size=(20, 20)).astype(np.float32), noise):
        packed = pack(product(weight))
        assert packed.model == product(weight) and not is_packed(packed.model)
        (row,) = packed.rows
        assert row.codec == "dense" and row.reason


def test_a_model_stays_dense_where_the_functions_take_more_than_coding_saves():
    dense = model(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        {"w": np.arange(32, dtype=np.float32) % 2},
        {"x": ["N", 32]},
        {"y": ["N", 32]},
    )
    packed = pack(dense)
    assert packed.model == dense and "take more bytes than they save" in packed.rows[0].reason


def test_long_doc_strings_do_not_change_what_is_packed():
    """They are kept either way."""
    noise = np.random.default_rng(0).integers(0, 2**32, (40, 40)).astype(np.uint32)
    noise = noise.view(np.float32)
    noise[~np.isfinite(noise)] = 1
    small = product(noise)
    small.graph.initializer[0].doc_string = "ä" * 20_000
    assert pack(small).model == small
    large = product(pruned((40, 40), 0.1, 15), noise=noise)
    large.graph.node.append(helper.make_node("Identity", ["noise"], ["z"]))
    large.graph.initializer[1].doc_string = "ä" * 20_000
    packed = pack(large)
    assert [row.codec == "dense" for row in packed.rows] == [False, True]
    assert unpack(packed.model).SerializeToString() == large.SerializeToString()


def test_where_packing_hardly_saves_bytes_every_row_has_a_reason_or_a_codec():
    outcomes = set()
    for size in range(100, 400, 12):
        dense = model(
            [
                helper.make_node("Add", ["x", "w"], ["h"]),
                helper.make_node("Add", ["h", "n"], ["y"]),
            ],
            {
                "w": np.arange(size, dtype=np.float32) % 3,
                "n": np.random.default_rng(1).normal(size=size).astype(np.float32),
            },
            {"x": [size]},
            {"y": [size]},
            ir_version=7,
        )
        packed = pack(dense)
        assert packed.model.ByteSize() < dense.ByteSize() or packed.model == dense
        assert all(row.reason for row in packed.rows if row.codec == "dense")
        outcomes.add(packed.rows[0].reason)
    assert "" in outcomes and len(outcomes) > 1


def test_what_stays_dense_says_why():
    dense = model(
        [
            helper.make_node("Sum", ["x", "in", "out", "a", "small", "none"], ["s"]),
            helper.make_node("Reshape", ["s", "shape"], ["t"]),
            helper.make_node("Cast", ["text"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["t", "f"], ["y"]),
        ],
        {
            **{name: pruned((40, 40), 0.1, 15) for name in ("out", "unused", "a")},
            "small": np.array([1], np.float32),
            "none": np.zeros((0, 40), np.float32),
            "shape": np.full(30, 40, np.int64),
            "text": helper.make_tensor("text", TensorProto.STRING, [20], [b"1"] * 20),
        },
        {"x": [40, 40], "in": [40, 40]},
        {"out": [40, 40], "y": [40, 40]},
    )
    packed = pack(dense)
    rows = {row.name: row for row in packed.rows}
    assert "output of the graph" in rows["out"].reason
    assert "by no node" in rows["unused"].reason
    assert "int64" in rows["shape"].reason and "string" in rows["text"].reason
    assert "4 bytes are too few" in rows["small"].reason and "0 bytes" in rows["none"].reason
    assert rows["a"].codec != "dense"
    assert unpack(packed.model) == dense


def test_an_input_with_a_default_becomes_constant_and_says_so():
    dense = product(pruned((40, 40), 0.1, 15))
    dense.graph.input.append(value("w", [40, 40]))
    packed = pack(dense)
    assert packed.rows[0].codec != "dense" and "now constant: w" in packed.notes[0]
    assert [i.name for i in packed.model.graph.input] == ["x"]


# --- older and other forms -------------------------------------------------------------------


def test_an_old_operator_set_is_upgraded():
    dense = model(
        [
            helper.make_node("Unsqueeze", ["x"], ["u"], axes=[1]),
            helper.make_node("Squeeze", ["u"], ["s"], axes=[1]),
            helper.make_node("MatMul", ["s", "w"], ["y"]),
        ],
        {"w": pruned((40, 40), 0.3, 15)},
        {"x": ["N", 40]},
        {"y": ["N", 40]},
        opset=9,
        ir_version=3,
    )
    dense.graph.input.append(value("w", [40, 40]))
    packed = pack(dense)
    assert packed.rows[0].codec != "dense" and any("13" in note for note in packed.notes)
    assert unpack(packed.model) == normalize(dense).model
    assert_equal(run(packed.model), run(dense))


def test_quantized_weights_keep_their_levels_and_scale():
    rng = np.random.default_rng(3)
    codes = np.abs(rng.normal(0, 30, (40, 40))).astype(np.int64) % 100
    book = np.arange(-50, 50).astype(np.float32)
    book = book[book != 0]
    scale = (rng.random((40, 1)) / 100 + 0.001).astype(np.float32)
    known = Quantized(codes, book, scale)
    dense = product(known.dense())
    without, with_scale = pack(dense), pack(dense, quantized={"w": known})
    assert with_scale.model.ByteSize() < 0.7 * without.model.ByteSize()
    assert "levels" in with_scale.rows[0].codec
    assert unpack(with_scale.model).SerializeToString() == dense.SerializeToString()
    assert_equal(run(with_scale.model), run(dense))
    # Without a scale, codes and codebook are not used: the weight itself is enough.
    whole = Quantized(codes, book)
    assert unpack(pack(product(whole.dense()), quantized={"w": whole}).model) == product(
        whole.dense()
    )
    other = Quantized(codes, book, scale * 2)
    with pytest.raises(Prune2OnnxError, match=r"w: codes, codebook and scale do not give"):
        pack(dense, quantized={"w": other})


def test_quantized_large_weights_keep_their_levels_and_scale():
    rng = np.random.default_rng(3)
    codes = np.abs(rng.normal(0, 30, (40, 1 << 14))).astype(np.int64) % 100
    book = np.arange(-49, 51).astype(np.float32)
    book = book[book != 0]
    scale = (rng.random((40, 1)) / 100 + 0.001).astype(np.float32)
    known = Quantized(codes, book, scale)
    dense = product(known.dense())
    assert are_many(dense.graph.initializer, GATED)
    without, with_scale = pack(dense), pack(dense, quantized={"w": known})
    assert with_scale.model.ByteSize() < 0.5 * without.model.ByteSize()
    assert with_scale.rows[0].codec == "levels"
    assert unpack(with_scale.model).SerializeToString() == dense.SerializeToString()
    other = {"w": Quantized(codes, book, scale * 2)}
    with pytest.raises(Prune2OnnxError, match=r"w: codes, codebook and scale do not give"):
        pack(dense, quantized=other)
    with pytest.raises(Prune2OnnxError, match=r"w: codes, codebook and scale do not give"):
        pack_normalized(normalize(dense), quantized=other, check=False)


def test_weights_in_a_data_file(tmp_path):
    dense = mlp()
    path = tmp_path / "model.onnx"
    onnx.save(dense, path, save_as_external_data=True, size_threshold=100, location="model.data")
    with pytest.raises(Prune2OnnxError, match=r"fc1\.weight: its external data is not loaded"):
        pack(onnx.load(path, load_external_data=False))
    packed = pack(load(path)).model
    assert packed.graph.node == pack(mlp()).model.graph.node
    assert weights(unpack(packed)) == weights(mlp())


def test_large_weights_beside_the_packed_ones_may_go_to_a_data_file(tmp_path):
    dense = mlp()
    noise = np.random.default_rng(0).integers(0, 256, 30_000).astype(np.uint8).view(np.float32)
    noise[~np.isfinite(noise)] = 1
    dense.graph.initializer.append(numpy_helper.from_array(noise, "noise"))
    dense.graph.node.append(helper.make_node("Identity", ["noise"], ["z"]))
    packed = pack(dense).model
    files = save(packed, tmp_path / "m.onnx", "m.data")
    assert len(files) == 2 and files[1].stat().st_size >= 30_000
    assert load(files[0]) == packed
    assert unpack(load(files[0])).SerializeToString() == dense.SerializeToString()
    assert_equal(session_run(files[0]), run(dense))


def session_run(path) -> list[np.ndarray]:
    import onnxruntime

    running = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(8).normal(size=(3, 300)).astype(np.float32)
    return running.run(None, {"x": x})


def test_slim320_packs_and_comes_back(real_data):
    """A face detector of opset 9 with initializers among its inputs."""
    found = sorted(real_data.rglob("*slim*320*.onnx"))
    if not found:
        pytest.skip("no slim-320 model among the real data")
    dense = load(found[0])
    packed = pack(dense)
    assert unpack(packed.model) == normalize(dense).model
    assert packed.model.ByteSize() < dense.ByteSize()
    for one, other in zip(run(packed.model), run(dense), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


# --- frozen files ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", freeze.VERSION_1)
def test_files_of_version_1_keep_opening(name):
    frozen = load(freeze.FOLDER / f"{name}.onnx")
    ((row,), oracle) = inspect(frozen).rows, coded(frozen)
    assert row.codec == f"version 1: {freeze.VERSION_1[name]}"
    want = freeze.weight(name)
    assert oracle.arrays["fc.weight"].tobytes() == want.tobytes()
    back = unpack(frozen)
    assert weights(back) == weights(freeze.dense(name))
    assert back.graph.node == freeze.dense(name).graph.node and not back.functions
    assert_equal(run(frozen), run(freeze.dense(name)))
    assert not optimised(decode_graph(frozen)).node
    assert_frozen_decodes(frozen, {"fc.weight": want})


@pytest.mark.parametrize("method", METHODS[:12], ids=lambda method: method.name)
def test_files_of_version_2_keep_opening(method):
    frozen = load(freeze.FOLDER / f"v2-{method.name}.onnx")
    want = freeze.weights_of(method.name)
    assert [row.codec for row in inspect(frozen).rows] == [method.name] * len(want)
    assert unpack(frozen).SerializeToString() == freeze.model_of(want).SerializeToString()
    assert_frozen_decodes(frozen, {name: weight.array for name, weight in want.items()})


def test_a_frozen_file_of_many_weights_keeps_opening():
    frozen = load(freeze.FOLDER / "v2-mixed.onnx")
    want = freeze.mixed_weights()
    assert {row.codec for row in inspect(frozen).rows} >= {m.name for m in freeze.MIXED.values()}
    assert unpack(frozen).SerializeToString() == freeze.model_of(want).SerializeToString()
    assert_frozen_decodes(frozen, {name: weight.array for name, weight in want.items()})


@pytest.mark.parametrize(
    ("name", "want"), [("mixed", freeze.mixed_weights), ("few", freeze.few)], ids=["mixed", "few"]
)
def test_frozen_files_with_rice_codes_keep_opening(name, want):
    frozen = load(freeze.FOLDER / f"v2-rice-{name}.onnx")
    assert "TopK" in {node.op_type for node in frozen.functions[-1].node}
    assert unpack(frozen).SerializeToString() == freeze.model_of(want()).SerializeToString()
    assert_frozen_decodes(frozen, {name: weight.array for name, weight in want().items()})


def test_a_frozen_file_that_is_decoded_like_a_large_one_keeps_opening():
    frozen = load(freeze.FOLDER / "v2-long.onnx")
    assert "l" in {function.name for function in frozen.functions}
    want = freeze.weights_of("gap-codebook")
    assert unpack(frozen).SerializeToString() == freeze.model_of(want).SerializeToString()
    assert_frozen_decodes(frozen, {name: want[name].array for name in freeze.LONG})


@pytest.mark.parametrize("name", freeze.VERSION_3)
def test_files_of_version_3_keep_opening(name):
    frozen = load(freeze.FOLDER / f"v3-{name}.onnx")
    make, opset, _ = freeze.VERSION_3[name]
    want = freeze.dense_of(make(), opset)
    back = unpack(frozen)
    assert weights(back) == weights(want) and back.graph.node == want.graph.node
    assert check_weights(frozen) > 2 and folds(frozen)
    assert_equal(run(frozen), run(want))


def test_frozen_files_of_version_3_hold_each_way_to_store_large_weights():
    names = {f.name for f in load(freeze.FOLDER / "v3-staged.onnx").functions}
    assert {"d2", "e0", "p", "v", "v16", "t", "k0", "g2", "s", "j1", "c"} <= names


def assert_frozen_decodes(frozen: ModelProto, want: dict[str, np.ndarray]) -> None:
    graph = optimised(decode_graph(frozen))
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for name, array in want.items():
        assert constants[name].tobytes() == array.tobytes(), name


def test_int4_and_bfloat16_weights_need_no_special_numpy():
    for build, dtype in (
        (MODELS["int4"], ml_dtypes.int4),
        (MODELS["bfloat16"], ml_dtypes.bfloat16),
    ):
        packed = pack(build()).model
        assert next(iter(coded(packed).arrays.values())).dtype == dtype
    assert {row.dtype for row in pack(int8()).rows} == {"float32", "int8"}
    assert pack(halves()).rows[0].dtype == "float16"


def test_sessions_open_from_memory():
    assert session(pack(mlp()).model).get_inputs()[0].name == "x"
