"""Inspecting: how weights are stored, what other forms would take, what a load costs."""

import zlib

import numpy as np
import pytest
from networks import MODELS, halves, mlp, model, pruned, weights
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN, MARK
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.protobuf import framed
from prune2onnx.packing.inline import outlined
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.pack import pack
from prune2onnx.packing.sparse import to_sparse


def of(**arrays: np.ndarray | TensorProto) -> ModelProto:
    """A model that holds these."""
    nodes = [helper.make_node("Identity", [name], [f"{name}.out"]) for name in arrays]
    made = model(nodes, arrays, {}, {})
    for name, held in arrays.items():
        element_type = held.data_type if isinstance(held, TensorProto) else None
        element_type = element_type or helper.np_dtype_to_tensor_dtype(held.dtype)
        made.graph.output.append(helper.make_tensor_value_info(f"{name}.out", element_type, None))
    return made


def test_entropy_sparse_and_zipped_bytes_by_hand():
    array = np.float32([[0, 1, 0, 1], [2, 3, 0, 0]])
    (row,) = inspect(of(w=array)).rows
    # Positions: half of 8 are zero, 8 bits. Values 1, 1, 2, 3: 1.5 bits each.
    assert row.entropy_nbytes == pytest.approx((8 + 6) / 8)
    sparse, _ = to_sparse(of(w=np.tile(array, (30, 1))))
    (row,) = inspect(of(w=np.tile(array, (30, 1)))).rows
    assert row.sparse_nbytes == framed(sparse.graph.sparse_initializer[0].ByteSize())
    assert row.zipped_nbytes == len(zlib.compress(np.tile(array, (30, 1)).tobytes()))
    assert (row.codec, row.nnz, row.dtype, row.shape) == ("dense", 120, "float32", (60, 4))


def test_a_dense_file_costs_nothing_to_decode():
    found = inspect(mlp())
    assert found.load.packed == found.load.dense and not found.warning + found.load_warning
    assert [row.codec for row in found.rows] == ["dense"] * 5
    for row, tensor in zip(found.rows, mlp().graph.initializer, strict=True):
        assert row.nbytes == framed(tensor.ByteSize()) and row.reason


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_packed_file_is_reported_like_its_dense_one(build):
    dense = normalize(build()).model
    found = inspect(pack(build()).model)
    load = found.load
    assert load.packed.cpu_ms > load.dense.cpu_ms and not found.warning
    alone = inspect(dense).load.packed
    assert load.dense.cpu_ms == pytest.approx(alone.cpu_ms, rel=0.02)
    assert load.dense.peak_nbytes == pytest.approx(alone.peak_nbytes, rel=0.02)
    assert {row.name for row in found.rows} == set(weights(dense))
    before = {row.name: row for row in inspect(dense).rows}
    for row in found.rows:
        other = before[row.name]
        assert (row.nnz, row.shape, row.dtype) == (other.nnz, other.shape, other.dtype)
        assert (row.entropy_nbytes, row.zipped_nbytes) == (
            other.entropy_nbytes,
            other.zipped_nbytes,
        )
    named = [row.codec == "dense" for row in found.rows]
    assert named == sorted(named)  # the coded ones first


def test_an_entropy_code_costs_more_to_load_than_none():
    dense = of(w=pruned((300, 300), 0.3, 31))
    small, fast = inspect(pack(dense).model), inspect(pack(dense, load="fast").model)
    ratios = [(one.load.cpu_ratio, one.load.peak_ratio) for one in (small, fast)]
    assert ratios[0] > ratios[1] and min(ratios[1]) >= 1


def test_sparse_initializers_are_rows_too():
    sparse, rows = to_sparse(of(w=pruned((60, 60), 0.05, 15), n=np.ones((9, 9), np.float32)))
    found = inspect(sparse)
    assert {(row.name, row.codec, row.nbytes) for row in found.rows} == {
        (row.name, row.codec, row.nbytes) for row in rows
    }
    assert found.load.packed == found.load.dense


def test_text_has_no_entropy():
    text = helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"b"])
    (row,) = inspect(of(t=text)).rows
    assert row.entropy_nbytes is row.sparse_nbytes is row.zipped_nbytes is None


def test_any_element_type_has_a_row():
    found = inspect(of(h=np.ones(4, np.float16), i=np.ones(4, np.int64), b=np.ones(4, bool)))
    assert [row.dtype for row in found.rows] == ["float16", "int64", "bool"]
    found = inspect(halves(TensorProto.BFLOAT16))
    assert {row.dtype for row in found.rows} == {"bfloat16"}


def inlined(packed: ModelProto) -> ModelProto:
    """Like a tool that replaces calls by the nodes of their functions."""
    result = inline_local_functions(outlined(packed))
    assert not any(node.domain == DOMAIN for node in result.graph.node)
    return result


def test_there_is_a_warning_about_a_decoder_that_was_taken_apart():
    packed = pack(mlp()).model
    found = inspect(inlined(packed))
    assert "another tool took its decoder apart" in found.warning
    assert "pack again as the last step" in found.warning
    assert not inspect(packed).warning


def test_there_is_a_warning_about_weights_that_were_made_dense_again():
    folded = mlp()
    assert not inspect(folded).warning
    folded.metadata_props.add(key=MARK)
    assert "made its weights dense again" in inspect(folded).warning
    imported = mlp()
    imported.opset_import.add(domain=DOMAIN, version=1)
    assert "made its weights dense again" in inspect(imported).warning


def test_what_decoding_may_take_is_bounded():
    packed = pack(of(w=pruned((300, 300), 0.3, 31))).model
    assert inspect(packed, 1 << 24).rows
    with pytest.raises(Prune2OnnxError, match="max-bytes"):
        inspect(packed, 100_000)


def test_the_weights_are_the_files_own():
    packed = pack(mlp()).model
    kept = [t for t in packed.graph.initializer if t.name.startswith("fc")]
    rows = {row.name: row for row in inspect(packed).rows}
    for tensor in kept:
        assert rows[tensor.name].nnz == np.count_nonzero(numpy_helper.to_array(tensor))
