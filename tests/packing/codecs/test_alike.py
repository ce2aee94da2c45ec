"""Weights that share a code: those distributed alike, and no more codes than pay."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from prune2onnx.packing.codecs.staged import Counted
from prune2onnx.packing.codecs.staged.alike import parted
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack


def book(deviation: float, size: int, seed: int = 0) -> Counted:
    values = np.rint(np.random.default_rng(seed).normal(0, deviation, size)).clip(-127, 127)
    return Counted.of(*np.unique(values.astype(np.int8), return_counts=True))


def test_weights_of_few_and_of_many_bits_have_codes_of_their_own():
    books = [book(1, 200_000), book(20, 300_000), book(1.1, 100_000, 1), book(19, 80_000, 2)]
    found = parted(books)
    assert found[0] == found[2] != found[1] == found[3]
    assert sorted(set(found)) == [0, 1]


def test_equal_ones_and_small_ones_share_a_code():
    assert set(parted([book(3, 100_000, seed) for seed in range(9)])) == {0}
    assert set(parted([book(1, 2000), book(20, 2000)])) == {0}
    assert parted([book(2, 100_000)]) == [0]


def test_there_are_at_most_four_codes():
    found = parted([book(1.6**at, 400_000, at) for at in range(10)])
    assert sorted(set(found)) == [0, 1, 2, 3] and found == sorted(found)


def test_a_file_of_two_rates_is_smaller_than_what_one_code_gives():
    """Of 2 and of 4.6 bits: with one code for both they would take a tenth more."""
    rng = np.random.default_rng(0)
    arrays = {
        "few": np.rint(rng.normal(0, 1, (900, 1000))).astype(np.int8),
        "many": np.rint(rng.normal(0, 6, (900, 1000))).clip(-127, 127).astype(np.int8),
    }
    nodes = [
        helper.make_node("MatMulInteger", ["x", "few"], ["a"]),
        helper.make_node("MatMulInteger", ["x", "many"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 900])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 1000])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    def bits(values: np.ndarray) -> float:
        share = np.unique(values, return_counts=True)[1] / values.size
        return float(-(share * np.log2(share)).sum())

    apart = sum(bits(array) * array.size for array in arrays.values()) / 8
    joint = np.concatenate(list(arrays.values()), axis=None)
    packed = pack(model)
    assert packed.model.ByteSize() < 1.06 * apart < 0.95 * bits(joint) * joint.size / 8
    assert unpack(packed.model) == model
