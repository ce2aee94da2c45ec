"""A sweep: on the digits, and after an interruption; workers share runs, and none is done twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from sweep_worker import REPORT

from prune2onnx import Prune2OnnxError, RecipeError, resolve, sweep, sweep_of
from prune2onnx.cli.main import main
from prune2onnx.commands import sweep as sweeping
from prune2onnx.runs import storage
from prune2onnx.runs.front import DenseNetwork, Front, Point
from prune2onnx.runs.history import Callbacks
from prune2onnx.runs.pages.charts import front_picture
from prune2onnx.runs.report import Goal
from prune2onnx.runs.study import Study, public_url

EPOCHS = [f"--{phase}-epochs=1" for phase in ("dense", "prune", "tune", "quantize")]


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + str(result.exception)
    return result


def done(limit: int, seed: int, nbytes: int, validation: float, met: bool = True) -> Point:
    return Point(
        "size", limit, seed, "done", nbytes, 2 * validation, validation, 0.5, 0.4, 0.03, 9.0, met
    )


# -- a whole sweep -----------------------------------------------------------------------------


@pytest.fixture
def net(tmp_path) -> str:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(\n"
        "    nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))\n"
    )
    return f"{tmp_path / 'net.py'}:net"


def test_a_sweep_is_interrupted_continued_and_reported(net, tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.runtime.latency._LOADS", 1)
    monkeypatch.setattr("prune2onnx.runtime.latency._RUNS", 20)
    folder = tmp_path / "front"
    whole = sweeping.compress
    epochs = []

    def interrupted(*arguments, callbacks, **options):
        def stop(epoch):
            epochs.append(epoch)
            if epoch.phase == "tune":
                raise KeyboardInterrupt

        return whole(*arguments, callbacks=Callbacks(on_epoch=stop), **options)

    monkeypatch.setattr(sweeping, "compress", interrupted)
    budgets = ["--sizes", "2.5KB, 300", *EPOCHS, "--cpu"]
    result = run("sweep", net, "-o", folder, *budgets, status=130)
    assert f"continue with: prune2onnx sweep --resume {folder}" in result.stderr
    assert [epoch.phase for epoch in epochs] == ["prune", "tune"]
    before = (folder / "dense-seed0" / "dense.safetensors").stat().st_mtime_ns

    def counted(*arguments, callbacks, **options):
        return whole(*arguments, callbacks=Callbacks(on_epoch=epochs.append), **options)

    monkeypatch.setattr(sweeping, "compress", counted)
    epochs.clear()
    result = run("sweep", "--resume", folder, "--cpu", "--json", status=3)
    assert [epoch.phase for epoch in epochs] == ["quantize", "prune", "tune", "quantize"]
    assert (folder / "dense-seed0" / "dense.safetensors").stat().st_mtime_ns == before
    assert "1 of 2 runs missed their budget: size-300-seed0" in result.stderr
    assert "2,500 bytes" in result.stderr and "test error" in result.stderr

    front = json.loads(result.stdout)
    assert front == json.loads((folder / "front.json").read_text())
    small, large = front["points"]
    assert (small["limit"], small["met"], large["limit"], large["met"]) == (300, False, 2500, True)
    assert small["message"].startswith("size ") and "missed by" in small["message"]
    for point in (small, large):
        report = json.loads((folder / point["folder"] / "report.json").read_text())
        assert point["nbytes"] == (folder / point["folder"] / "model.onnx").stat().st_size
        assert (point["error"], point["drop"]) == (report["compressed"]["error"], report["drop"])
        assert point["validation_error"] == report["validation"]["error"]
        assert front["dense"][0]["error"] == report["dense"]["error"]
        assert point["seconds"] > 0
    assert small["pareto"]  # nothing is smaller
    assert large["pareto"] == (large["validation_error"] < small["validation_error"])
    assert "<svg" in (folder / "front.svg").read_text()
    assert "holds a sweep already" in run("sweep", net, "-o", folder, *budgets, status=2).stderr


# -- the front ---------------------------------------------------------------------------------


def test_files_that_another_beats_are_not_pareto_optimal():
    points = (
        done(9, 0, 900, 1.0),
        done(8, 0, 800, 3.0, met=False),  # missed its budget, yet nothing is as small
        done(8, 1, 850, 3.0),  # larger than another of the same error
        done(9, 1, 900, 2.0),
        done(20, 0, 2000, 1.5),
        done(20, 1, 2500, 0.5),
        Point("drop", 0.1, 0, "failed", message="no luck"),
    )
    front = Front(points, (DenseNetwork(0, 9000, 1.0, 1.0),))
    assert [point.nbytes for point in front.pareto] == [800, 900, 2500]
    assert front.missed == (points[1],) and front.failed == (points[-1],)
    content = front.to_dict()
    assert [point["pareto"] for point in content["points"]].count(True) == 3
    nine = next(budget for budget in content["budgets"] if budget["limit"] == 9)
    assert nine["seeds"] == [0, 1] and nine["met"] == 2
    assert nine["validation_error"] == {"mean": 1.5, "spread": pytest.approx(0.5**0.5)}
    assert content["budgets"][-1]["nbytes"] is None


def test_the_picture_is_the_same_for_the_same_front():
    points = (done(9, 0, 900, 1.0), done(9, 1, 950, 1.1, met=False))
    front = Front(points, (DenseNetwork(0, 9000, 1.0, 1.0),))
    assert front_picture(front) == front_picture(front)
    text = front_picture(front).decode()
    for label in ("seed 0", "budget missed", "dense, 9.0 kB", "file (kB, log scale)"):
        assert f">{label}<" in text
    assert "dc:date" not in text


# -- many workers ------------------------------------------------------------------------------


def pretend(log: Path, seconds: float, act=lambda name: None) -> None:
    """Replaces runs by an entry in a log, and a short wait."""

    def compress(recipe, directory, **_):
        with log.open("a") as stream:
            stream.write(f"{directory.name} {os.getpid()}\n")
        time.sleep(seconds)
        act(directory.name)
        goal = Goal("size", float(recipe.target_size or 9999), 1000)
        return dataclasses.replace(REPORT, budget=(goal,))

    sweeping.compress = compress
    sweeping.train_dense = lambda _, folder, **__: folder / "dense.safetensors"
    sweeping.prepared = lambda _: None
    sweeping._POLL = 0.05


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The log of runs; undoes what `pretend` replaces."""
    for name in ("compress", "train_dense", "prepared", "_POLL"):
        monkeypatch.setattr(sweeping, name, getattr(sweeping, name))
    path = tmp_path / "log"
    pretend(path, 0)
    return path


