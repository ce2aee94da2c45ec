"""ONNX's own sparse tensors: fewer bytes or none, every bit back, accepted by their readers."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.tensors import dense_array
from prune2onnx.packing.sparse import CODEC, WRITTEN, from_sparse, sparse_nbytes, to_sparse

FLOAT = np.dtype(np.float32)


def thinned(shape, dtype=FLOAT, density=0.1, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = rng.integers(1, 7, shape).astype(dtype)
    array[rng.random(shape) >= density] = 0
    return array


def model(nodes, weights, inputs, outputs, *, opset=18, ir_version=8) -> ModelProto:
    """Weights are arrays or tensors; inputs and outputs name -> (type, shape)."""
    values = [
        [helper.make_tensor_value_info(name, *what) for name, what in group.items()]
        for group in (inputs, outputs)
    ]
    tensors = [
        w if isinstance(w, TensorProto) else numpy_helper.from_array(w, n)
        for n, w in weights.items()
    ]
    graph = helper.make_graph(nodes, "net", *values, tensors)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def convnet() -> ModelProto:
    rng = np.random.default_rng(3)
    return model(
        [
            helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Flatten", ["r"], ["f"]),
            helper.make_node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
        ],
        {
            "conv.weight": thinned((16, 3, 3, 3)),
            "conv.bias": rng.normal(size=16).astype(np.float32),
            "fc.weight": thinned((10, 16 * 36), seed=1),
        },
        {"x": (TensorProto.FLOAT, ["n", 3, 8, 8])},
        {"y": (TensorProto.FLOAT, ["n", 10])},
    )


def run(onnx_model: ModelProto, **inputs) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        onnx_model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]


def sparse_of(array: np.ndarray, name: str = "w") -> SparseTensorProto:
    """Written here by hand, as another tool would."""
    positions = np.flatnonzero(array.reshape(-1).view(f"u{array.itemsize}"))
    indices = TensorProto(data_type=TensorProto.INT64, dims=positions.shape)
    indices.int64_data.extend(positions.tolist())
    values = numpy_helper.from_array(array.reshape(-1)[positions], name)
    return SparseTensorProto(values=values, indices=indices, dims=array.shape)


def bits(tensor: TensorProto) -> bytes:
    return numpy_helper.to_array(tensor).tobytes()


# --- writing -----------------------------------------------------------------------------------


def test_onnxruntime_and_the_checker_read_it_and_the_output_is_equal(tmp_path):
    dense = convnet()
    before = dense.SerializeToString()
    sparse, rows = to_sparse(dense)
    assert dense.SerializeToString() == before
    onnx.checker.check_model(sparse)
    assert [row.codec for row in rows] == [CODEC, "dense", CODEC]
    assert sparse.ByteSize() < dense.ByteSize() / 4
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(sparse, x=x), run(dense, x=x))
    onnx.save(sparse, tmp_path / "sparse.onnx")
    onnx.checker.check_model(tmp_path / "sparse.onnx")


def test_indices_are_rising_int64_varints_and_the_values_bear_the_name():
    sparse, _ = to_sparse(convnet())
    for tensor, name in zip(
        sparse.graph.sparse_initializer, ("conv.weight", "fc.weight"), strict=True
    ):
        assert tensor.values.name == name
        assert tensor.indices.data_type == TensorProto.INT64
        assert not tensor.indices.HasField("raw_data")
        positions = list(tensor.indices.int64_data)
        assert positions == sorted(set(positions))
        assert list(tensor.indices.dims) == list(tensor.values.dims) == [len(positions)]


def test_rows_count_the_bytes_of_the_file_and_say_why_a_weight_stays_dense():
    dense = convnet()
    dense.graph.initializer.append(numpy_helper.from_array(np.float32(0), "scalar"))
    dense.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 3), FLOAT), "empty"))
    four = thinned((40, 40), np.int8).astype(ml_dtypes.int4)
    dense.graph.initializer.append(numpy_helper.from_array(four, "four"))
    dense.graph.initializer.append(numpy_helper.from_array(np.array(["a"], object), "text"))
    sparse, rows = to_sparse(dense)
    assert [row.name for row in rows] == [t.name for t in dense.graph.initializer]
    for row, tensor in zip(rows, dense.graph.initializer, strict=True):
        assert row.shape == tuple(tensor.dims)
        assert bool(row.reason) == (row.codec == "dense")
    graph = sparse.graph
    stored = onnx.GraphProto(
        initializer=graph.initializer, sparse_initializer=graph.sparse_initializer
    )
    assert sum(row.nbytes for row in rows) == stored.ByteSize()
    reasons = {row.name: row.reason for row in rows}
    assert reasons["conv.bias"] == "sparse-initializer takes 111 bytes, dense 83"
    assert "scalar" in reasons["scalar"] and "empty" in reasons["empty"]
    assert "int4" in reasons["four"] and "object" in reasons["text"]


@pytest.mark.parametrize("element_type", WRITTEN, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("shape", [(300,), (5, 60), (3, 4, 5, 2, 5)])
def test_every_type_and_rank_that_is_written_is_read_back_and_runs(element_type, shape):
    array = thinned(shape, helper.tensor_dtype_to_np_dtype(element_type))
    opset, ir = (19, 9) if "FLOAT8" in TensorProto.DataType.Name(element_type) else (18, 8)
    dense = model(
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
        {"w": array},
        {},
        {"y": (TensorProto.FLOAT, shape)},
        opset=opset,
        ir_version=ir,
    )
    sparse, (row,) = to_sparse(dense)
    if array.itemsize > 1 or len(shape) < 5:
        assert row.codec == CODEC
    onnx.checker.check_model(sparse)
    assert from_sparse(sparse) == dense
    np.testing.assert_array_equal(run(sparse), array.astype(np.float32))


def test_minus_zero_and_nan_payloads_are_entries():
    array = np.zeros(200, np.uint32)
    array[[0, 7, 130, 199]] = 0x80000000, 0x7FC12345, 0xFF800001, 1
    weight = array.view(np.float32)
    dense = model(
        [helper.make_node("Identity", ["w"], ["y"])],
        {"w": weight},
        {},
        {"y": (TensorProto.FLOAT, [200])},
    )
    sparse, (row,) = to_sparse(dense)
    assert row.nnz == 3  # -0.0 counts as zero in every report
    assert list(sparse.graph.sparse_initializer[0].indices.int64_data) == [0, 7, 130, 199]
    assert from_sparse(sparse) == dense
    assert run(sparse).tobytes() == weight.tobytes()


def test_an_all_zero_weight_takes_a_few_bytes():
    dense = model(
        [helper.make_node("Neg", ["w"], ["y"])],
        {"w": np.zeros((50, 50), np.float32)},
        {},
        {"y": (TensorProto.FLOAT, [50, 50])},
    )
    sparse, (row,) = to_sparse(dense)
    assert row.nbytes < 40 and row.bits_per_nonzero is None
    assert not np.any(run(sparse))
    assert from_sparse(sparse) == dense


def test_a_dense_model_stays_as_it_is():
    dense = model(
        [helper.make_node("Neg", ["w"], ["y"])],
        {"w": np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)},
        {},
        {"y": (TensorProto.FLOAT, [9, 9])},
        ir_version=4,
    )
    sparse, rows = to_sparse(dense)
    assert sparse == dense
    assert rows[0].nbytes == onnx.GraphProto(initializer=dense.graph.initializer).ByteSize()


def test_weights_of_subgraphs_are_written_too():
    def body(op: str) -> onnx.GraphProto:
        inner = numpy_helper.from_array(thinned((20, 30)), "inner")
        output = helper.make_tensor_value_info(f"{op}.out", TensorProto.FLOAT, [20, 30])
        node = helper.make_node(op, ["inner", "outer"], [f"{op}.out"])
        return helper.make_graph([node], op, [], [output], [inner])

    dense = model(
        [helper.make_node("If", ["on"], ["y"], then_branch=body("Add"), else_branch=body("Sub"))],
        {"outer": thinned((20, 30), seed=1)},
        {"on": (TensorProto.BOOL, [])},
        {"y": (TensorProto.FLOAT, [20, 30])},
    )
    sparse, rows = to_sparse(dense)
    assert [row.name for row in rows] == ["outer", "inner", "inner"]
    assert {row.codec for row in rows} == {CODEC}
    onnx.checker.check_model(sparse)
    for on in (True, False):
        flag = np.array(on)
        np.testing.assert_array_equal(run(sparse, on=flag), run(dense, on=flag))
    assert from_sparse(sparse) == dense


@pytest.mark.parametrize(("ir_version", "overridable"), [(3, False), (4, True), (8, True)])
def test_old_files_get_the_ir_version_that_knows_sparse_tensors(ir_version, overridable):
    dense = model(
        [helper.make_node("Neg", ["w"], ["y"])],
        {"w": thinned((9, 9))},
        {"w": (TensorProto.FLOAT, [9, 9])},
        {"y": (TensorProto.FLOAT, [9, 9])},
        opset=8,
        ir_version=ir_version,
    )
    sparse, _ = to_sparse(dense)
    assert sparse.ir_version == max(ir_version, 6)
    onnx.checker.check_model(sparse)
    np.testing.assert_array_equal(run(sparse), run(dense))
    # Before IR version 4 every initializer had to be an input, and no caller could give it.
    assert [value.name for value in sparse.graph.input] == (["w"] if overridable else [])
    if overridable:
        np.testing.assert_array_equal(run(sparse, w=np.ones((9, 9), np.float32)), -1)


def test_notes_on_a_weight_survive():
    dense = convnet()
    dense.graph.initializer[0].doc_string = "a note"
    dense.graph.initializer[0].metadata_props.add(key="who", value="me")
    again = from_sparse(to_sparse(dense)[0])
    back = {tensor.name: tensor for tensor in again.graph.initializer}
    assert back["conv.weight"] == dense.graph.initializer[0]
    assert {name: bits(tensor) for name, tensor in back.items()} == {
        tensor.name: bits(tensor) for tensor in dense.graph.initializer
    }


def test_external_data_must_be_loaded():
    dense = convnet()
    onnx.external_data_helper.set_external_data(dense.graph.initializer[0], "beside.bin")
    with pytest.raises(Prune2OnnxError, match=r"conv\.weight: its external data is not loaded"):
        to_sparse(dense)


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]),
        hnp.array_shapes(max_dims=4, max_side=9),
        elements=st.sampled_from([0, 0, 0, 0, 0, 1, 0x80, 0xFF]),
    ),
    st.integers(0, 255),
)
def test_any_bits_come_back_and_no_weight_grows(patterns, last):
    patterns.reshape(-1)[-1] = last
    floats = {2: np.float16, 4: np.float32, 8: np.float64}
    array = patterns.view(floats.get(patterns.itemsize, np.int8))
    dense = model([], {"a weight": array}, {}, {})
    sparse, (row,) = to_sparse(dense)
    assert from_sparse(sparse) == dense
    assert row.nbytes <= onnx.GraphProto(initializer=dense.graph.initializer).ByteSize()
    if row.codec == CODEC:
        assert row.nbytes == sparse_nbytes(array, "a weight")


# --- measuring ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_])
@pytest.mark.parametrize("density", [0, 0.01, 0.3, 1])
@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (129,), (128, 129), (3, 5, 200, 200)])
def test_the_size_is_exact_before_the_tensor_is_written(shape, density, dtype):
    array = thinned(shape, dtype, density)
    tensor = sparse_of(array, "some.weight")
    graph = onnx.GraphProto(sparse_initializer=[tensor])
    assert sparse_nbytes(array, "some.weight") == graph.ByteSize()


def test_what_has_no_sparse_form_has_no_size():
    assert sparse_nbytes(np.array(1.0)) is None
    assert sparse_nbytes(np.zeros((3, 0))) is None
    assert sparse_nbytes(np.zeros(9, ml_dtypes.int4)) is None


# --- reading -----------------------------------------------------------------------------------


def test_sparse_constants_become_dense_in_graphs_bodies_and_functions():
    array = thinned((4, 5))
    constant = helper.make_node("Constant", [], ["w"], sparse_value=sparse_of(array, ""))
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["v"], sparse_value=sparse_of(array, "")),
            helper.make_node("Neg", ["v"], ["n"]),
        ],
        "body",
        [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, [4, 5])],
    )
    dense = model(
        [
            constant,
            helper.make_node("f", [], ["a"], domain="here"),
            helper.make_node("If", ["on"], ["b"], then_branch=body, else_branch=body),
            helper.make_node("Sum", ["w", "a", "b"], ["y"]),
        ],
        {"on": np.array(True)},
        {},
        {"y": (TensorProto.FLOAT, [4, 5])},
    )
    opsets = [helper.make_opsetid("", 18)]
    dense.functions.append(helper.make_function("here", "f", [], ["w"], [constant], opsets))
    dense.opset_import.append(helper.make_opsetid("here", 1))
    plain = from_sparse(dense)
    assert b"sparse" not in str(plain).encode()
    onnx.checker.check_model(plain, full_check=True)
    np.testing.assert_array_equal(run(plain), array)


def test_an_empty_sparse_tensor_of_a_huge_shape_is_an_error():
    sparse = SparseTensorProto(dims=[0, 1 << 62, 1 << 62])
    sparse.values.CopyFrom(TensorProto(name="s", data_type=1, dims=[0]))
    sparse.indices.CopyFrom(TensorProto(data_type=7, dims=[0]))
    with pytest.raises(Prune2OnnxError, match=r"s: its shape .* none that an array has"):
        dense_array(sparse)


def test_a_damaged_sparse_initializer_is_an_error_that_names_it():
    sparse, _ = to_sparse(convnet())
    sparse.graph.sparse_initializer[1].indices.int64_data[-1] = 5760
    with pytest.raises(Prune2OnnxError, match=r"^fc\.weight: an index lies outside"):
        from_sparse(sparse)


def test_the_allowed_bytes_are_for_all_weights_together():
    sparse, _ = to_sparse(convnet())
    nbytes = sum(int(np.prod(s.dims)) * 4 for s in sparse.graph.sparse_initializer)
    assert len(from_sparse(sparse, nbytes).graph.initializer) == 3
    with pytest.raises(Prune2OnnxError, match=r"^fc\.weight: .* 23,040 bytes dense, 23,039 are"):
        from_sparse(sparse, nbytes - 1)
