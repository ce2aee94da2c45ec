"""`compress` continued, also after kill -9, or started again."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from quick import QUICK

from prune2onnx import compress, resolve
from prune2onnx.commands.compress import _alone
from prune2onnx.errors import RecipeError
from prune2onnx.runs.folder import recipe_of
from prune2onnx.runs.history import Callbacks
from prune2onnx.training import checkpoint


def test_a_finished_run_can_be_continued_and_a_model_shared_between_calls_is_not_spoilt(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))\n"
        "def net(): return NET\n"
    )
    recipe = resolve({**QUICK, "model": f"{tmp_path / 'net.py'}:net"})
    report = compress(recipe, tmp_path / "run", cpu=True)
    assert report.density < 0.5
    first = (tmp_path / "run" / "model.onnx").read_bytes()
    again = compress(recipe, tmp_path / "run", cpu=True, resume=True)
    assert (tmp_path / "run" / "model.onnx").read_bytes() == first
    assert again.compressed.error == report.compressed.error


def test_overwriting_starts_again_without_old_checkpoints(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    epochs = []
    recipe = resolve(QUICK, {"seed": 3})
    compress(recipe, folder, cpu=True, overwrite=True, callbacks=Callbacks(on_epoch=epochs.append))
    assert len(epochs) == 14
    assert "seed: 3" in (folder / "recipe.yaml").read_text()


_KILL_IN = """
import os, signal, sys
from prune2onnx import compress, read_recipe, resolve
from prune2onnx.commands.compress import _alone
from prune2onnx.errors import RecipeError
from prune2onnx.runs.folder import recipe_of
from prune2onnx.runs.history import Callbacks
folder, phase = sys.argv[1:3]
resume = os.path.exists(folder)
recipe = recipe_of(folder) if resume else resolve(read_recipe(sys.argv[3]))
def kill(step):
    if step.phase == phase and step.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
compress(recipe, folder, cpu=True, resume=resume, callbacks=Callbacks(on_step=kill))
"""


def test_kill_9_in_each_phase_then_resume_gives_the_same_bytes(finished, tmp_path):
    whole, _ = finished
    folder = tmp_path / "killed"
    # as many threads as here: sums that are split differently round differently
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for phase in ("dense", "prune", "tune", "quantize"):
        arguments = [str(folder), phase, str(whole / "recipe.yaml")]
        command = [sys.executable, "-c", _KILL_IN, *arguments]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert not (folder / "model.onnx").exists()
    command = [sys.executable, "-m", "prune2onnx", "compress", "--resume", str(folder), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert (folder / "dense.onnx").read_bytes() == (whole / "dense.onnx").read_bytes()


def test_the_smallest_file_within_a_loss_is_searched_for_and_a_killed_search_continues(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "_LEAST_SECONDS", 0.0)  # so that each epoch is trained once
    prune = QUICK["prune"] | {"thresholds": "layer"}
    recipe = resolve({**QUICK, "prune": prune, "distill": 0, "max_drop": 40.0, "trials": 3})
    folder, epochs = tmp_path / "run", []

    class StoppedError(Exception):
        pass

    def stop(epoch):
        epochs.append(epoch)
        if len(epochs) == 4 + 10 + 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        compress(recipe, folder, cpu=True, callbacks=Callbacks(on_epoch=stop))
    rest: list[object] = []
    report = compress(
        recipe_of(folder), folder, cpu=True, resume=True, callbacks=Callbacks(on_epoch=rest.append)
    )
    assert len(epochs) + len(rest) == 4 + 3 * 10
    assert report.density < 0.07 * 0.6  # 40 points allow at least one halving
    assert report.validation["error"] - report.validation["dense_error"] == pytest.approx(
        report.budget[0].reached
    )


def test_a_folder_belongs_to_one_process_at_a_time(finished, tmp_path):
    """The second is refused before it removes anything; the first's end frees the folder."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from prune2onnx.commands.compress import _alone\n"
            "with _alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
            folder,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        before = sorted(path.name for path in folder.rglob("*"))
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RecipeError, match="another process is running it; wait"):
                compress(recipe_of(folder), folder, cpu=True, **options)
        assert sorted(path.name for path in folder.rglob("*")) == before
        holder.kill()
    with _alone(folder):
        pass
