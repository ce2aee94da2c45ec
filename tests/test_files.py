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
from prune2onnx.files import keep_inputs, replacing_folder, write_whole


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


def fill(target: Path, text: str) -> None:
    with replacing_folder(target) as folder:
        write_whole(folder / "inner" / "a.txt", text)
        write_whole(folder / "b.txt", text)


def texts(target: Path) -> set[str]:
    return {path.read_text() for path in (target / "inner" / "a.txt", target / "b.txt")}


def test_a_folder_appears_whole_and_replaces_another(tmp_path):
    target = tmp_path / "new" / "folder"
    fill(target, "first")
    (target / "old.txt").write_text("gone")
    target.chmod(0o750)
    fill(target, "second")
    assert texts(target) == {"second"} and not (target / "old.txt").exists()
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert [p.name for p in target.parent.iterdir()] == ["folder"]


def test_a_folder_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "folder"
    for before in (set(), {"first"}):
        with pytest.raises(ZeroDivisionError), replacing_folder(target) as folder:
            write_whole(folder / "b.txt", "second")
            raise ZeroDivisionError
        assert [p.name for p in tmp_path.iterdir()] == ["folder"] * len(before)
        if not before:
            fill(target, "first")
    assert texts(target) == {"first"}


def test_a_file_is_no_folder_and_a_link_to_a_folder_is_one(tmp_path):
    write_whole(tmp_path / "a.txt", "mine")
    with pytest.raises(Prune2OnnxError, match=r"a\.txt: a file, expected a folder"):
        fill(tmp_path / "a.txt", "text")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and texts(tmp_path / "real") == {"text"}


def test_a_folder_between_two_renames_is_restored(tmp_path):
    target = tmp_path / "folder"
    fill(target, "first")
    target.rename(tmp_path / ".folder.previous")  # where a killed process was
    with pytest.raises(ZeroDivisionError), replacing_folder(target):
        raise ZeroDivisionError
    assert texts(target) == {"first"}


def test_folders_of_killed_processes_go_and_those_of_others_stay(tmp_path):
    writer = """
import sys
from pathlib import Path
from prune2onnx.files import replacing_folder
with replacing_folder(Path(sys.argv[1])) as folder:
    (folder / "b.txt").write_text("theirs")
    print("ready", flush=True)
    sys.stdin.read()
"""
    target = tmp_path / "folder"
    live, dead = (
        subprocess.Popen(
            [sys.executable, "-c", writer, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    )
    for one in (live, dead):
        assert one.stdout and one.stdout.readline() == b"ready\n"
    dead.kill()
    dead.communicate()
    assert len(list(tmp_path.glob(".folder.*.partial"))) == 2
    fill(target, "mine")
    assert len(list(tmp_path.glob(".folder.*.partial"))) == 1 and texts(target) == {"mine"}
    live.communicate(b"")
    assert live.returncode == 0 and (target / "b.txt").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
