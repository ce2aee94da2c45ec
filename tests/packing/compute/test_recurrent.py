"""LSTM in int8: both directions, gates that exporters put in order, bodies, and what stays."""

import numpy as np
import pytest
from networks import model, value
from onnx import TensorProto, helper

from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.file import load, save
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.walk import nodes_in
from prune2onnx.packing.compute.narrow import narrowed
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import Int8Options, PackOptions
from prune2onnx.runtime.compare import output_error, run_all
from prune2onnx.runtime.int8 import quantize_int8
from prune2onnx.runtime.validate import validate

UNITS, INPUTS = 24, 20
X = [{"x": np.random.default_rng(5).normal(size=(7, 3, INPUTS)).astype(np.float32)}]


def weights(directions: int = 1, gates: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    own = directions, gates * UNITS
    return {
        "w": rng.normal(0, INPUTS**-0.5, (*own, INPUTS)).astype(np.float32),
        "r": rng.normal(0, UNITS**-0.5, (*own, UNITS)).astype(np.float32),
        "b": rng.normal(0, 0.1, (directions, 2 * gates * UNITS)).astype(np.float32),
    }


def layer(op: str = "LSTM", directions: int = 1, **attributes):
    direction = "bidirectional" if directions == 2 else "forward"
    node = helper.make_node(
        op, ["x", "w", "r", "b"], ["y"], hidden_size=UNITS, direction=direction, **attributes
    )
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    shape = ["s", directions, "n", UNITS]
    made = model([node], weights(directions, gates), {"x": ["s", "n", INPUTS]}, {"y": shape})
    return normalize(made).model


def arranged(*, in_body: bool = False):
    """Gates in torch's order, i f g o, which slices and a Concat put into ONNX's: i o f g."""
    given = weights()
    stored = {"w": given["w"][0], "r": given["r"][0], "b": given["b"], "first": np.array([0])}
    order = {"i": 0, "o": 3, "f": 1, "g": 2}
    stored |= {f"at{n}": np.array([n * UNITS]) for n in range(5)}
    nodes = []
    for name in "wr":
        for gate, n in order.items():
            ends = [f"at{n}", f"at{n + 1}", "first"]
            nodes.append(helper.make_node("Slice", [name, *ends], [f"{name}_{gate}"]))
        parts = [f"{name}_{gate}" for gate in order]
        nodes.append(helper.make_node("Concat", parts, [f"{name}_joined"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}_joined", "first"], [f"{name}_whole"]))
    read = ["x", "w_whole", "r_whole", "b"]
    nodes.append(helper.make_node("LSTM", read, ["z" if in_body else "y"], hidden_size=UNITS))
    if in_body:
        out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
        body = helper.make_graph(nodes, "body", [], [out])
        nothing = helper.make_node("Identity", ["zero"], ["nothing"])
        other = helper.make_tensor_value_info("nothing", TensorProto.FLOAT, None)
        rest = helper.make_graph([nothing], "rest", [], [other])
        nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=rest)]
        stored["zero"] = np.zeros((1, 1, 1, UNITS), np.float32)
    made = model(nodes, stored, {"x": ["s", "n", INPUTS]}, {"y": ["s", 1, "n", UNITS]})
    if in_body:
        made.graph.input.append(value("flag", [], TensorProto.BOOL))
    return normalize(made).model


FORMS = {
    "forward": (layer(), X),
    "bidirectional": (layer(directions=2), X),
    "arranged": (arranged(), X),
    "in a body": (arranged(in_body=True), [{**X[0], "flag": np.array(True)}]),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_lstm_computes_in_int8(form):
    given, inputs = FORMS[form]
    made = narrowed(given, "int8")
    computes = {layer.name: layer.compute for layer in made.layers}
    assert computes["w"] == computes["r"] == "int8" and "b" not in computes
    ops = [node.op_type for node in nodes_in(made.model.graph.node)]
    assert ops.count("DynamicQuantizeLSTM") == 1 and not {"LSTM", "Slice", "Concat"} & set(ops)
    assert 0 < output_error(given, inputs)(made.model) < 0.02
    stored = {tensor.name: tensor for tensor in made.model.graph.initializer}
    assert stored["w"].data_type == stored["r"].data_type == TensorProto.INT8
    assert not {name for name in stored if name.startswith(("at", "first"))}
    directions = 2 if form == "bidirectional" else 1
    assert list(stored["w"].dims) == [directions, INPUTS, 4 * UNITS]
    assert list(stored["w_scale"].dims) == [directions, 4 * UNITS]


@pytest.mark.parametrize(
    ("form", "bits"), [("forward", None), *((form, 4.0) for form in FORMS if form != "forward")]
)
def test_a_packed_lstm_has_the_outputs_of_the_one_unpacked(form, bits, tmp_path):
    given, inputs = FORMS[form]
    save(given, tmp_path / "in.onnx")
    target = tmp_path / "out.onnx"
    result = pack_file(tmp_path / "in.onnx", target, PackOptions(compute="int8", bits=bits))
    assert [layer.compute for layer in result.layers if layer.name in "wr"] == ["int8"] * 2
    packed, plain = load(target), unpack(load(target))
    for a, b in zip(run_all(packed, inputs), run_all(plain, inputs), strict=True):
        assert all(np.array_equal(*each) for each in zip(a, b, strict=True))
    assert output_error(given, inputs)(packed) < (0.2 if bits else 0.02)
    codes = next(t for t in plain.graph.initializer if t.name == "w")
    levels = len(np.unique(np.frombuffer(codes.raw_data, np.int8)))
    assert levels < 60 if bits else levels > 100
    assert not validate(target).unfolded


@pytest.mark.parametrize(
    ("given", "compute", "reason"),
    [
        (layer("GRU"), "int8", "read by GRU; onnxruntime has an int8 kernel for LSTM alone"),
        (layer("RNN"), "int8", "read by RNN"),
        (layer(), "int4", "read by LSTM, for which onnxruntime has a kernel in int8 alone"),
        (arranged(), "int8-weights", "a kernel in int8 alone"),
    ],
)
def test_what_has_no_kernel_stays_float32_and_says_so(given, compute, reason):
    made = narrowed(given, compute)
    assert made.model == given
    assert all(layer.compute == "float32" for layer in made.layers)
    assert any(reason in layer.reason for layer in made.layers)


def test_a_weight_that_something_else_reads_keeps_the_lstm_in_float32():
    given = layer()
    given.graph.node.append(helper.make_node("Abs", ["r"], ["shown"]))
    given.graph.output.append(helper.make_tensor_value_info("shown", TensorProto.FLOAT, None))
    made = narrowed(given, "int8")
    assert made.model == given
    reasons = {layer.name: layer.reason for layer in made.layers}
    assert reasons["r"] == "read in other ways than by recurrent layers"
    assert reasons["w"] == "the other weight of its LSTM is float32"


def test_quantize_keeps_an_lstm_whole():
    made = quantize_int8(layer(), X, compute="int8", keep=["r"])
    assert [(layer.weight, layer.compute) for layer in made.layers] == [
        ("w", "float32"),
        ("r", "float32"),
    ]
    assert Int8Options().compute == "static"
    whole = quantize_int8(layer(), X, compute="int8")
    assert [layer.op for layer in whole.layers] == ["LSTM", "LSTM"]
    assert all(layer.is_int8 for layer in whole.layers)
