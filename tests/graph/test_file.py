"""Files are read with all their sizes checked, and written whole or not at all."""

import errno
import os
import subprocess
import sys

import kill_writes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph import file as onnxfile
from prune2onnx.graph.file import load, save
from prune2onnx.graph.protobuf import nbytes
from prune2onnx.graph.shapes import without_weights
from prune2onnx.packing.inline import outlined
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack

ROWS = 64


def weight(seed: int, density: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(ROWS, ROWS)).astype(np.float32)
    if density < 1:
        array = np.round(array)
        array[rng.random(array.shape) >= density] = 0
    return array


def model(*tensors: TensorProto) -> ModelProto:
    names = [tensor.name for tensor in tensors]
    steps = ["x", *(f"h{i}" for i in range(len(names) - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [a, name], [b])
        for a, name, b in zip(steps[:-1], names, steps[1:], strict=True)
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", ROWS]) for n in "xy"]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def dense() -> ModelProto:
    return model(
        numpy_helper.from_array(weight(0), "a"),
        helper.make_tensor("b", TensorProto.FLOAT, (ROWS, ROWS), weight(1)),
    )


def run(path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, ROWS), np.float32)})[0]


def arrays(m: ModelProto) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in m.graph.initializer}


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- reading ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "an empty file"),
        (b"this is text, not a model", "not an ONNX model|no graph"),
        (b"\x08\x08", "no graph"),
        (b"\x08\x08\x3a\x03\x12\x01a", "no graph"),
    ],
)
def test_load_says_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Prune2OnnxError, match=rf"model\.onnx: .*({message})"):
        load(path)


def test_only_files_are_read(tmp_path):
    with pytest.raises(Prune2OnnxError, match="a folder; give"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Prune2OnnxError, match="not a file"):
        load(tmp_path / "pipe")


