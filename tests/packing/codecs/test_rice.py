"""Adaptive Rice codes: any sequences, the kinds of paths, and the example of the format page."""

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from prune2onnx import Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN
from prune2onnx.packing.codecs import evaluator as evaluate
from prune2onnx.packing.codecs import rice
from prune2onnx.packing.codecs.function import Body
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.codecs.weight import entropy_bits


def written(runs):
    """A function that decodes these sequences, and its streams."""
    body = Body("w", once=True)
    rice.write(body, runs)
    return body.function(*(run.name for run in runs), opset=13), body.given


def in_numpy(runs):
    function, given_streams = written(runs)
    call = helper.make_node("w", [], [run.name for run in runs], domain=DOMAIN)
    streams = [numpy_helper.to_array(tensor) for tensor in given_streams]
    return evaluate.evaluate(call, streams, {"w": function}, Budget(1 << 30, 1 << 20))


def in_onnxruntime(runs):
    function, streams = written(runs)
    for name, stream in zip(function.input, streams, strict=True):
        stream.name = name
    outputs = [helper.make_tensor_value_info(run.name, TensorProto.INT32, None) for run in runs]
    graph = helper.make_graph(list(function.node), "g", [], outputs, streams)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {})


def wanted(run):
    return (run.integers if run.rising else run.integers + 1 + run.base).tolist()


def run_of(name, integers, *, rising=False, base=0):
    return rice.Run(f"the {name}", np.asarray(integers), rising=rising, base=base)


@given(
    rising=st.lists(st.sets(st.integers(1, 5000), min_size=1, max_size=60), max_size=2),
    symbols=st.lists(
        st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(0, 9)),
        max_size=3,
    ),
)
@settings(deadline=None, max_examples=100)
def test_any_sequences_survive(rising, symbols):
    runs = [run_of(f"x{n}", sorted(each), rising=True) for n, each in enumerate(rising)]
    runs += [run_of(f"s{n}", each, base=base) for n, (each, base) in enumerate(symbols)]
    if runs:
        for run, got in zip(runs, in_numpy(runs), strict=True):
            assert got.tolist() == wanted(run)


RNG = np.random.default_rng(0)
ROWS = np.tile([[0.2], [0.01]], (10, 1)).repeat(10000, 1).ravel()
CASES = {
    "a single integer": [run_of("x", [7], rising=True)],
    "a single symbol": [run_of("s", [0])],
    "two, the first two integers there are": [run_of("x", [1, 2], rising=True)],
    "zeros only": [run_of("s", np.zeros(100, int))],
    "far apart": [run_of("x", [1, 2, 1 << 28], rising=True)],
    "one density": [run_of("x", np.flatnonzero(RNG.random(9000) < 0.1) + 1, rising=True)],
    "rows of two densities": [
        run_of("x", np.flatnonzero(RNG.random(ROWS.size) < ROWS) + 1, rising=True)
    ],
    "ever rarer": [run_of("x", np.cumsum(1 << np.arange(20)), rising=True)],
    "zeros and others in turn": [run_of("s", np.tile(np.repeat([0, 90], 200), 20))],
    "zeros, others, zeros": [
        run_of("s", np.repeat([0, 1, 0], 2000) * RNG.integers(500, 1500, 6000))
    ],
    "indices, and many zeros": [
        run_of("x", np.flatnonzero(RNG.random(9000) < 0.1) + 1, rising=True),
        run_of("s", (RNG.random(2000) < 0.02).astype(int), base=3),
    ],
}


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
def test_numpy_and_onnxruntime_decode_the_same(runs):
    for run, one, other in zip(runs, in_numpy(runs), in_onnxruntime(runs), strict=True):
        assert one.tolist() == other.tolist() == wanted(run)


def test_every_kind_of_path_is_written():
    ops = {name: [node.op_type for node in written(runs)[0].node] for name, runs in CASES.items()}
    assert "Gather" not in ops["one density"]  # one parameter
    assert "Pow" in ops["rows of two densities"]  # up and down
    assert "Max" not in ops["rows of two densities"]
    kinds = {("Gather" in each, "Max" in each) for each in ops.values()}
    assert kinds == {(False, False), (True, False), (True, True)}


def test_the_stream_of_the_format_page():
    runs = [run_of("s", [0, 2]), run_of("x", [5, 30], rising=True)]
    stream = rice.encode(np.concatenate([run.numbers for run in runs]), block=4)
    bits = "".join(f"{byte:08b}" for byte in stream.data.ravel())
    turns, lows, unary = "01" + "0000", "0" + "11" + "01" + "11" + "111", "1" + "1" + "01" + "0001"
    assert bits == turns + lows + unary
    assert [got.tolist() for got in in_numpy(runs)] == [[1, 3], [5, 30]]


def test_the_code_is_near_the_entropy_of_random_positions():
    for density in (0.3, 0.1, 0.03, 0.003):
        places = np.flatnonzero(RNG.random(200_000) < density) + 1
        entropy = entropy_bits(np.array([places.size, 200_000 - places.size]))
        _, streams = written([run_of("x", places, rising=True)])
        bits = 8 * max(len(stream.raw_data) for stream in streams)
        assert entropy < 1.01 * bits < 1.07 * entropy
        assert bits == pytest.approx(rice.rising_bits(places), rel=0.06)


def test_the_code_follows_the_density_of_rows():
    density = RNG.choice([0.3, 0.03], size=400).repeat(500)
    places = np.flatnonzero(RNG.random(density.size) < density) + 1
    numbers = run_of("x", places, rising=True).numbers
    adaptive = rice.encode(numbers).data.size
    one_parameter = min(int((numbers >> k).sum()) + (k + 1) * numbers.size for k in range(12)) / 8
    assert adaptive < 0.9 * one_parameter


def test_a_unary_region_that_would_take_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(rice, "MAX_BITS", 100)
    with pytest.raises(Prune2OnnxError, match="bits of a Rice code, at most 100"):
        rice.encode(np.zeros(101, np.int64))
