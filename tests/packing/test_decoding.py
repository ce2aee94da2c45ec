"""Weights of a packed model, decoded one after the other and kept in a file."""

import importlib
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from networks import model
from onnx import ModelProto, helper, numpy_helper

from prune2onnx.commands import unpack as unpacking
from prune2onnx.commands.unpack import unpack_file
from prune2onnx.errors import MismatchError
from prune2onnx.graph.file import load, save
from prune2onnx.graph.outside import Spill, is_outside
from prune2onnx.packing.decoding import Extent, coded, decode_graph, weight_batches
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.session import session
from prune2onnx.runtime.validate import check_weights

LAYERS, WIDTH = 8, 600


@pytest.fixture(scope="module")
def dense() -> ModelProto:
    """Layers of 1.4 MB; every other one on levels; one in bfloat16 that is cast."""
    rng = np.random.default_rng(0)
    nodes, weights, at = [], {}, "x"
    for layer in range(LAYERS):
        weight = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        name = f"w{layer}"
        if layer % 2:
            weight = np.rint(4 * weight) * np.float32(0.01) + np.float32(0)
        weights[name] = weight
        if not layer:
            weights[name] = weight.astype(ml_dtypes.bfloat16)
            nodes.append(helper.make_node("Cast", [name], ["w"], to=1))
            name = "w"
        nodes.append(helper.make_node("MatMul", [at, name], [f"h{layer}"]))
        at = f"h{layer}"
    shapes = {"x": ["N", WIDTH]}, {at: ["N", WIDTH]}
    return model(nodes, weights, *shapes)


@pytest.fixture(scope="module")
def packed(dense: ModelProto) -> ModelProto:
    return pack(dense).model


@pytest.fixture
def spill(tmp_path: Path):
    with (tmp_path / "spill").open("wb") as stream:
        yield Spill(stream, tmp_path / "spill")


def test_weights_in_a_file_are_the_same(dense, packed, spill):
    inside, outside = coded(packed), coded(packed, spill=spill)
    assert list(outside.arrays) == list(inside.arrays) and len(outside.arrays) == LAYERS
    assert outside.how == inside.how and outside.extents == inside.extents
    for name, array in inside.arrays.items():
        assert is_outside(outside.stored[name])
        assert outside.arrays[name].dtype == array.dtype
        assert outside.arrays[name].tobytes() == array.tobytes()
    back = unpack(packed, known=outside)
    assert back.ByteSize() < 10_000  # nothing was read
    assert inspect(packed, known=outside) == inspect(packed)


def test_unpacking_by_way_of_a_file_gives_every_bit_back(dense, packed, tmp_path, monkeypatch):
    save(packed, tmp_path / "packed.onnx")
    for free in (0, 3_000_000, 1 << 30):
        monkeypatch.setattr(unpacking, "FREE_NBYTES", free)
        (path,) = unpack_file(tmp_path / "packed.onnx", tmp_path / "back.onnx")
        assert load(path).graph == dense.graph
    assert {path.name for path in tmp_path.iterdir()} == {"packed.onnx", "back.onnx"}
    unpack_file(tmp_path / "packed.onnx", tmp_path / "packed.onnx")  # in its own place
    assert load(tmp_path / "packed.onnx").graph == dense.graph


def test_one_weight_is_in_memory_at_a_time(packed, spill):
    largest = WIDTH * WIDTH * 4
    tracemalloc.start()
    try:
        coded(packed, spill=spill)
        _, one_by_one = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        coded(packed)
        _, together = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert together - one_by_one > 0.4 * LAYERS * largest


def test_batches_are_decoded_alone(packed):
    known = coded(packed)
    batches = list(weight_batches(packed, known.extents, WIDTH * WIDTH * 8))
    assert len(batches) > 2 and sum(map(len, batches)) == LAYERS
    assert {name for batch in batches for name in batch} == set(known.extents)
    whole = decode_graph(packed, known.extents)
    for batch in batches:
        graph = decode_graph(packed, batch)
        assert 0 < len(graph.graph.initializer) < len(whole.graph.initializer)
        assert [output.name for output in graph.graph.output] == list(batch)
        opened = session(graph)
        for name in batch:
            if known.arrays[name].dtype != ml_dtypes.bfloat16:
                (got,) = opened.run([name], {})
                assert got.tobytes() == known.arrays[name].tobytes()
    assert Extent((3, 4), np.dtype("f4")).nbytes == 48


def test_a_wrong_weight_in_any_batch_is_found(packed, monkeypatch):
    module = importlib.import_module("prune2onnx.runtime.validate")  # the name means the function
    monkeypatch.setattr(module, "_BATCH_NBYTES", 1 << 20)
    known = coded(packed)
    assert check_weights(packed, known) == LAYERS
    for name in ("w1", f"w{LAYERS - 1}"):
        wrong = dict(known.arrays) | {name: known.arrays[name] + np.float32(1e-6)}
        other = type(known)(wrong, known.how, known.work, known.extents, {})
        with pytest.raises(MismatchError, match=f"^{name}: onnxruntime"):
            check_weights(packed, other)


def test_a_model_that_is_not_packed_has_no_batches(dense):
    assert not list(weight_batches(dense, {}, 1)) and not coded(dense).arrays
    assert numpy_helper.to_array(unpack(dense).graph.initializer[1]).any()