def test_a_file_above_the_limit_of_protobuf_is_refused_unread(tmp_path):
    path = tmp_path / "model.onnx"
    with path.open("wb") as stream:
        stream.truncate(2**31)  # takes no space
    with pytest.raises(Prune2OnnxError, match="at most 2,147,483,647; export it with external"):
        load(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_cut_short_is_refused_wherever_the_cut(packed, tmp_path):
    source = model(numpy_helper.from_array(weight(0, 0.05), "w"))
    whole = (pack(source).model if packed else source).SerializeToString()
    path = tmp_path / "model.onnx"
    for end in {*range(1, len(whole), len(whole) // 150), *range(len(whole) - 80, len(whole))}:
        path.write_bytes(whole[:end])
        with pytest.raises(Prune2OnnxError, match=r"model\.onnx: "):
            load(path)
    path.write_bytes(whole)
    assert load(path).SerializeToString() == whole


def test_a_missing_decode_function_is_named(tmp_path):
    packed = outlined(pack(model(numpy_helper.from_array(weight(0, 0.05), "w"))).model)
    del packed.functions[:]
    onnx.save(packed, tmp_path / "m.onnx")
    with pytest.raises(Prune2OnnxError, match=r"m\.onnx: w: its decode function .* is missing"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.dims.append(2), r"a: float of shape \[64, 64, 2\] takes 32,768 bytes.*16,384"),
        (lambda t: t.dims.append(2**60), r"a: float of shape .* takes [\d,]+ bytes, it has 16,384"),
        (lambda t: t.dims.append(-1), "a: its shape .* has a negative extent"),
        (lambda t: t.dims.extend([-1, -1]), "a: its shape .* has a negative extent"),
        (lambda t: setattr(t, "data_type", TensorProto.DOUBLE), "a: double of shape .* 32,768"),
        (lambda t: setattr(t, "raw_data", t.raw_data[:-4]), "a: .* it has 16,380"),
        (lambda t: t.ClearField("raw_data"), "a: .* takes 4,096 values, it has 0"),
        (lambda t: setattr(t, "data_type", TensorProto.STRING), "a: string .* 4,096 strings"),
        (lambda t: setattr(t, "data_type", 0), "not a valid ONNX model"),
    ],
)
def test_declared_sizes_are_checked_against_the_data(change, message, tmp_path):
    m = dense()
    change(m.graph.initializer[0])
    onnx.save(m, tmp_path / "m.onnx")
    with pytest.raises(Prune2OnnxError, match=rf"m\.onnx: {message}"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", [*range(1, 8), *range(9, 14), *range(16, 23)])
def test_every_type_is_read_raw_and_typed(kind, tmp_path):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    array = (np.arange(15).reshape(3, 5) % 2).astype(dtype)
    raw = numpy_helper.from_array(array, "raw")
    typed = helper.make_tensor("typed", kind, [3, 5], array.astype(np.float32).ravel())
    m = model(raw, typed)
    m.opset_import[0].version, m.ir_version = 21, 10
    del m.graph.node[:]
    m.graph.output[0].name = "x"
    onnx.save(m, tmp_path / "m.onnx")
    assert arrays(load(tmp_path / "m.onnx")) == arrays(m)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    whole = dense().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole.replace(b"MatMul", b"Mat\xfful"))
    with pytest.raises(Prune2OnnxError, match="a name or a note that is not UTF-8"):
        load(tmp_path / "m.onnx")


def test_the_check_looks_at_no_weight_but_at_everything_else():
    m = dense()
    light = without_weights(m, 1)
    assert not light.graph.initializer
    assert [i.name for i in light.graph.input] == ["x", "a", "b"]
    assert light.graph.node == m.graph.node and light.opset_import == m.opset_import
    assert without_weights(m) == m


# --- external data ---


def saved_externally(folder, threshold: int = 100):
    path = folder / "m.onnx"
    onnx.save(
        dense(), path, save_as_external_data=True, size_threshold=threshold, location="m.data"
    )
    return path


def test_external_data_are_read_as_if_they_were_inside(tmp_path):
    loaded = load(saved_externally(tmp_path))
    assert arrays(loaded) == arrays(dense())
    assert loaded.graph.initializer[0] == dense().graph.initializer[0]


def test_external_data_may_be_bounded(tmp_path):
    path = saved_externally(tmp_path)
    raw = 4 * ROWS * ROWS  # onnx writes only raw tensors to a data file
    load(path, max_bytes=raw)
    with pytest.raises(Prune2OnnxError, match="external data take 16,384 bytes, at most 16,383"):
        load(path, max_bytes=raw - 1)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "other.data"}, "a: there is no file 'other.data'; put it beside"),
        ({"location": "../m.data"}, "a: '../m.data' lies outside of the model's folder"),
        ({"location": "sub/../../m.data"}, "lies outside"),
        ({"location": "..\\m.data"}, "lies outside"),
        ({"location": "/etc/passwd"}, "lies outside"),
        ({"location": "C:\\m.data"}, "lies outside"),
        ({"location": ""}, "its location is ''"),
        ({"location": "."}, "its location is '.'"),
        ({"location": "folder"}, "is not a file"),
        ({"location": "link"}, "links to a file outside"),
        ({"offset": "4"}, "lies at bytes 4 to 16,388 of 'm.data', which has 16,384"),
        ({"offset": "-4"}, "its offset is '-4'"),
        ({"offset": "9" * 5000}, "which has 16,384"),
        ({"length": "16380"}, "its length is 16,380 bytes, its shape and type take 16,384"),
        ({"length": "1e4"}, "its length is '1e4'"),
        ({"length": str(2**62)}, "its length is"),
    ],
)
def test_bad_external_data_are_refused(entries, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = saved_externally(folder)
    (tmp_path / "m.data").write_bytes(bytes(99999))
    (folder / "link").symlink_to(tmp_path / "m.data")
    (folder / "folder").mkdir()
    m = onnx.load(path, load_external_data=False)
    held = {e.key: e.value for e in m.graph.initializer[0].external_data}
    del m.graph.initializer[0].external_data[:]
    for key, text in (held | entries).items():
        m.graph.initializer[0].external_data.add(key=key, value=text)
    path.write_bytes(m.SerializeToString())
    with pytest.raises(Prune2OnnxError, match=r"m\.onnx: external data cannot be read: ") as error:
        load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_huge_declared_shape_reads_nothing(tmp_path):
    path = saved_externally(tmp_path)
    m = onnx.load(path, load_external_data=False)
    m.graph.initializer[0].dims[:] = [2**60, 2**60]
    del m.graph.initializer[0].external_data[1:]
    path.write_bytes(m.SerializeToString())
    with pytest.raises(Prune2OnnxError, match=r"a: it lies at bytes 0 to [\d,]{40,} of 'm.data'"):
        load(path)


def test_a_download_cache_of_links_is_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    saved_externally(blobs).rename(blobs / "1f")
    (blobs / "m.data").rename(blobs / "2e")
    (snapshot / "m.onnx").symlink_to("../blobs/1f")
    (snapshot / "m.data").symlink_to("../blobs/2e")
    assert arrays(load(snapshot / "m.onnx")) == arrays(dense())


# --- writing ---


def test_a_small_model_is_one_file(tmp_path):
    path = tmp_path / "new" / "m.onnx"
    assert save(dense(), path) == (path,)
    assert path.read_bytes() == dense().SerializeToString()
    assert files(path.parent) == ["m.onnx"]


def test_weights_go_to_a_file_beside_on_request(tmp_path):
    m = dense()
    m.graph.initializer[0].doc_string = "kept"
    before = m.SerializeToString()
    path, data = save(m, tmp_path / "m.onnx", external="w.bin")
    assert m.SerializeToString() == before
    assert files(tmp_path) == ["m.onnx", "w.bin"]
    assert data.stat().st_size == 2 * 4 * ROWS * ROWS and path.stat().st_size < 1000
    onnx.checker.check_model(str(path))
    loaded = load(path)
    assert arrays(loaded) == arrays(m) and loaded.graph.initializer[0].doc_string == "kept"
    save(m, tmp_path / "whole.onnx")
    np.testing.assert_array_equal(run(path), run(tmp_path / "whole.onnx"))


def test_above_the_limit_a_data_file_is_written_without_asking(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxfile, "MAX_NBYTES", 20_000)
    path, data = save(dense(), tmp_path / "m.onnx")
    assert data.name == "m.onnx.data"
    assert arrays(load(path)) == arrays(dense())


def test_streams_of_packed_weights_stay_in_the_model(tmp_path, monkeypatch):
    endless = weight(0)
    endless[0, 0] = np.inf  # no exponent to code
    incompressible = numpy_helper.from_array(endless, "dense")
    noise = np.random.default_rng(1).integers(-90, 90, (ROWS, ROWS)).astype(np.float32)
    packed = pack(model(numpy_helper.from_array(noise, "w"), incompressible)).model
    path, data = save(packed, tmp_path / "m.onnx", external="m.data")
    assert data.stat().st_size == 4 * ROWS * ROWS
    stubs = onnx.load(path, load_external_data=False).graph.initializer
    assert {t.name for t in stubs if t.data_location} == {"dense"}
    assert unpack(load(path)) == unpack(packed)
    run(path)
    monkeypatch.setattr(onnxfile, "MAX_NBYTES", path.stat().st_size - 1)
    _, data = save(packed, path, external="m.data")
    assert data.stat().st_size > 4 * ROWS * ROWS
    run(path)


def test_large_tensors_start_on_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxfile, "_PAGED_NBYTES", 5000)
    small = numpy_helper.from_array(np.ones(300, np.float32), "s")
    m = dense()
    m.graph.initializer.insert(0, small)
    path, _ = save(m, tmp_path / "m.onnx", external="m.data")
    places = {
        t.name: {e.key: int(e.value) for e in t.external_data if e.key != "location"}
        for t in onnx.load(path, load_external_data=False).graph.initializer
    }
    assert places["s"] == {"offset": 0, "length": 1200}
    assert places["a"]["offset"] == 4096 and places["b"]["offset"] % 4096 == 0
    assert arrays(load(path)) == arrays(m)


