"""Networks that are calibrated: less error for equal bits, zeros, tables, and any graph at all."""

from dataclasses import replace

import networks
import numpy as np
import pytest
from examples import BATCHES, HELD, convnet, images
from onnx import TensorProto, helper
from random_graphs import graph

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.normalize import normalize
from prune2onnx.packing.approximation.approximate import approximate
from prune2onnx.packing.calibration.budget import Trial, of_bits, of_error, of_size, search
from prune2onnx.packing.calibration.calibrate import Calibration
from prune2onnx.packing.calibration.zeros import Pattern
from prune2onnx.packing.quantized import Quantized
from prune2onnx.runtime.compare import output_error, run_all


def calibrated(model, pattern=None, slope=1e-6):
    return Calibration(model, BATCHES, run_all, pattern=pattern).at(slope)


def test_less_error_than_without_examples_for_equal_bits():
    model = convnet()
    error = output_error(model, HELD)
    subject = Calibration(model, BATCHES, run_all)
    made = subject.at(subject.slope(3))
    without = approximate(model, bits=made.bits)
    assert made.bits < 4 and error(made.model) < 0.6 * error(without.model)
    assert {row.how for row in made.rows} == {"calibrated grid", "shifted", "float16"}


def test_what_is_made_is_deterministic_and_has_codes():
    model = convnet()
    made, again = calibrated(model), calibrated(model)
    assert made.model == again.model and made.rows == again.rows
    stored = {tensor.name: tensor for tensor in made.model.graph.initializer}
    for name, known in made.quantized.items():
        assert isinstance(known, Quantized)
        assert stored[name].raw_data == known.dense().tobytes()
    assert set(made.quantized) == {"a.w", "b.w", "c.w", "d.w"}


@pytest.mark.parametrize("pattern", [None, Pattern(0.5), Pattern(channels=0.3)])
def test_weights_that_are_on_a_grid_already(pattern):
    """Their exact form is a grid, too, and takes few bits."""
    model = convnet()
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".w"):
            array = np.frombuffer(tensor.raw_data, np.float32)
            tensor.raw_data = (np.rint(array * 16) / 16).astype(np.float32).tobytes()
    for slope in (None, 1e-9, 1e-5):
        made = calibrated(model, pattern, slope)
        stored = {tensor.name: tensor for tensor in made.model.graph.initializer}
        for name, known in made.quantized.items():
            assert stored[name].raw_data == known.dense().tobytes()
        assert made.bits < 5 or slope is None


def test_an_outlier_makes_its_own_output_coarser_and_no_other():
    model = convnet()
    error = output_error(model, HELD)
    before = calibrated(model, slope=1e-7)
    (weight,) = (t for t in model.graph.initializer if t.name == "c.w")
    array = np.frombuffer(weight.raw_data, np.float32).reshape(32, -1).copy()
    array[3, 7] = 300 * array.std()
    weight.raw_data = array.tobytes()
    made = calibrated(model, slope=1e-7)
    steps = made.quantized["c.w"].scale
    assert steps.size == 32 and np.sort(steps.reshape(-1))[-1] > 2 * np.median(steps)
    assert np.sort(steps.reshape(-1))[-2] < 2 * np.median(steps)
    assert made.bits < before.bits + 1 and output_error(model, HELD)(made.model) < 0.05
    assert error(before.model) < 0.05


def test_biases_take_up_the_difference_of_means():
    model = convnet()
    made = calibrated(model, slope=1e-4)
    (got,), (want,) = (run_all(m, [{"x": images(96, 0)}])[0] for m in (made.model, model))
    spread = want.std(0)
    assert (np.abs(got.mean(0) - want.mean(0)) < 0.05 * spread).all()


def test_finer_slopes_have_less_error_and_more_bits():
    model = convnet()
    error = output_error(model, HELD)
    subject = Calibration(model, BATCHES, run_all)
    made = [subject.at(subject.slope(4) * 4.0**octave) for octave in range(4)]
    errors, bits = [error(one.model) for one in made], [one.bits for one in made]
    assert errors == sorted(errors) and bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("slope", [None, 1e-6])
def test_a_fraction_becomes_zero_and_the_rest_makes_up_for_it(slope):
    model = convnet()
    error = output_error(model, HELD)
    made = calibrated(model, Pattern(0.5), slope)
    own = [row for row in made.rows if len(row.shape) > 1]
    zeros = 1 - sum(row.nnz for row in own) / sum(row.size for row in own)
    assert zeros == pytest.approx(0.5, abs=0.02) or slope
    assert zeros > 0.48
    assert error(made.model) < 0.6 * error(approximate(model, prune=0.5).model)


def test_two_of_four_neighbours_stay():
    made = calibrated(convnet(), Pattern(0.5, (2, 4)), None)
    (weight,) = (t for t in made.model.graph.initializer if t.name == "c.w")
    array = np.frombuffer(weight.raw_data, np.float32).reshape(32, -1, 4)
    assert ((array != 0).sum(2) <= 2).all() and (array != 0).mean() > 0.45