RECIPE = resolve({"model": "unused:unused"})
SIZES = {"sizes": (500, 2000, 3000, 4000), "seeds": (0, 1)}
NAMES = sorted(f"size-{size}-seed{seed}" for size in SIZES["sizes"] for seed in SIZES["seeds"])


def runs(log: Path) -> list[str]:
    return sorted(line.split()[0] for line in log.read_text().splitlines())


KILLED = """
import os, signal, sys
from pathlib import Path
folder, log, tests = map(Path, sys.argv[1:])
sys.path[:0] = [str(tests / "commands"), str(tests / "support")]
import test_sweep as t
def kill(name):
    if len(t.runs(log)) >= 3 and f"{name} {os.getpid()}" in log.read_text():
        os.kill(os.getpid(), signal.SIGKILL)
t.pretend(log, 0.3, kill)
t.sweep(t.RECIPE, folder, **t.SIZES)
"""


def test_two_processes_share_the_runs_and_one_takes_over_from_a_killed_one(log, tmp_path):
    folder = tmp_path / "sweep"
    tests = Path(__file__).parents[1]
    other = subprocess.Popen([sys.executable, "-c", KILLED, folder, log, tests])
    while not log.exists():
        assert other.poll() is None
        time.sleep(0.02)
    pretend(log, 0.3)
    front = sweep(**sweep_of(folder), directory=folder, resume=True)
    assert other.wait(timeout=60) == -signal.SIGKILL
    lines = log.read_text().splitlines()
    last = [line for line in lines if line.endswith(f" {other.pid}")][-1].split()[0]
    assert runs(log) == sorted([*NAMES, last])  # it was started twice, the others once
    assert {line.split()[1] for line in lines} == {str(other.pid), str(os.getpid())}
    assert len(front.done) == 8 and len(front.missed) == 2
    assert (folder / "front.json").read_text() == front.to_json()


