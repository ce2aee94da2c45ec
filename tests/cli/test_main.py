"""The command line: what is printed where, exit statuses, and one clear line for bad input."""

import dataclasses
import gzip
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import networks
import numpy as np
import pytest
from click.testing import CliRunner
from places import ROOT
from rich.console import Console
from tiny import tiny_mlp
from torch import nn

from prune2onnx.cli.main import main
from prune2onnx.cli.options import BUDGET, DATA, FIRST, MODEL, PHASE
from prune2onnx.cli.output import progress
from prune2onnx.graph.file import load, save
from prune2onnx.pruning import prune
from prune2onnx.runs.history import Epoch, TrialStart
from prune2onnx.runs.recipe import settings
from prune2onnx.runtime.folding import Folding
from prune2onnx.training.export import export

LENET = f"{ROOT / 'models' / 'lenet.py'}:lenet_300_100"
EPOCHS = [f"--{phase}-epochs=2" for phase in ("dense", "prune", "tune", "quantize")]


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + str(result.exception)
    return result


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """Fewer measurements: test_validate tests them."""
    monkeypatch.setattr("prune2onnx.runtime.latency._LOADS", 1)
    monkeypatch.setattr("prune2onnx.runtime.latency._RUNS", 20)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense ONNX file whose weights have few distinct values."""
    model = tiny_mlp()
    for parameter in model.parameters():
        parameter.data = (parameter.data * 8).round() / 8
    path = tmp_path_factory.mktemp("onnx") / "dense.onnx"
    path.write_bytes(export(model, (1, 6, 6)).SerializeToString())
    return path


def test_pack_inspect_validate_unpack(dense, tmp_path):
    packed, back = tmp_path / "new" / "packed.onnx", tmp_path / "other" / "back.onnx"
    facts = json.loads(run("pack", dense, packed, "--json").stdout)
    assert facts["nbytes"] == packed.stat().st_size < dense.stat().st_size / 3
    assert facts["before"] == dense.stat().st_size and facts["file"] == str(packed)
    again = json.loads(run("inspect", packed, "--json").stdout)
    codecs = [{w["name"]: w["codec"] for w in each["weights"]} for each in (facts, again)]
    assert codecs[0] == codecs[1] and codecs[0]["1.weight"] != "dense"
    assert again["weights"][0]["dtype"] == "float32"
    assert again["load"] == pytest.approx(facts["load"], rel=0.01)
    assert facts["load"]["cpu_ms"] > facts["load"]["dense_cpu_ms"] > 0
    assert facts["load"]["peak_nbytes"] > facts["load"]["dense_peak_nbytes"] > 1e7
    assert {"entropy_nbytes", "sparse_nbytes", "zipped_nbytes"} <= set(again["weights"][0])
    result = run("inspect", packed)
    assert (
        result.stdout == "" and "1.weight" in result.stderr and "of the dense file" in result.stderr
    )
    plain = run("inspect", dense).stderr
    assert "a load takes about" in plain and "of the dense file" not in plain
    report = json.loads(run("validate", packed, "--reference", dense, "--json").stdout)
    assert report["folded"] and report["max_abs_diff"] == 0 and report["ratio"] > 3
    assert "smaller" in run("validate", packed).stderr
    assert f"{back}: {dense.stat().st_size:,} bytes" in run("unpack", packed, back).stderr
    assert back.read_bytes() == dense.read_bytes()


def sizes(*paths: Path) -> list[int]:
    return [path.stat().st_size for path in paths]


def test_pack_has_options_for_what_a_file_is_for(tmp_path):
    source = save(networks.mlp(), tmp_path / "in.onnx")[0]
    small, fast, sparse, bare = (tmp_path / f"{name}.onnx" for name in ("a", "b", "c", "d"))
    assert "times smaller" in run("pack", source, small).stderr
    run("pack", source, fast, "--load", "fast")
    run("pack", source, sparse, "--format", "sparse-initializer")
    run("pack", source, bare, "--strip")
    a, b, c, d, whole = sizes(small, fast, sparse, bare, source)
    assert d < a <= b < c < whole
    assert "sparse-initializer" in run("inspect", sparse).stderr
    for path in (small, fast, sparse):
        run("unpack", path, tmp_path / "back.onnx")
        back = load(tmp_path / "back.onnx")
        assert networks.weights(back) == networks.weights(networks.mlp())
    run("pack", source, tmp_path / "e.onnx", "--load", "slow", status=2)
    run("pack", source, tmp_path / "f.onnx", "--anonymize")
    assert sizes(tmp_path / "f.onnx") < sizes(small)


def test_a_portable_file_is_read_by_every_verb(tmp_path):
    source = save(networks.mlp(), tmp_path / "in.onnx")[0]
    packed, back, shrunk, again = (tmp_path / f"{name}.onnx" for name in "pbsa")
    run("pack", source, packed, "--portable")
    assert not load(packed).functions and sizes(packed) < sizes(source)
    facts = json.loads(run("inspect", packed, "--json").stdout)["weights"]
    assert {"planes"} <= {weight["codec"] for weight in facts}
    assert json.loads(run("validate", packed, "--json").stdout)["folded"]
    run("unpack", packed, back)
    assert back.read_bytes() == source.read_bytes()
    run("shrink", packed, shrunk)
    run("pack", packed, again)
    assert load(again).functions and sizes(again) < sizes(packed)
    sparse = ("--portable", "--format", "sparse-initializer")
    assert "has no decoder" in run("pack", source, back, *sparse, status=2).stderr


def test_pack_is_lossy_on_request(tmp_path):
    source = save(networks.scaled(), tmp_path / "in.onnx")[0]
    (whole,), out = sizes(source), tmp_path / "out.onnx"
    for options, least in (
        (["--bits", "4"], 4),
        (["--prune", "0.9"], 3),
        (["--max-rel-error", "0.1"], 3),
        (["--max-rel-error", "0.1", "--data", "random"], 3),
    ):
        facts = json.loads(run("pack", source, out, *options, "--json").stdout)
        assert facts["nbytes"] * least < whole
        assert any("bits per weight" in note for note in facts["notes"]) or "--prune" in options
    assert "relative error of the outputs" in run("pack", source, out, *options).stderr
    out.unlink()
    assert "expected 1 to 8" in refused("pack", source, out, "--bits", "12", status=2)
    assert "give one of them" in refused(
        "pack", source, out, "--bits", "4", "--max-rel-error", "0.1", status=2
    )
    assert not out.exists()
    assert "was not used" in run("pack", source, out, "--data", "random").stderr


def test_data_files_are_read_written_and_counted(tmp_path):
    source = save(networks.mlp(), tmp_path / "in.onnx", "in.data")[0]
    out, back = tmp_path / "out" / "small.onnx", tmp_path / "back.onnx"
    facts = json.loads(run("pack", source, out, "--json").stdout)
    assert facts["before"] > sum(sizes(tmp_path / "in.data")) and [*out.parent.iterdir()] == [out]
    seen = json.loads(run("inspect", source, "--json").stdout)
    assert seen["nbytes"] == sum(sizes(source, tmp_path / "in.data"))
    assert sum(row["nbytes"] for row in seen["weights"]) < seen["nbytes"]
    facts = json.loads(run("pack", source, out, "--external", "small.data", "--json").stdout)
    assert facts["nbytes"] == sum(sizes(*out.parent.iterdir()))
    assert "back.data" in run("unpack", out, back, "--external", "back.data").stderr
    assert networks.weights(load(back)) == networks.weights(networks.mlp())
    assert "not a name for a data file" in refused("pack", source, out, "--external", "a/b")
    (tmp_path / "in.data").unlink()
    assert "in.data" in refused("pack", source, out)


@pytest.mark.parametrize("text", ["5MB", "2GiB", "5000000", "1.5 MB", "3000k", "1T"])
def test_the_limit_of_decoding_is_a_size(text, dense, tmp_path):
    packed = tmp_path / "packed.onnx"
    run("pack", dense, packed)
    run("inspect", packed, "--max-bytes", text)
    run("unpack", packed, tmp_path / "back.onnx", "--max-bytes", text)


def test_a_file_that_asks_for_too_much_is_refused(dense, tmp_path):
    packed, back = tmp_path / "packed.onnx", tmp_path / "back.onnx"
    run("pack", dense, packed)
    for text in ("100", "1kB", "1KiB"):
        text = text.replace("K", "k")
        assert "max-bytes" in refused("unpack", packed, back, "--max-bytes", text)
        assert "max-bytes" in refused("inspect", packed, "--max-bytes", text)
    for text in ("much", "5 apples", "-5", "", "MB", "1e6"):
        result = run("unpack", packed, back, "--max-bytes", text, status=2)
        assert "is not a size, such as 5000000, 5MB or 2GiB" in " ".join(result.stderr.split())
    assert not back.exists()


def test_a_network_that_onnxruntime_cannot_run_is_packed_and_validated_in_part(tmp_path):
    source = save(networks.custom(), tmp_path / "in.onnx")[0]
    packed, back = tmp_path / "packed.onnx", tmp_path / "back.onnx"
    run("pack", source, packed)
    assert sizes(packed)[0] < sizes(source)[0] / 5
    result = run("validate", packed)
    said = " ".join(result.stderr.split())
    assert "the network was not run" in said and "folded on load" in said
    assert "com.example" in json.loads(run("validate", packed, "--json").stdout)["skipped"]
    run("unpack", packed, back)
    assert back.read_bytes() == source.read_bytes()
    assert "cannot open it" in refused(
        "pack", source, packed, "--max-rel-error", "0.1", "--data", "random"
    )


def test_there_is_a_warning_about_a_file_that_another_tool_inflated(dense, tmp_path):
    from onnx.inliner import inline_local_functions

    from prune2onnx.packing.inline import outlined

    packed, inflated = tmp_path / "packed.onnx", tmp_path / "inflated.onnx"
    run("pack", dense, packed)
    save(inline_local_functions(outlined(load(packed))), inflated)
    assert "took its decoder apart" in refused("inspect", inflated, status=0)
    assert (
        "took its decoder apart" in json.loads(run("inspect", inflated, "--json").stdout)["warning"]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run("compress", LENET, "-o", folder, "--json", "--cpu", *EPOCHS)


def test_compress_writes_tables_to_stderr_and_json_to_stdout(finished):
    folder, result = finished
    assert json.loads(result.stdout) == json.loads((folder / "report.json").read_text())
    for part in ("validation error", "fc1.weight", "smaller", "folded on load", "model.onnx"):
        assert part in result.stderr
    data = run("validate", folder / "model.onnx", "--data", "digits", "--json")
    assert json.loads(data.stdout)["compressed"]["error"] is not None
    result = run("compress", LENET, "-o", folder, *EPOCHS, status=2)
    assert "holds a run already" in result.stderr


def test_a_missed_budget_has_status_3_and_leaves_the_file(tmp_path):
    folder = tmp_path / "run"
    result = run("compress", LENET, "-o", folder, "--target-size=300", *EPOCHS, "--cpu", status=3)
    last = result.stderr.splitlines()[-1]
    assert "of 300 bytes (missed by" in last and "set a larger budget" in last
    report = json.loads((folder / "report.json").read_text())
    assert report["budget"][0]["met"] is False and (folder / "model.onnx").exists()


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {LENET}\nprune: {{ramp: 0.2}}\nquantize: {{levels: 300}}\n")
    says = run("compress", "--recipe", recipe, "-o", tmp_path / "x", status=2).stderr
    assert "quantize.levels is 300" in says and not (tmp_path / "x").exists()
    importance = ["--prune-importance", "fc1=2", "--prune-importance", "fc2*=0.5"]
    run("compress", "--recipe", recipe, "-o", tmp_path / "y", "--quantize-levels=4", *importance,
        "--cpu", *EPOCHS)  # fmt: skip
    text = (tmp_path / "y" / "recipe.yaml").read_text()
    for part in ("ramp: 0.2", "levels: 4", "fc1: 2.0", "fc2*: 0.5"):
        assert part in text


def test_help_shows_every_setting_with_its_meaning_and_default():
    few, every = (run("compress", option).stdout for option in ("--help", "--help-all"))
    for dotted in settings():
        if dotted != "model":
            assert re.search(f"--{dotted.replace('.', '-').replace('_', '-')}\\b", every)
    assert "[default: threshold-linear]" in " ".join(every.split())
    assert "--narrow" not in every and "--share" not in every  # aliases of version 0.1
    assert len(few.splitlines()) <= 105 and few.index("--target-size") < few.index("--dense-epochs")
    headings = [line.rstrip(":") for line in every.splitlines() if re.match(r"\w.*:$", line)]
    assert headings[:6] == [FIRST, BUDGET, DATA, MODEL, PHASE, "Phase dense"]
    assert {"compress", "pack", "unpack", "inspect", "validate"} <= set(
        run("--help").stdout.split()
    )


def test_names_of_the_version_before_work_with_a_warning(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {LENET}\nshare: {{levels: 300}}\n")
    says = run("compress", "--recipe", recipe, "-o", tmp_path / "x", status=2).stderr
    assert "share.levels is now quantize.levels" in says
    assert "quantize.levels is 300" in says
    says = run("compress", LENET, "-o", tmp_path / "x", "--narrow-spare=0.5", status=2).stderr
    assert "narrow.spare is now channels.margin" in says and "channels.margin is 0.5" in says


def refused(*arguments: object, status: int = 1) -> str:
    """The one line of an error: no traceback, nothing on stdout."""
    result = run(*arguments, status=status)
    assert result.stdout == "" and "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("prune2onnx: ")]
    assert len(lines) == 1
    return lines[0]


NETS = """
from torch import nn
def raises(): raise RuntimeError("no such layer")
def none(): return None
def wrong_input(): return nn.Sequential(nn.Flatten(), nn.Linear(3, 10))
def few_outputs(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
number = 3
"""


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nowhere.py:net", "nowhere.py"),
        ("{nets}:lenet", "lenet"),
        ("{nets}:number", "number"),
        ("{nets}:raises", "no such layer"),
        ("{nets}:none", "returned a NoneType, expected a torch.nn.Module"),
        ("{nets}:wrong_input", "fails on an input of shape [2, 1, 8, 8]"),
        ("{nets}:few_outputs", "returns [2, 4]"),
        ("no.such.module:net", "no.such"),
    ],
)
def test_models_that_cannot_be_used_are_named(model, says, tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    spec = model.format(nets=tmp_path / "nets.py")
    assert says in refused("compress", spec, "-o", tmp_path / "run", "--cpu")
    assert not (tmp_path / "run" / "model.onnx").exists()


def bad_data(fault: str, folder: Path) -> str:
    """Makes a data source that cannot be used, and returns its name."""
    if fault == "one class":
        np.savez(folder / "d.npz", x=np.zeros((20, 1, 8, 8), np.float32), y=np.zeros(20, int))
        return f"npz:{folder / 'd.npz'}"
    if fault == "other shape":
        y = np.arange(60) % 10
        np.savez(folder / "d.npz", x=np.zeros((60, 3), np.float32), y=y)
        return f"npz:{folder / 'd.npz'}"
    if fault == "truncated":
        whole = np.zeros((50, 8, 8), np.uint8).tobytes()
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (50, 8, 8))
        labels = bytes([0, 0, 8, 1]) + (50).to_bytes(4, "big") + bytes(50)
        for stem in ("train", "t10k"):
            images = gzip.compress((header + whole)[:-7])
            (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(images)
            (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
        return f"idx:{folder}"
    (folder / "empty").mkdir()
    return f"folder:{folder / 'empty'}"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("one class", "expected at least 2 classes"),
        ("other shape", "fails on an input of shape [2, 3]"),
        ("truncated", "3,209"),
        ("empty", "empty"),
    ],
)
def test_data_that_cannot_be_used_is_named(fault, says, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    source = bad_data(fault, tmp_path)
    model = f"{tmp_path / 'net.py'}:net"
    said = refused("compress", model, "--data", source, "-o", tmp_path / "run", "--cpu")
    assert says in said


def test_files_that_are_no_onnx_are_named(dense, tmp_path):
    junk, cut, empty = (tmp_path / name for name in ("junk.onnx", "cut.onnx", "empty.onnx"))
    junk.write_bytes(b"this is not a model at all" * 10)
    cut.write_bytes(dense.read_bytes()[:-100])
    empty.write_bytes(b"")
    out = tmp_path / "out.onnx"
    for path in (junk, cut, empty, tmp_path / "missing.onnx"):
        for verb in (["pack", path, out], ["unpack", path, out], ["inspect", path]):
            assert path.name in refused(*verb)
        assert path.name in refused("validate", path)
    assert not out.exists()


def test_wrong_usage_has_status_2(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {LENET}\nprune: {{rmap: 0.2}}\n")
    said = refused("compress", "--recipe", recipe, "-o", tmp_path / "x", status=2)
    assert "unknown key 'prune.rmap'; did you mean 'prune.ramp'?" in said
    assert "digits" in refused("compress", LENET, "--data", "digit", "-o", tmp_path, status=2)
    assert "Missing argument 'MODEL'" in run("compress", "-o", tmp_path, status=2).stderr
    assert "Missing option '-o'" in run("compress", LENET, status=2).stderr
    assert "no run to continue" in refused("compress", "--resume", tmp_path, status=2)
    assert "give it alone" in refused("compress", LENET, "--resume", tmp_path, status=2)
    says = run("compress", LENET, "--prune-importance", "fc1", "-o", tmp_path, status=2).stderr
    assert "'fc1' is not PATTERN=FACTOR" in says
    assert run("compress", LENET, "--prune-function", "hard", "-o", tmp_path, status=2)


def test_a_full_disk_ends_with_one_line_and_no_half_file(dense, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = refused("pack", dense, tmp_path / "out.onnx")
    assert "out.onnx: cannot write" in said and "No space left on device" in said
    assert "No space left" in refused("compress", LENET, "-o", tmp_path / "run", "--cpu", *EPOCHS)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["lock"]


def test_ctrl_c_has_status_130_and_says_how_to_continue(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "prune2onnx", "compress", LENET, "-o", str(folder), "--cpu"]
    process = subprocess.Popen(
        [*command, "--dense-epochs=5000"],
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
        # a shell starts background processes with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "checkpoints" / "running.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert f"continue with: prune2onnx compress --resume {folder}" in stderr
    assert "Traceback" not in stderr and stdout == ""
    assert not (folder / "model.onnx").exists()


def test_an_output_that_disagrees_has_status_4(dense, tmp_path, monkeypatch):
    packed = tmp_path / "packed.onnx"
    run("pack", dense, packed)
    module = importlib.import_module("prune2onnx.runtime.validate")
    right = module.coded(load(packed))
    wrong = {name: -array for name, array in right.arrays.items()}
    monkeypatch.setattr(module, "coded", lambda *_, **__: dataclasses.replace(right, arrays=wrong))
    assert "other bits" in refused("validate", packed, status=4)


def test_a_runtime_that_does_not_fold_has_status_4(dense, tmp_path, monkeypatch):
    packed = tmp_path / "packed.onnx"
    run("pack", dense, packed)
    module = importlib.import_module("prune2onnx.runtime.validate")
    monkeypatch.setattr(module, "folding", lambda *_, **__: Folding(("1.weight",), level="basic"))
    assert "does not fold the decoders of 1.weight" in run("validate", packed, status=4).stderr


def test_a_disk_that_fills_up_on_the_way_leaves_a_run_that_can_be_continued(
    finished, tmp_path, monkeypatch
):
    folder, real, calls = tmp_path / "run", os.fsync, []

    def full_after_six(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_six)
    said = run("compress", LENET, "-o", folder, "--cpu", *EPOCHS, status=1).stderr.splitlines()[-1]
    assert "checkpoints" in said and "No space left on device" in said
    assert not list(folder.rglob("*.partial")) and not (folder / "model.onnx").exists()
    monkeypatch.undo()
    run("compress", "--resume", folder, "--cpu")
    whole, _ = finished
    assert (folder / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()


def test_packing_does_not_wait_for_torch(dense, tmp_path):
    script = "import sys, prune2onnx.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_progress_says_which_trial_it_is_of(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("prune2onnx.cli.output.console", Console(file=log, width=160))
    epoch = Epoch("prune", 1, 3, 0.5, 0.1, 2.0, 0.1, 1.0, {}, {})
    with progress() as callbacks:
        callbacks.on_epoch(dataclasses.replace(epoch, phase="dense"))
        for number in (1, 2):
            callbacks.on_trial(TrialStart(number, 6, "density", 0.07 / number))
            callbacks.on_epoch(epoch)
    lines = [line.split("  loss")[0].rstrip() for line in log.getvalue().splitlines()]
    assert lines == [
        "dense    epoch 1/3",
        "trial 1 of at most 6, density 7 %",
        "trial 1: prune    epoch 1/3",
        "trial 2 of at most 6, density 3.5 %",
        "trial 2: prune    epoch 1/3",
    ]


def test_a_network_that_is_mostly_left_alone_is_pointed_out_once(monkeypatch, capfd):
    @click.command()
    def many_trials():
        for _ in range(3):
            prune(nn.Sequential(nn.Embedding(50, 4, max_norm=1.0), nn.Linear(4, 2)))

    monkeypatch.setitem(main.commands, "many-trials", many_trials)
    said = run("many-trials").stderr
    assert said == (
        "prune2onnx: Sequential: 200 of 210 parameters are left alone, as only weights of Linear, "
        "convolution, recurrent, attention, Embedding and Bilinear layers are pruned: 0.weight "
        "(Embedding, 200)\n"
    )
