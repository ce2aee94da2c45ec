"""From a file to one that computes in int8 or int4: rates, calibration, kernels, messages."""

import json

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from networks import convnet, tokens
from onnx import TensorProto

from prune2onnx.cli.main import main
from prune2onnx.commands.compute.computing import Computing
from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.file import load, save
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runtime.benchmark import Timing
from prune2onnx.runtime.compare import output_error, run_all
from prune2onnx.runtime.folding import operators
from prune2onnx.runtime.inputs import random_inputs
from prune2onnx.runtime.validate import validate

ALL = ("int8", "int8-weights", "int4")
KERNELS = {
    "int8": {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"},
    "int8-weights": {"MatMulNBits"},
    "int4": {"MatMulNBits"},
}
FULL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


@pytest.fixture
def source(tmp_path):
    """A small language model, and text to calibrate with."""
    save(tokens(200, 64), tmp_path / "in.onnx")
    ids = np.random.default_rng(0).zipf(1.5, (120, 12)) % 200
    np.savez(tmp_path / "text.npz", ids=ids)
    return tmp_path / "in.onnx"


def text(source) -> InputOptions:
    return InputOptions(f"npz:{source.parent / 'text.npz'}")


@pytest.mark.parametrize("compute", ALL)
@pytest.mark.parametrize(("bits", "examples"), [(None, False), (4.0, False), (4.0, True)])
def test_a_packed_file_has_the_kernels_and_the_outputs_of_the_one_unpacked(
    source, compute, bits, examples
):
    target = source.parent / "out.onnx"
    inputs = text(source) if examples else InputOptions()
    pack_file(source, target, PackOptions(compute=compute, bits=bits, inputs=inputs))
    packed, plain = load(target), unpack(load(target))
    assert {"table", "w0", "w1", "w2", "w3"} <= {t.name for t in plain.graph.initializer}
    large = [t for t in plain.graph.initializer if np.prod(t.dims) > 2000]
    assert large and all(t.data_type in (TensorProto.INT8, TensorProto.UINT8) for t in large)
    found = operators(packed, FULL)
    assert found == operators(plain, FULL)
    names = {name.rpartition(":")[2] for name in found}
    assert names >= KERNELS[compute]
    x = random_inputs(plain, range(2))
    for a, b in zip(run_all(packed, x), run_all(plain, x), strict=True):
        assert all(np.array_equal(*each) for each in zip(a, b, strict=True))
    if bits:
        assert target.stat().st_size < source.stat().st_size / 4
    assert not validate(target).unfolded


def test_examples_help_int4(source):
    errors = []
    held = [{"ids": np.random.default_rng(9).zipf(1.5, (40, 12)) % 200}]
    for inputs in (InputOptions(), text(source)):
        target = source.parent / "out.onnx"
        pack_file(source, target, PackOptions(compute="int4", inputs=inputs))
        errors.append(output_error(load(source), held)(load(target)))
    assert errors[1] < errors[0]


def test_a_budget_holds_for_what_is_computed_in_int8(source):
    target = source.parent / "out.onnx"
    done = pack_file(
        source, target, PackOptions(compute="int8", max_error=0.08, inputs=text(source))
    )
    (goal,) = done.goals
    assert goal.met and goal.what == "error of the outputs"
    np.savez(source.parent / "held.npz", ids=np.load(source.parent / "text.npz")["ids"][::5])
    held = [{"ids": np.load(source.parent / "held.npz")["ids"]}]
    assert output_error(load(source), held)(load(target)) == pytest.approx(goal.reached, rel=0.2)


def test_more_bits_have_less_error(source):
    model, errors, sizes = load(source), [], []
    x = random_inputs(model, range(3))
    for bits in (2.5, 6.0):
        target = source.parent / "out.onnx"
        pack_file(source, target, PackOptions(compute="int8-weights", bits=bits))
        errors.append(output_error(model, x)(load(target)))
        sizes.append(target.stat().st_size)
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)


def timing(ratio: float) -> Timing:
    return Timing("after.onnx", 1, 0, 9, 1.0, 1.0, 1.0, 1.0, ratio, (ratio - 0.01, ratio + 0.01))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"int8": 0.5, "int8-weights": 0.4, "int4": 0.1}, "int8-weights"),
        ({"int8": 0.5, "int8-weights": 0.9, "int4": 0.1}, "int8"),
        ({"int8": 1.5, "int8-weights": 1.2, "int4": 0.1}, "float32"),
    ],
)
def test_auto_takes_what_is_fastest_within_the_error(source, monkeypatch, ratios, expected):
    """The times are pretended; the errors are measured: those of int4 are too large."""

    def timed(before, after, inputs):
        ops = {node.op_type for node in after.graph.node}
        return timing(ratios["int8" if "MatMulInteger" in ops else "int8-weights"])

    monkeypatch.setattr("prune2onnx.runtime.int8_choice.timed", timed)
    found = Computing(load(source), PackOptions(compute="auto"))
    assert found.compute == expected
    assert any("int4: the outputs' error would be" in note for note in found.notes)


def test_auto_measures_and_says_what_it_chose(source):
    target = source.parent / "out.onnx"
    options = PackOptions(compute="auto", max_error=0.5, inputs=text(source))
    done = pack_file(source, target, options)
    assert sum("of the time of float32" in note for note in done.notes) == 3


def test_nothing_to_narrow_is_said_and_nothing_changes(tmp_path):
    save(convnet(), tmp_path / "in.onnx")
    plain = pack_file(tmp_path / "in.onnx", tmp_path / "plain.onnx")
    for compute in ("int8", "auto"):
        target = tmp_path / "out.onnx"
        done = pack_file(tmp_path / "in.onnx", target, PackOptions(compute=compute))
        assert target.read_bytes() == (tmp_path / "plain.onnx").read_bytes()
        assert any("no matrix" in note for note in done.notes)
    assert not any("matrix" in note for note in plain.notes)


def test_the_command_line_shows_what_computes_in_what(source):
    arguments = ["pack", str(source), str(source.parent / "out.onnx"), "--compute", "int8"]
    done = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert {layer["compute"] for layer in found["layers"]} == {"int8"}
    assert any("relative error of the outputs" in note for note in found["notes"])
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "5 of 5 matrices compute in int8 (100.0%)" in done.output
