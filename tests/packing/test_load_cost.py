"""What loads are predicted to take: the amounts, counted by hand; the warning and its advice."""

import numpy as np
import pytest
from load_cost import FORMS, stack
from mutation import known
from networks import model
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.graph.file import save
from prune2onnx.packing.codecs.methods import method
from prune2onnx.packing.codecs.staged.choice import LEAST_SIZE, decoding_ns
from prune2onnx.packing.codecs.weight import Weight
from prune2onnx.packing.codecs.work import MADE_NS, MAPPED, READ_NS, SCATTERED_NS, Work
from prune2onnx.packing.decoding import coded
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.load_cost import (
    UNPACK,
    WARN_MS,
    LoadCost,
    Prediction,
    amounts,
    cost,
    lighter,
)
from prune2onnx.packing.pack import pack
from prune2onnx.runtime.latency import load_in_fresh_process

FLOATS = np.random.default_rng(0).normal(size=(1100, 1000)).astype(np.float32)
LEVELS = np.rint(3 * FLOATS) * np.float32(0.01) + np.float32(0)


def times(weight: np.ndarray) -> ModelProto:
    """x times a weight."""
    rows, columns = weight.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return model([node], {"w": weight}, {"x": ["N", rows]}, {"y": ["N", columns]})


# --- amounts ---


def test_constants_count_by_the_operator_that_takes_them():
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["s"]),
        helper.make_node("Conv", ["s", "c"], ["y"]),
    ]
    weights = {name: np.zeros(size, np.float32) for name, size in (("a", 10), ("b", 20), ("c", 30))}
    found = amounts(model(nodes, weights, {}, {}).graph, {}, 1000)
    assert (found["matmul"], found["conv"]) == (40, 120)
    assert (found["nodes"], found["file"], found["session"], found["folded"]) == (3, 1000, 1, 0)


def test_constants_that_a_dense_file_computes_are_folded_too():
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["m"]),
        helper.make_node("MatMul", ["x", "m"], ["y"]),
    ]
    weights = {"w": np.zeros((10, 10), np.int8), "s": np.zeros(1, np.float32)}
    found = amounts(model(nodes, weights, {}, {}).graph, {}, 0)
    assert found["folded"] == 2 and found["made"] == 400 + 400
    assert found["read"] == 100 + 400 + 4 and found["matmul"] == 400


