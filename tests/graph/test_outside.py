"""Large tensors stay in their files until somebody reads them, and then are what they were."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph import outside
from prune2onnx.graph.file import load, save
from prune2onnx.graph.protobuf import nbytes, serialized
from prune2onnx.graph.tensors import array_of, fingerprint, rows_of
from prune2onnx.runtime.session import session


def model(**arrays: np.ndarray) -> ModelProto:
    """x times each of the arrays; biases and the like stand unused."""
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", arrays["w"].shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", arrays["w"].shape[1]])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


RNG = np.random.default_rng(0)
LARGE = RNG.normal(size=(300, 200)).astype(np.float32)
SMALL = RNG.normal(size=(10,)).astype(np.float32)


@pytest.mark.parametrize("external", [None, "m.data"])
def test_a_model_read_lazily_is_the_model(external, tmp_path):
    whole = model(w=LARGE, b=SMALL, i=np.arange(90_000, dtype=np.int64).reshape(300, 300))
    save(whole, tmp_path / "m.onnx", external)
    lazy = load(tmp_path / "m.onnx", lazily=True)
    assert lazy.ByteSize() < 2000 < nbytes(lazy) == whole.ByteSize()
    assert ModelProto.FromString(b"".join(serialized(lazy))) == whole
    for one, other in zip(lazy.graph.initializer, whole.graph.initializer, strict=True):
        assert outside.is_outside(one) == (one.name != "b")
        assert array_of(one).tobytes() == array_of(other).tobytes()
        assert fingerprint(one) == fingerprint(other)
    assert np.array_equal(rows_of(lazy.graph.initializer[0], 7, 9), LARGE[7:9])
    x = RNG.normal(size=(2, 300)).astype(np.float32)
    assert np.array_equal(
        session(lazy).run(None, {"x": x})[0], session(whole).run(None, {"x": x})[0]
    )


def test_rows_of_four_bits_may_share_a_byte(tmp_path):
    every = RNG.integers(-8, 8, (150_001, 3))
    onnx.save(model(w=LARGE, q=every.astype(ml_dtypes.int4)), tmp_path / "m.onnx")
    lazy = load(tmp_path / "m.onnx", lazily=True).graph.initializer[1]
    assert outside.is_outside(lazy)
    for span in ((0, 2), (1, 3), (150_000, 150_001)):
        assert np.array_equal(rows_of(lazy, *span).astype(int), every[slice(*span)])


def test_what_changes_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "m.onnx"
    save(model(w=LARGE), path)
    lazy = load(path, lazily=True)
    save(model(w=LARGE + 1), path)
    with pytest.raises(Prune2OnnxError, match="another process changed it"):
        array_of(lazy.graph.initializer[0])
    path.unlink()
    with pytest.raises(Prune2OnnxError, match="cannot be read"):
        array_of(lazy.graph.initializer[0])


def test_a_file_cannot_claim_that_its_tensors_are_elsewhere(tmp_path):
    """Else a model would read any file of the machine."""
    (tmp_path / "secret").write_bytes(LARGE.tobytes())
    made = model(w=LARGE)
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    outside.refer(tensor, tmp_path / "secret", 0, LARGE.nbytes)
    for entry in tensor.external_data:  # as another process would have written it
        entry.value = entry.value.replace(outside._OURS, "0" * 16)
    folder = tmp_path / "of_a_stranger"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    for lazily in (False, True):
        with pytest.raises(Prune2OnnxError, match="outside of the model's folder"):
            load(folder / "m.onnx", lazily=lazily)


@pytest.mark.parametrize("cut", [1, 100, 200_000])
def test_a_file_that_is_cut_short_is_no_model_lazily_either(cut, tmp_path):
    path = tmp_path / "m.onnx"
    save(model(w=LARGE), path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(Prune2OnnxError, match="cut short"):
        load(path, lazily=True)


def test_a_pair_may_be_written_over_the_files_it_is_read_from(tmp_path):
    path = tmp_path / "m.onnx"
    whole = model(w=LARGE, other=LARGE * 2)
    for _ in range(2):
        save(whole, path, "m.onnx.data")
        lazy = load(path, lazily=True)
        lazy.graph.initializer.reverse()  # the offsets change
        save(lazy, path, "m.onnx.data", source=path)
        found = {one.name: array_of(one) for one in load(path).graph.initializer}
        assert np.array_equal(found["w"], LARGE) and np.array_equal(found["other"], LARGE * 2)
        assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}


def test_what_is_spilled_is_read_again(tmp_path):
    with (tmp_path / "spill").open("wb") as stream:
        spill = outside.Spill(stream, tmp_path / "spill")
        tensor = spill.tensor("w", LARGE, TensorProto.FLOAT)
        small = spill.tensor("b", SMALL, TensorProto.FLOAT)
        spill.finish()
        assert not tensor.raw_data and small == numpy_helper.from_array(SMALL, "b")
        assert np.array_equal(array_of(tensor), LARGE)