def test_a_run_without_a_heartbeat_is_done_again(log, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "GRACE", 1)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    settings = sweeping._Settings(recipe=RECIPE, sizes=(2000, 3000))
    lost = Study(url, "prune2onnx", RECIPE, tmp_path / "elsewhere")
    lost.add(settings.runs, again=False)
    claim = lost.claim()
    assert claim.point.name == "size-2000-seed0"
    front = sweep(RECIPE, tmp_path / "here", storage=url, sizes=(2000, 3000))
    assert len(front.done) == 2 and runs(log) == ["size-2000-seed0", "size-3000-seed0"]
    lost.finish(claim, Prune2OnnxError("awake again"))  # too late to count
    assert lost.front() == front
    lost.close()


def test_a_running_run_of_the_same_folder_is_waited_for(log, tmp_path):
    settings = sweeping._Settings(recipe=RECIPE, sizes=(2000,))
    url = f"sqlite:///{tmp_path / 'sweep' / 'sweep.db'}"
    shared = Study(url, "prune2onnx", RECIPE, tmp_path / "sweep")
    shared.add(settings.runs, again=False)
    claim = shared.claim()
    assert shared.claim() is None

    def finish():
        shared.finish(claim, dataclasses.replace(REPORT, density=0.5))
        claim.lock.release()

    notes = []
    later = threading.Timer(0.5, finish)
    later.start()
    front = sweep(RECIPE, tmp_path / "sweep", sizes=(2000,), on_note=notes.append)
    later.join()
    assert notes == ["waiting for size-2000-seed0, run by other workers"]
    assert front.points[0].density == 0.5 and not log.exists()
    shared.close()


# -- errors ------------------------------------------------------------------------------------


def test_a_failed_run_is_reported_the_rest_is_done_and_resume_tries_again(log, tmp_path):
    def fail(name):
        if name == "size-2000-seed0":
            raise Prune2OnnxError("no luck")

    pretend(log, 0, fail)
    points = []
    folder = tmp_path / "sweep"
    front = sweep(RECIPE, folder, sizes=(2000, 3000), on_point=points.append)
    assert [(p.name, p.state, p.message) for p in points] == [
        ("size-2000-seed0", "failed", "no luck"),
        ("size-3000-seed0", "done", ""),
    ]
    assert front.failed == (points[0],)
    result = run("sweep", "--resume", folder, "--json", status=1)
    assert "1 of 2 runs failed: size-2000-seed0: no luck" in result.stderr
    assert json.loads(result.stdout)["points"][0]["message"] == "no luck"
    pretend(log, 0)
    assert len(json.loads(run("sweep", "--resume", folder, "--json").stdout)["points"]) == 2
    assert runs(log) == 3 * ["size-2000-seed0"] + ["size-3000-seed0"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "no budget to sweep; give some with --sizes 6KB,10KB"),
        (["--sizes", ""], "sizes holds '': could not parse"),
        (["--sizes", "6KB,tiny"], "sizes holds 'tiny': .*; expected such as 6KB,10KB"),
        (["--densities", "0.1,3"], "densities holds '3': .*; expected such as 0.01,0.03"),
        (["--drops", "-1"], "drops holds '-1': .*; expected such as 0.1,0.3"),
        (["--sizes", "6KB", "--seeds", "x"], "seeds holds 'x': .*; expected such as 0,1,2"),
        (["--sizes", "6KB", "--storage", "nothing"], "storage is 'nothing', expected a URL"),
        (["--sizes", "6KB", "--target-size", "9KB"], "No such option"),
    ],
)
def test_invalid_settings_are_an_error(log, tmp_path, options, says):
    result = run("sweep", "unused:unused", "-o", tmp_path / "sweep", *options, status=2)
    assert pytest.raises(AssertionError, match=says).matches(AssertionError(result.stderr))
    assert not (tmp_path / "sweep" / "sweep.yaml").exists() and not log.exists()