@pytest.mark.parametrize("blocks", [(4, 1), (1, 4), (3, 8)])
def test_blocks_become_zero_as_a_whole(blocks):
    model = convnet()
    error = output_error(model, HELD)
    made = calibrated(model, Pattern(0.5, blocks=blocks), None)
    (weight,) = (t for t in made.model.graph.initializer if t.name == "c.w")
    array = np.frombuffer(weight.raw_data, np.float32).reshape(32, -1)
    outputs, inputs = blocks
    whole = array[: 32 // outputs * outputs, : array.shape[1] // inputs * inputs]
    parts = whole.reshape(32 // outputs, outputs, -1, inputs).swapaxes(1, 2)
    counts = (parts != 0).sum((2, 3))
    assert np.isin(counts, [0, outputs * inputs]).all() and (counts == 0).any()
    own = [row for row in made.rows if len(row.shape) > 1]
    assert sum(row.nnz for row in own) / sum(row.size for row in own) == pytest.approx(
        0.5, abs=0.05
    )
    alone = error(calibrated(model, Pattern(0.5), None).model)
    assert alone < error(made.model) < 0.9


def test_tables_recurrent_layers_and_attention():
    """Tokens through a table, an LSTM, and self-attention."""
    rng = np.random.default_rng(0)
    size = 16
    shapes = {"e": (50, size), "w": (1, 4 * size, size), "r": (1, 4 * size, size)}
    shapes |= dict.fromkeys(("q", "k", "v", "o"), (size, size))
    weights = {n: rng.normal(0, s[-1] ** -0.5, s).astype(np.float32) for n, s in shapes.items()}
    nodes = [
        helper.make_node("Gather", ["e", "x"], ["g"]),
        helper.make_node("LSTM", ["g", "w", "r"], ["l"], hidden_size=size),
        helper.make_node("Squeeze", ["l", "one"], ["s"]),
        *(helper.make_node("MatMul", ["s", n], [f"{n}.m"]) for n in "qkv"),
        helper.make_node("Transpose", ["k.m"], ["k.t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q.m", "k.t"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v.m"], ["a"]),
        helper.make_node("MatMul", ["a", "o"], ["y"]),
    ]
    weights["one"] = np.array([1])
    model = networks.model(nodes, weights, {}, {"y": ["T", "N", size]})
    model.graph.input.append(networks.value("x", ["T", "N"], TensorProto.INT64))
    batches = [{"x": rng.integers(0, 50, (9, 4))} for _ in range(8)]
    error = output_error(model, batches[-2:])
    subject = Calibration(model, batches[:-2], run_all)
    assert set(subject.names) == {"e", "w", "r", "q", "k", "v", "o"}
    made = subject.at(subject.slope(3.5))
    pruned = Calibration(model, batches[:-2], run_all, pattern=Pattern(0.5)).at(None)
    zeros = {row.name: 1 - row.nnz / row.size for row in pruned.rows}
    assert zeros["e"] == 0 and min(zeros[name] for name in "wrqkvo") > 0.2
    assert error(made.model) < error(approximate(model, bits=made.bits).model)


def test_any_graph_can_be_calibrated():
    changed = 0
    for seed in range(40):
        made, inputs = graph(seed)
        try:
            model = normalize(made).model
            batches = [inputs, inputs]
            run_all(model, batches)
        except Prune2OnnxError:
            continue
        subject = Calibration(model, batches, run_all)
        found = subject.at(1e-5)
        outputs = run_all(found.model, batches)
        assert len(outputs) == 2
        changed += bool(found.quantized)
    assert changed > 10


# --- budgets ---


def pretend(slope: float) -> Trial:
    """Bits fall by a half for each octave of the slope, and the error rises."""
    octaves = np.log2(slope) + 20
    bits = 5 - 0.5 * octaves
    return Trial(slope, bits, int(1000 * bits), 0.01 * 2 ** (0.45 * octaves))


@pytest.mark.parametrize("start", [2.0**-24, 2.0**-20, 2.0**-14])
def test_a_search_meets_each_budget_closely(start):
    found = search(pretend, start, of_error(0.02), 8)
    assert 0.96 * 0.02 < found[-1].error <= 0.02
    found = search(pretend, start, of_size(3000), 8)
    assert 2950 < found[-1].nbytes <= 3000
    found = search(pretend, start, of_bits(4), 8)
    assert 3.95 < found[-1].bits <= 4


def test_a_search_goes_on_where_trials_are_noisy():
    def noisy(slope: float) -> Trial:
        made = pretend(slope)
        jump = 1.1 if int(np.log2(slope) * 7) % 2 else 0.9
        return replace(made, error=made.error * jump)

    found = search(noisy, 2.0**-22, of_error(0.02), 10)
    assert min(abs(np.log2(one.error / 0.02)) for one in found) < 0.3
