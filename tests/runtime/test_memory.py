"""Where memory is short, that is said before, or in one line."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from networks import mlp, model
from onnx import helper

from prune2onnx.cli.main import main
from prune2onnx.errors import LowMemoryWarning, OutOfMemoryError
from prune2onnx.graph.file import save
from prune2onnx.packing.pack import pack
from prune2onnx.runtime import memory
from prune2onnx.runtime.memory import available, require
from prune2onnx.runtime.session import session


def test_there_is_a_warning_and_far_beyond_an_error(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 3_000_000_000)
    require("it", 2.9e9, "wait")
    with pytest.warns(LowMemoryWarning, match=r"^it takes about 4.0 GB of .* 3.0 are free; wait"):
        require("it", 4e9, "wait")
    with pytest.raises(OutOfMemoryError, match=r"^it takes about 7.0 GB .* free; wait$"):
        require("it", 7e9, "wait")


def test_what_is_free_is_what_the_system_says():
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    assert 0 < available() < free + 1e9


VERSION_2 = ("0::/a/b\n", ("memory.max", "memory.current", "inactive_file"), "")
VERSION_1 = (
    "5:cpu,memory:/a/b\n4:pids:/x\n",
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "memory/",
)


@pytest.mark.parametrize(("own", "names", "folder"), [VERSION_2, VERSION_1])
@pytest.mark.parametrize("where", ["a/b", "a", ""])
def test_the_limit_of_a_container_counts(own, names, folder, where, tmp_path, monkeypatch):
    limit, used, cached = names
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    every = tmp_path / "groups" / folder
    for path in ("a/b", "a", ""):
        (every / path).mkdir(parents=True, exist_ok=True)
        (every / path / limit).write_text("max\n" if names == VERSION_2[1] else f"{1 << 62}\n")
        (every / path / used).write_text("70000000\n")
        (every / path / "memory.stat").write_text(f"anon 5\n{cached} 20000000\n")
    assert available() > 100_000_000
    (every / where / limit).write_text("100000000\n")
    assert available() == 50_000_000


def test_the_limit_of_addresses_counts():
    """In a process of its own: it cannot be raised again."""
    code = (
        "import resource; from prune2onnx.runtime.memory import available\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31)); print(available())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 29 < int(done.stdout) < 1 << 31


@pytest.fixture
def small(tmp_path) -> Path:
    weight = np.random.default_rng(0).normal(size=(1200, 1000)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    dense = model([node], {"w": weight}, {"x": ["N", 1200]}, {"y": ["N", 1000]})
    save(dense, tmp_path / "dense.onnx")
    save(pack(dense).model, tmp_path / "packed.onnx")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("pack dense.onnx out.onnx", "use a machine"),
        ("pack dense.onnx out.onnx --load small", "without --load small it is 0.2 GB"),
        ("pack dense.onnx out.onnx --portable --bits 4", "without --portable and a lossy option"),
        ("unpack packed.onnx out.onnx", "unpacking packed.onnx takes about 0.2 GB"),
        ("inspect packed.onnx", "decoding packed.onnx takes"),
        ("validate packed.onnx", "inspect and unpack take less"),
    ],
)
def test_every_verb_says_what_it_takes(command, advice, small, monkeypatch):
    monkeypatch.chdir(small)
    monkeypatch.setattr(memory, "available", lambda: 10_000_000)
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == 1 and not (small / "out.onnx").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("prune2onnx: ") and advice in line and "0.0 are free" in line


def test_a_warning_is_one_line_and_the_verb_goes_on(small, monkeypatch):
    monkeypatch.chdir(small)
    monkeypatch.setattr(memory, "available", lambda: 150_000_000)
    done = CliRunner().invoke(main, ["unpack", "packed.onnx", "out.onnx"])
    assert done.exit_code == 0 and (small / "out.onnx").exists()
    first = done.stderr.splitlines()[0]
    assert first.startswith("prune2onnx: unpacking packed.onnx takes about") and "killed" in first


@pytest.mark.parametrize("reason", ["Unable to allocate 8.00 GiB", ""])
def test_memory_that_ends_anywhere_is_one_line(reason, small, monkeypatch):
    def failing(*given, **more):
        raise MemoryError(*filter(None, [reason]))

    monkeypatch.setattr("prune2onnx.commands.pack.pack_normalized", failing)
    done = CliRunner().invoke(main, ["pack", str(small / "dense.onnx"), str(small / "out.onnx")])
    assert done.exit_code == 1 and not (small / "out.onnx").exists()
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"prune2onnx: out of memory: {reason}") and "--load balanced" in line


def test_a_session_without_memory_is_named(tmp_path, monkeypatch):
    import onnxruntime

    def failing(*given, **more):
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")

    save(mlp(), tmp_path / "m.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", failing)
    with pytest.raises(OutOfMemoryError, match=r"m\.onnx: onnxruntime .* no more memory"):
        session(tmp_path / "m.onnx")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no such limit")
@pytest.mark.parametrize("verb", ["pack", "unpack", "inspect", "validate"])
def test_verbs_end_in_one_line_where_addresses_end(verb, tmp_path):
    """Weights of 160 MB in a process with 250 MB left, in which no warning is an estimate away."""
    weight = np.zeros((4000, 10_000), np.float32)
    weight[::7, ::5] = np.random.default_rng(0).normal(size=(572, 2000))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    dense = model([node], {"w": weight}, {"x": ["N", 4000]}, {"y": ["N", 10_000]})
    save(dense if verb == "pack" else pack(dense).model, tmp_path / "given.onnx")
    command = {
        "pack": "['pack', 'given.onnx', 'out.onnx']",
        "unpack": "['unpack', 'given.onnx', 'out.onnx']",
        "inspect": "['inspect', 'given.onnx']",
        "validate": "['validate', 'given.onnx']",
    }[verb]
    code = (
        "import psutil, resource, onnx, onnxruntime, rich.progress, rich.table\n"
        "from prune2onnx.cli.main import main\n"
        "import prune2onnx.commands.pack, prune2onnx.runtime.validate\n"
        "from prune2onnx.runtime import memory\n"
        "memory.available = lambda: 1 << 60\n"
        "limit = psutil.Process().memory_info().vms + 250_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        f"main({command})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "memory" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["given.onnx"]