def test_nodes_and_constants_of_bodies_count():
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"])],
        "b",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        [helper.make_tensor("own", TensorProto.FLOAT, [5], [0.0] * 5)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    found = amounts(model([node], {"w": np.zeros(10, np.float32)}, {}, {}).graph, {}, 0)
    assert (found["nodes"], found["matmul"]) == (3, 80)


def test_a_file_above_2_gb_has_its_weights_beside_it():
    weights = {"w": (650_000_000, 2_600_000_000)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    given = model([node], {}, {}, {}).graph
    found = amounts(given, weights, 2_600_000_000)
    assert (found["file"], found["outside"]) == (0, 2_600_000_000)
    # measured: 4.3 to 4.7 s and 2,707 MB
    taken = cost(found)
    assert 4300 < taken.cpu_ms < 5000 and 2.6e9 < taken.peak_nbytes < 2.8e9
    assert amounts(given, weights, 2_000_000_000)["outside"] == 0


def test_a_stage_is_held_with_what_those_before_it_left():
    work = Work()
    for stage, held, left in ((0, 10, 5), (1, 100, 30), (2, 90, 20), (3, 40, 20)):
        work.held[stage], work.left[stage] = held, left
    assert work.peak == 5 + 30 + 90
    assert Work().peak == 0


def test_decoding_counts_what_it_reads_makes_and_holds():
    work = Work()
    byte = np.zeros(100, np.uint8)
    whole = byte.astype(np.int32)
    work.ran("Cast", [whole], [byte])
    work.ran("Constant", [whole], [])
    work.stage = 3
    work.ran("Div", [whole], [whole, whole[:1]])
    assert (work.nodes, work.made, work.read) == (
        2,
        {"Cast": 400, "Div": 400},
        {"Cast": 100, "Div": 404},
    )
    assert work.held == {0: 400, 3: 400} and work.mapped == 0
    work.ran("Cast", [byte], [np.zeros(MAPPED + 1, np.uint8), byte])
    assert work.mapped == MAPPED + 1
    found = amounts(times(LEVELS).graph, {"w": (100, 400)}, 0, work)
    assert found["divided"] == 400 and found["held"] == 500 and found["kept"] == 400


def test_stages_hold_a_part_at_a_time():
    dense = stack(9, FORMS["4 bits"])
    work = coded(pack(dense).model).work
    assert max(work.held) == 4  # of half a million elements
    assert max(work.held.values()) < 0.35 * work.made.total()
    assert coded(pack(dense, load="small").model).work.held.keys() == {0}


@pytest.mark.parametrize("form", ["4 bits", "float32", "bfloat16", "int8, 5 bits", "5 % dense"])
def test_what_chooses_and_what_predicts_count_alike(form):
    """`choice.decoding_ns` knows a weight, not yet the calls that decode it."""
    dense = stack(9, FORMS[form])
    packed = pack(dense)
    how = {row.name: method(row.codec) for row in packed.rows if row.size > LEAST_SIZE}
    weights = (
        known(Weight(tensor.name, numpy_helper.to_array(tensor), tensor.data_type))
        for tensor in dense.graph.initializer
        if tensor.name in how
    )
    chosen = sum(decoding_ns(weight, how[weight.weight.name]) for weight in weights)
    found = amounts(dense.graph, {}, 0, coded(packed.model).work)
    parts = (("made", MADE_NS), ("read", READ_NS), ("scattered", SCATTERED_NS))
    assert chosen == pytest.approx(sum(found[name] * each for name, each in parts), rel=0.2)


@pytest.mark.parametrize("to", [99, -1, 1 << 40, b"\xff"])
def test_unknown_types_and_shapes_are_no_obstacle(to):
    nodes = [helper.make_node("Cast", ["w"], ["f"], to=to), helper.make_node("Cast", ["w"], [])]
    made = model(nodes, {"w": np.zeros(4, np.float32)}, {}, {})
    made.graph.initializer.add(name="v", data_type=77, dims=[3, -5])
    assert amounts(made.graph, {}, 0)["nodes"] == 2


# --- predictions ---


@pytest.mark.parametrize("load", ["small", "balanced", "fast"])
def test_pack_and_inspect_predict_the_same(load):
    packed = pack(times(LEVELS), load=load)
    found = inspect(packed.model).load
    assert found.packed == packed.load.packed and found.stages == packed.load.stages
    assert found.dense.cpu_ms == pytest.approx(packed.load.dense.cpu_ms, rel=0.01)
    assert found.dense.peak_nbytes == pytest.approx(packed.load.dense.peak_nbytes, rel=0.01)


@pytest.mark.parametrize("form", ["4 bits", "float32", "10 % dense"])
@pytest.mark.parametrize("load", ["small", "balanced"])
def test_peak_memory_is_what_a_process_takes(form, load, tmp_path):
    """CPU time is not compared: on a busy machine it is twice what it is on an idle one."""
    dense = stack(6, FORMS[form])
    packed = pack(dense, load=load)
    for made, taken in ((packed.model, packed.load.packed), (dense, packed.load.dense)):
        opened = load_in_fresh_process(save(made, tmp_path / "m.onnx")[0])
        assert taken.peak_nbytes == pytest.approx(opened.peak_rss_bytes, rel=0.35)


def test_a_model_that_stays_dense_costs_what_it_did():
    packed = pack(times(np.float32(np.random.default_rng(1).normal(size=(9, 9)))), load="fast")
    assert packed.load.packed == packed.load.dense and not packed.load.is_heavy
    assert "times those of" not in str(packed.load)


# --- the warning ---


def test_a_load_of_twice_the_cost_is_warned_of_where_it_is_felt():
    dense = LoadCost(10.0, 60_000_000)
    tiny = Prediction(LoadCost(10.0 + WARN_MS - 1, 60_000_000), dense)
    slow = Prediction(LoadCost(10.0 + WARN_MS, 60_000_000), dense)
    large = Prediction(LoadCost(10.0, 121_000_000), dense)
    assert not tiny.is_heavy and slow.is_heavy and large.is_heavy
    assert not Prediction(LoadCost(1990.0, 0), LoadCost(1000.0, 60_000_000)).is_heavy
    assert tiny.warning(UNPACK) == ""
    assert slow.warning(UNPACK) == (
        "a load takes about 60 ms of CPU time and 60 MB of memory, 6.0 and 1.0 times those of the "
        f"dense file (10 ms of CPU time and 60 MB of memory); {UNPACK}"
    )


@pytest.mark.parametrize(
    ("weight", "load", "advised"),
    [
        (LEVELS, "small", "balanced"),
        (FLOATS, "small", "balanced"),
        (FLOATS, "balanced", "fast"),
        (LEVELS, "balanced", "fast"),
        (LEVELS[:300], "small", "fast"),
    ],
)
def test_what_is_advised_takes_less(weight, load, advised):
    dense = times(weight)
    packed = pack(dense, load=load)
    other = lighter(packed.load, packed.rows, entropy_coded=True)
    assert other == advised
    if advised:
        then = pack(dense, load=advised).load.packed
        assert then.cpu_ms < 0.7 * packed.load.packed.cpu_ms
        assert then.peak_nbytes < packed.load.packed.peak_nbytes
    found = inspect(packed.model)
    if packed.load.is_heavy:
        assert (f"--load {advised}" if advised else UNPACK) in found.load_warning
    else:
        assert not found.load_warning
