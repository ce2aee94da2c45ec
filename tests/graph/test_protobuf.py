"""Protobuf messages in pieces, measured and copied without their heavy fields."""

import numpy as np
import pytest
from mutation import seeds
from networks import mlp, model
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.graph.protobuf import copy_but, nbytes, serialized, tensor_nbytes


def large() -> ModelProto:
    """Weights that are written in pieces, with fields on both sides of their data."""
    made = mlp()
    made.doc_string, made.graph.doc_string = "of the model", "of the graph"
    for number, dtype in enumerate((np.float32, np.int8)):
        tensor = numpy_helper.from_array(np.ones((1 << 10, 1 << 10), dtype), f"large{number}")
        tensor.doc_string = "behind the data"
        tensor.metadata_props.add(key="k", value="v")
        made.graph.initializer.append(tensor)
    made.functions.append(
        helper.make_function("f", "f", [], ["y"], [], [helper.make_opsetid("", 18)])
    )
    return made


def models() -> list[ModelProto]:
    return [ModelProto(), ModelProto(ir_version=8), mlp(), large(), *(m for _, m in seeds())]


def test_the_pieces_of_a_model_are_its_bytes():
    for each in models():
        assert b"".join(serialized(each)) == each.SerializeToString()
    assert len(list(serialized(large()))) > 10


def test_fields_of_a_newer_onnx_are_written_too():
    unknown = b"\xfa\x3e\x03abc"  # field 1007
    outside = ModelProto.FromString(large().SerializeToString() + unknown)
    inside = large()
    inside.graph.MergeFromString(unknown)
    tensor = large()
    tensor.graph.initializer[-1].MergeFromString(unknown)
    for each in (outside, inside, tensor):
        assert unknown in b"".join(serialized(each))
        assert b"".join(serialized(each)) == each.SerializeToString()


def test_sizes_are_those_of_the_bytes():
    for each in models():
        assert nbytes(each) == each.ByteSize()
        for tensor in each.graph.initializer:
            assert tensor_nbytes(tensor) == tensor.ByteSize()


@pytest.mark.parametrize("fields", [(), ("graph",), ("metadata_props", "functions")])
def test_a_copy_has_all_fields_but_those_named(fields):
    for each in models():
        wanted = ModelProto()
        wanted.CopyFrom(each)
        for field in fields:
            wanted.ClearField(field)
        got = ModelProto()
        copy_but(got, each, *fields)
        assert got.SerializeToString() == wanted.SerializeToString()


def test_messages_that_are_there_but_empty_are_copied():
    given = model([], {}, {}, {})
    given.graph.input.add(name="x").type.tensor_type.SetInParent()
    got = ModelProto()
    copy_but(got, given)
    assert got == given and got.graph.input[0].type.HasField("tensor_type")
    tensor = TensorProto()
    copy_but(tensor, TensorProto(name="", raw_data=b""))
    assert tensor.HasField("name") and tensor.HasField("raw_data")