def test_a_storage_that_cannot_be_used_is_one_clear_error(log, tmp_path):
    (tmp_path / "no.db").write_text("this is no database, however long it may be" * 99)
    for url, says in (
        (f"sqlite:///{tmp_path}/none/x.db", "unable to open database file"),
        (f"sqlite:///{tmp_path}/no.db", "file is not a database"),
        ("postgresql://me:secret@nowhere.invalid/x", "the sweep's storage cannot be used"),
        ("oracle://me:secret@nowhere.invalid/x", "No module named 'oracledb'; install that driver"),
        ("nosuch://me:secret@nowhere.invalid/x", "storage cannot be used|expected a URL"),
    ):
        with pytest.raises(Prune2OnnxError, match=says) as caught:
            sweep(RECIPE, tmp_path / "sweep", sizes=(2000,), storage=url)
        assert "secret" not in str(caught.value)
    assert not (tmp_path / "sweep" / "sweep.yaml").exists()


@pytest.mark.parametrize("url", ["postgresql://me@nowhere/x", "postgresql+psycopg://me@nowhere/x"])
def test_a_missing_driver_is_named_with_what_to_install(log, tmp_path, monkeypatch, url):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    says = r"psycopg.*; install the driver with pip install 'prune2onnx\[postgresql\]'$"
    with pytest.raises(Prune2OnnxError, match=says):
        sweep(RECIPE, tmp_path / "sweep", sizes=(2000,), storage=url)


def test_a_run_that_lost_its_worker_is_queued_once_by_those_who_notice(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "GRACE", 1)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    lost, *others = (Study(url, "prune2onnx", RECIPE, tmp_path / str(i)) for i in range(4))
    lost.add([Point("size", 2000, 0)], again=False)
    trial = lost.claim()
    threads = [threading.Thread(target=each.claim) for each in others]
    deadline = time.monotonic() + 30
    while lost._storage._get_stale_trial_ids(lost._id) == [] and time.monotonic() < deadline:
        time.sleep(0.1)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = sorted(trial.state.name for trial in lost._trials())
    assert trial is not None and states == ["FAIL", "RUNNING"]
    for each in (lost, *others):
        each.close()


def test_a_folder_or_study_of_another_sweep_is_refused(log, tmp_path):
    folder, url = tmp_path / "sweep", f"sqlite:///{tmp_path / 'shared.db'}"
    with pytest.raises(RecipeError, match="so no sweep to continue"):
        sweep(RECIPE, folder, sizes=(2000,), resume=True)
    sweep(RECIPE, folder, sizes=(2000,), storage=url)
    with pytest.raises(RecipeError, match="holds a sweep with other settings"):
        sweep(RECIPE, folder, sizes=(3000,), storage=url, resume=True)
    other = resolve({"model": "unused:unused", "batch_size": 32})
    with pytest.raises(RecipeError, match=r"another sweep, with another batch_size; .* --study"):
        sweep(other, tmp_path / "other", sizes=(2000,), storage=url)
    assert sweep(other, tmp_path / "other", sizes=(2000,), storage=url, study="other").done
    result = run("sweep", "--resume", folder, "--sizes", "1KB", status=2)
    assert "give it alone" in result.stderr
    (folder / "sweep.yaml").write_text("sizes: [1]\n")
    assert "recipe is missing" in run("sweep", "--resume", folder, status=2).stderr


def test_a_password_is_not_stored(tmp_path):
    assert public_url("mysql://me:secret@host/x") == "mysql://me:***@host/x"
    settings = sweeping._Settings(recipe=RECIPE, sizes=(2000,)).model_dump(mode="json")
    settings["storage"] = "mysql://me:***@host/x"
    (tmp_path / "sweep.yaml").write_text(json.dumps(settings))
    with pytest.raises(
        RecipeError, match=r"the password of mysql://me:\*\*\*@host/x is not stored"
    ):
        sweep_of(tmp_path)
    assert sweep_of(tmp_path, "mysql://me:secret@host/x")["storage"].endswith("secret@host/x")


def test_a_recipes_own_budgets_are_ignored_with_a_note(log, tmp_path):
    (tmp_path / "r.yaml").write_text("model: unused:unused\ntarget_size: 8KB\nseed: 7\n")
    recipe, folder = tmp_path / "r.yaml", tmp_path / "sweep"
    result = run("sweep", "--recipe", recipe, "-o", folder, "--densities", "0.1")
    assert "target_size is ignored" in result.stderr
    assert runs(log) == ["density-0.1-seed7"]


def test_many_processes_of_one_training_are_refused(log, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process per run"):
        sweep(RECIPE, tmp_path, sizes=(2000,))
