"""Calibration that is interrupted: what is done is kept, and the same command goes on."""

import numpy as np
import onnx
import pytest
from examples import convnet, images

from prune2onnx.commands.pack import pack_file
from prune2onnx.packing.calibration import journal
from prune2onnx.packing.calibration.calibrate import Calibration
from prune2onnx.runs.defaults import InputOptions, PackOptions


@pytest.fixture
def given(tmp_path):
    onnx.save(convnet(), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=images(96, 0))
    inputs = InputOptions(f"npz:{tmp_path / 'data.npz'}")

    def pack(name: str = "out.onnx", **options):
        return pack_file(
            tmp_path / "in.onnx", tmp_path / name, PackOptions(inputs=inputs, **options)
        )

    return pack


def stopped_after(count: int, monkeypatch) -> list[str]:
    """Lets calibration end after so many layers; gives the list of those that are calibrated."""
    done: list[str] = []
    real = Calibration._compressed

    def counted(self, layer, found, slope):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(layer.name)
        return real(self, layer, found, slope)

    monkeypatch.setattr(Calibration, "_compressed", counted)
    return done


def hidden(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize(
    ("options", "count"),
    [({"max_error": 0.1}, 6), ({"bits": 3.0}, 3), ({"channels": 0.3, "bits": 4.0}, 6)],
)
def test_a_run_that_goes_on_gives_the_same_file(options, count, given, tmp_path, monkeypatch):
    given("whole.onnx", **options)
    monkeypatch.setattr(journal, "_WORTH_KEEPING", 0.0)
    with monkeypatch.context() as patched:
        stopped_after(count, patched)
        with pytest.raises(KeyboardInterrupt):
            given(**options)
    assert not (tmp_path / "out.onnx").exists() and hidden(tmp_path) == [".out.onnx.calibration"]
    done = stopped_after(1000, monkeypatch)
    result = given(**options)
    again = len(done)
    done.clear()
    given("third.onnx", **options)
    assert again == len(done) - count
    assert "continued: an interrupted run had done a part of this" in result.notes
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert hidden(tmp_path) == []


def test_an_interruption_in_the_first_minute_leaves_nothing(given, tmp_path, monkeypatch):
    stopped_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        given(bits=3.0)
    assert hidden(tmp_path) == [] and not (tmp_path / "out.onnx").exists()


def test_what_was_done_for_other_options_or_is_damaged_is_done_again(given, tmp_path, monkeypatch):
    given("whole.onnx", bits=3.0)
    monkeypatch.setattr(journal, "_WORTH_KEEPING", 0.0)
    with monkeypatch.context() as patched:
        stopped_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            given(bits=4.0)
    with monkeypatch.context() as patched:
        stopped_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            given(bits=3.0)
    for path in (tmp_path / ".out.onnx.calibration").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    result = given(bits=3.0)
    assert not any(note.startswith("continued") for note in result.notes)
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert hidden(tmp_path) == []
