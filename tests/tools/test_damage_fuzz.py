"""The judge of tools/damage_fuzz.py finds what is wrong, and a worker that dies is replaced."""

import signal
from random import Random

import damage_fuzz
import numpy as np
import onnx
import pytest
from damage import MODEL, Original, damaged, models_of, originals
from networks import mlp

from prune2onnx.packing.pack import pack

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="limits of POSIX")


def test_a_weight_that_differs_is_found(tmp_path):
    packed = pack(mlp()).model
    original = Original("packed", {MODEL: packed.SerializeToString()})
    wanted = damage_fuzz.expected(original, tmp_path)
    assert set(wanted["bits"]) == set(packed.graph.node[0].output)
    assert damage_fuzz._equal(wanted["bits"], wanted["bits"])[0] == "accepted, weights compared"
    name = next(iter(wanted["bits"]))
    assert damage_fuzz._equal({name: "other"}, wanted["bits"])[0] == "WRONG"


def test_outputs_that_differ_are_found(tmp_path):
    given, other = mlp(), mlp()
    onnx.save(given, tmp_path / MODEL)
    assert damage_fuzz._same_outputs(tmp_path / MODEL, other)[0] == "accepted, outputs compared"
    bias = other.graph.initializer[1]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.ones(bias.dims[0], np.float32), bias.name))
    assert damage_fuzz._same_outputs(tmp_path / MODEL, other)[0] == "WRONG"


def test_an_error_that_is_not_the_projects_and_a_long_one_are_found(tmp_path, monkeypatch):
    onnx.save(mlp(), tmp_path / MODEL)

    def ends(error: BaseException) -> str:
        def failing(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("prune2onnx.packing.unpack.read", failing)
        return damage_fuzz.outcome("inspect", tmp_path, [])[0]

    assert ends(ValueError("x")) == "crashed" and ends(MemoryError()) == "memory"
    assert ends(damage_fuzz.MismatchError("x")) == "badly refused"
    assert ends(damage_fuzz.Prune2OnnxError("x")) == "refused"


def test_a_worker_that_dies_is_counted_and_replaced(tmp_path):
    onnx.save(mlp(), tmp_path / MODEL)
    (tmp_path.parent / "weights.json").write_text("{}")
    worker = damage_fuzz.Worker()
    assert worker.run("unpack", tmp_path / "nowhere", [])[0] == "refused"
    worker._process.send_signal(signal.SIGSEGV)
    worker._process.wait()
    assert worker.run("unpack", tmp_path, []) == ("crashed", "SIGSEGV")
    assert worker.run("unpack", tmp_path / "nowhere", [])[0] == "refused"
    worker.close()


def test_a_number_always_gives_the_same_damage():
    given = list(originals(random_graphs=1, every=100))
    lent = models_of(given)
    for number in range(20):
        first, again = (damaged(given[number % len(given)], Random(number), lent) for _ in "ab")
        assert first == again
