"""Files appear whole or not at all."""

import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.files import keep_inputs, write_whole


def test_a_file_is_written_readable_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_whole(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Prune2OnnxError, match=r"a\.bin: cannot write 3 bytes: No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Prune2OnnxError, match="cannot write"):
        write_whole(tmp_path / "file" / "a.txt", b"")


def test_links_are_followed_and_modes_stay(tmp_path):
    file, link = tmp_path / "a.txt", tmp_path / "link"
    write_whole(file, "old")
    file.chmod(0o600)
    link.symlink_to("a.txt")
    write_whole(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (tmp_path / "nowhere").symlink_to("b.txt")
    with pytest.raises(Prune2OnnxError, match=r"b\.txt, which does not exist; remove the link"):
        write_whole(tmp_path / "nowhere", "x")


def test_devices_and_pipes_are_written_to(tmp_path):
    write_whole("/dev/null", "gone")
    assert not Path("/dev/null").is_file()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    read: list[bytes] = []
    reader.start()
    write_whole(pipe, b"through")
    reader.join()
    assert read == [b"through"] and pipe.is_fifo()


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_folder_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Prune2OnnxError, match="is a folder; give the name of a file"):
        write_whole(name, "x")


def test_names_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("é" * 100 + "x" * 55)
    write_whole(path, "x")
    assert path.read_text() == "x"


def test_what_killed_writers_left_is_removed_and_nobody_elses(tmp_path):
    path = tmp_path / "a.txt"
    killed = """
import os, sys
from prune2onnx.files import replacing
with replacing(sys.argv[1], 1) as stream:
    print("ready", flush=True)
    sys.stdin.read()
"""
    live, dead = (
        subprocess.Popen(
            [sys.executable, "-c", killed, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    )
    for one in (live, dead):
        assert one.stdout and one.stdout.readline() == b"ready\n"
    dead.kill()
    dead.communicate()
    assert len(list(tmp_path.glob(".a.txt.*.partial"))) == 2
    write_whole(path, "mine")
    assert len(list(tmp_path.glob(".a.txt.*.partial"))) == 1
    live.communicate(b"")
    assert live.returncode == 0 and path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_readers_see_whole_files_while_two_write(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, bytes(100_000))
    writer = """
import sys
from prune2onnx.files import write_whole
for _ in range(150):
    write_whole(sys.argv[1], bytes([int(sys.argv[2])]) * 100_000)
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", writer, path, number]) for number in ("1", "2")
    ]
    reads = 0
    while any(one.poll() is None for one in writers):
        content = path.read_bytes()
        assert len(content) == 100_000 and len(set(content)) == 1
        reads += 1
    assert reads > 20 and all(one.returncode == 0 for one in writers)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_that_is_new_waits_for_who_takes_it_for_a_leftover(tmp_path, monkeypatch):
    flock, others = fcntl.flock, []

    def looked_at_first(stream, how):
        if not others:  # another process looks at the file before its writer has locked it
            (new,) = tmp_path.glob("*.partial")
            others.append(new.open("rb"))
            flock(others[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            threading.Timer(0.2, lambda: (new.unlink(), others[0].close())).start()
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", looked_at_first)
    write_whole(tmp_path / "a.bin", "mine")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"] and others[0].closed


def test_what_is_read_is_kept(tmp_path):
    file = tmp_path / "a"
    write_whole(file, "x")
    keep_inputs([file], [tmp_path / "b"])
    os.link(file, tmp_path / "b")
    with pytest.raises(Prune2OnnxError, match="the same file"):
        keep_inputs([file], [tmp_path / "b"])