def test_a_pair_is_replaced_safely(tmp_path):
    path, _ = save(dense(), tmp_path / "m.onnx", external="m.data")
    other = model(numpy_helper.from_array(weight(7), "other"))
    save(other, path, external="m.data")
    assert arrays(load(path)) == arrays(other)
    assert files(tmp_path) == ["m.data", "m.onnx"]


@pytest.mark.parametrize(
    ("exists", "fails"), [*((True, n) for n in range(5)), *((False, n) for n in range(2))]
)
def test_where_writing_fails_there_is_a_whole_pair_or_none(exists, fails, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    if exists:
        save(dense(), path, external="m.data")
    before = files(tmp_path)
    calls = iter(range(99))
    replace = type(path).replace

    def refuse(self, target):
        if next(calls) == fails:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", refuse)
    other = model(numpy_helper.from_array(weight(7), "other"))
    with pytest.raises(Prune2OnnxError, match=r"m\.(onnx|data): cannot write [\d,]+ bytes: Input"):
        save(other, path, external="m.data")
    assert files(tmp_path) == before
    if exists:  # the old pair until the new model is in its place
        assert arrays(load(path)) == arrays(dense() if fails < 2 else other)


def test_readers_see_a_model_and_its_own_data_while_two_write_both(tmp_path):
    """Half of the reads were broken, or had the weights of both models."""
    found = kill_writes.readers(tmp_path, 1.5, kill_writes.DATA)
    assert found.pop("whole") > 3 and found.pop("writes") > 3
    assert not found


def test_what_killed_writers_leave_is_the_old_model_or_the_new_one(tmp_path):
    for case in kill_writes.kills(8, rows=300):
        assert not kill_writes.bad(case.found), case.found
        assert len(case.found) > 1, case.found


def test_a_file_that_never_stays_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    save(dense(), path, "m.data")
    read = onnxfile._read_external

    def replaced(*given):
        read(*given)
        os.utime(path, ns=(0, next(times)))

    times = iter(range(1000))
    monkeypatch.setattr(onnxfile, "_read_external", replaced)
    with pytest.raises(Prune2OnnxError, match="another process replaced it 100 times"):
        load(path)


def test_a_writer_killed_at_any_rename_leaves_a_whole_pair(tmp_path):
    """Also one that onnxruntime opens, which knows nothing of this project."""
    killed = """
import os, sys
from pathlib import Path
from prune2onnx.graph.file import load, save
replace, calls = Path.replace, iter(range(99))
def die(self, target):
    if next(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return replace(self, target)
model = load(sys.argv[1])
Path.replace = die
save(model, sys.argv[2], external="m.data")
"""
    other = save(model(numpy_helper.from_array(weight(7), "other")), tmp_path / "o.onnx")[0]
    for at in range(6):
        path, _ = save(dense(), tmp_path / "m" / "m.onnx", external="m.data")
        done = subprocess.run([sys.executable, "-c", killed, other, path, str(at)])
        assert done.returncode == (-9 if at < 5 else 0)
        got = arrays(load(path))
        assert got == arrays(dense() if at < 2 else load(other))
        onnx.load(path)
    assert files(path.parent) == ["m.data", "m.onnx"]


def test_no_output_takes_the_place_of_an_input(tmp_path):
    path, data = save(dense(), tmp_path / "in.onnx", external="in.data")
    (tmp_path / "link.onnx").symlink_to(path)
    os.link(data, tmp_path / "hard.data")
    m = load(path)
    for target, external in (
        ("out.onnx", "in.data"),
        ("out.onnx", "in.onnx"),
        ("out.onnx", "link.onnx"),
        ("out.onnx", "hard.data"),
        ("in.data", None),
    ):
        with pytest.raises(Prune2OnnxError, match=r"the same file as .*, which is read; give"):
            save(m, tmp_path / target, external, source=path)
    assert arrays(load(path)) == arrays(m) and not (tmp_path / "out.onnx").exists()
    for external in ("in.data", None):  # replaced whole, by its own name or by a link
        save(m, tmp_path / "link.onnx", external, source=path)
        assert arrays(load(path)) == arrays(m)
    assert (tmp_path / "link.onnx").is_symlink()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for external in (None, "m.data"):
        with pytest.raises(Prune2OnnxError, match="No space left on device; free some space"):
            save(dense(), tmp_path / "m.onnx", external=external)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "..\\b", "m.onnx"])
def test_a_data_file_is_a_plain_name(name, tmp_path):
    with pytest.raises(Prune2OnnxError, match="not a name for a data file"):
        save(dense(), tmp_path / "m.onnx", external=name)


def test_a_model_whose_data_were_not_loaded_is_not_written(tmp_path):
    m = onnx.load(saved_externally(tmp_path), load_external_data=False)
    with pytest.raises(Prune2OnnxError, match="a: its external data is not loaded"):
        save(m, tmp_path / "n.onnx")


def test_what_cannot_be_split_is_refused(tmp_path, monkeypatch):
    m = dense()
    held = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weight(3)))
    m.graph.node.insert(0, held)
    monkeypatch.setattr(onnxfile, "MAX_NBYTES", 10_000)
    with pytest.raises(Prune2OnnxError, match=r"m\.onnx: [\d,]+ bytes without its initializers"):
        save(m, tmp_path / "m.onnx")
    assert files(tmp_path) == []


@pytest.mark.parametrize("build", [dense, lambda: pack(dense()).model, ModelProto])
def test_bytes_are_counted_without_serializing(build):
    assert nbytes(build()) == build().ByteSize()
