"""Short names in a packed file: fewer bytes, the same weights under their own names."""

import base64
import zlib

import numpy as np
import pytest
from networks import convnet, model, optimised, run, weights
from onnx import helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN, MARK
from prune2onnx.graph.normalize import normalize
from prune2onnx.packing.decoding import coded, decode_graph
from prune2onnx.packing.inline import is_packed, outlined
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.pack import pack
from prune2onnx.packing.short_names import restored, shortened
from prune2onnx.packing.unpack import unpack

RNG = np.random.default_rng(0)
NAMES = ["layers.0.linear.weight", "layers.1.linear.weight", "a name, with spaces", "ä.weight"]


def dense(names=NAMES):
    """Layers with few levels; a weight that stays dense stands between them."""
    arrays = {}
    nodes, value = [], "x"
    for index, name in enumerate(names):
        levels = RNG.integers(-3, 4, (32, 32)) * (RNG.random((32, 32)) < 0.3)
        arrays[name] = levels.astype(np.float32)
        arrays[f"bias {index}"] = RNG.normal(size=3 if index else 32).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [value, name], [f"h{index}"]))
        value = f"h{index}"
    nodes.append(helper.make_node("Add", [value, "bias 0"], ["y"]))
    return model(nodes, arrays, {"x": [1, 32]}, {"y": [1, 32]})


def entry(packed):
    return next(each for each in packed.metadata_props if each.key == MARK)


def changed(packed, text):
    """The same file with another text in its metadata."""
    result = type(packed)()
    result.CopyFrom(packed)
    entry(result).value = base64.b64encode(zlib.compress(text.encode())).decode()
    return result


def text_of(packed):
    return zlib.decompress(base64.b64decode(entry(packed).value)).decode()


def test_own_names_come_back_with_everything_else():
    normal = normalize(dense()).model
    packed = pack(normal, short_names=True).model
    names = {name for node in packed.graph.node for name in (*node.input, *node.output)}
    assert not names & set(NAMES)
    assert unpack(packed) == normal
    assert not packed.functions and is_packed(packed)
    assert [row.name for row in inspect(packed).rows if row.codec != "dense"][: len(NAMES)] == NAMES
    for one, other in zip(run(packed), run(normal), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_huffman_coded_file_keeps_its_call():
    normal = normalize(convnet()).model
    packed = pack(normal, short_names=True).model
    if shortened(packed) is packed:
        packed = pack(normal, load="small", short_names=True).model
    assert weights(unpack(packed)) == weights(normal)
    assert not optimised(decode_graph(packed)).node


def test_the_call_is_as_it_was_but_for_the_bytes_of_each_weight():
    packed = pack(dense(NAMES[:2]), short_names=True).model
    call = next(node for node in outlined(packed).graph.node if node.domain == DOMAIN)
    assert list(call.output) == NAMES[:2]
    assert coded(packed).how[NAMES[0]][0] == "gap-levels"
    assert 0 < sum(nbytes for _, nbytes in coded(packed).how.values()) < packed.ByteSize()


def test_short_names_are_in_the_order_of_the_page():
    names = [f"weight {number}" for number in range(70)]
    arrays = {name: np.full((3, 3), number, np.float32) for number, name in enumerate(names)}
    nodes = [helper.make_node("Sum", names, ["y"])]
    normal = normalize(model(nodes, arrays, {}, {"y": [3, 3]})).model
    packed = pack(normal, short_names=True).model
    assert entry(packed).value
    assert unpack(packed) == normal


def test_names_that_are_damaged_are_refused():
    packed = pack(dense(), short_names=True).model
    text = text_of(packed)
    first, *lines = text.split("\n")
    cases = {
        "no base64": None,
        "a name less": "\n".join([first, *lines[:-1]]),
        "a name twice": "\n".join([first, *lines[:-1], lines[0]]),
        "no number": "\n".join([f"x{first}", *lines]),
        "no method": "\n".join([first, *lines[:-1], "name"]),
        "a long number": "\n".join(["9" * 5000, *lines]),
    }
    for case, damaged in cases.items():
        other = changed(packed, damaged or "")
        if damaged is None:
            entry(other).value = "no base64!"
        with pytest.raises(Prune2OnnxError, match=f"metadata entry '{MARK}'.* damaged"):
            unpack(other)
            pytest.fail(case)
    swapped = "\n".join([first, lines[0].replace("layers.0", "layers.9"), *lines[1:]])
    with pytest.raises(Prune2OnnxError, match="checksum"):
        unpack(changed(packed, swapped))


def test_a_text_that_expands_without_end_is_refused():
    packed = pack(dense(), short_names=True).model
    entry(packed).value = base64.b64encode(zlib.compress(bytes(1 << 26))).decode()
    with pytest.raises(Prune2OnnxError, match="longer than"):
        unpack(packed)


@pytest.mark.parametrize("name", ["with\na line break"])
def test_names_that_do_not_fit_a_line_stay(name):
    normal = normalize(dense([name, *NAMES[:2]])).model
    packed = pack(normal, short_names=True).model
    assert not entry(packed).value
    assert unpack(packed) == normal


def test_names_of_declared_values_stay():
    normal = normalize(dense()).model
    declared = helper.make_tensor_value_info(NAMES[0], 1, [32, 32])
    normal.graph.value_info.append(declared)
    packed = pack(normal, short_names=True).model
    assert not entry(packed).value and NAMES[0] in packed.graph.node[0].output
    assert unpack(packed) == normal


def test_a_model_that_is_not_packed_is_left_alone():
    normal = normalize(dense()).model
    assert restored(normal) is normal and shortened(normal) is normal
