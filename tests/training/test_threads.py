"""The number of threads to train with, and memory that is kept."""

import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from prune2onnx import fit, resolve
from prune2onnx.training import fit as fitting
from prune2onnx.training.cpu import threads as module
from prune2onnx.training.cpu.threads import faster, may_choose, threads


@pytest.fixture
def two():
    with threads(2):
        yield


def takes(milliseconds: dict[int, float]):
    """A step that takes a known time with each number of threads."""
    return lambda: time.sleep(milliseconds[torch.get_num_threads()] / 1000)


@pytest.mark.parametrize(
    "milliseconds, expected", [({1: 4, 2: 9}, 1), ({1: 20, 2: 19}, 1), ({1: 20, 2: 10}, 2)]
)
def test_more_threads_are_taken_only_if_they_make_steps_faster(two, milliseconds, expected):
    assert faster(takes(milliseconds)) == expected
    assert torch.get_num_threads() == 2


def test_slow_steps_are_timed_once(two, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    calls = []
    faster(lambda: calls.append(torch.get_num_threads()))
    assert calls == [2, 1, 2]


def test_who_has_chosen_a_number_keeps_it(two, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert may_choose()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not may_choose()
    monkeypatch.delenv("OMP_NUM_THREADS")
    with threads(1):
        assert not may_choose()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_run_that_is_continued_has_the_threads_of_its_beginning(
    two, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []
    monkeypatch.setattr(fitting, "faster", lambda step: seen.append(step()) or 1)
    recipe = resolve({"model": "none", "dense": {"epochs": 1}})

    def run(*, resume: bool) -> None:
        fit(network(), tiny_data, recipe, checkpoints=tmp_path, resume=resume, stop="dense")

    run(resume=False)
    run(resume=True)
    assert len(seen) == 1  # the second read the file
    assert (tmp_path / fitting.THREADS).read_text() == "1\n"
    run(resume=False)
    assert len(seen) == 2
    assert torch.get_num_threads() == 2


def test_waiting_threads_of_the_command_sleep():
    code = "import prune2onnx.__main__, os; print(os.environ['OMP_WAIT_POLICY'])"
    for given in ("", "ACTIVE"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == (given or "PASSIVE"), done.stderr
