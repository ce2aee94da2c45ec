"""Where examples come from: what each source gives, and what it says when it cannot."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import sys
import tarfile
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import prune2onnx.data.idx as idx_file
from prune2onnx.data import Arrays, collate, load_data
from prune2onnx.data.examples import arrays
from prune2onnx.data.idx import parse_idx
from prune2onnx.data.split import stratified
from prune2onnx.errors import DataWarning, Prune2OnnxError, RecipeError

IDX_NAMES = ("train-images", "train-labels", "t10k-images", "t10k-labels")
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


@pytest.fixture
def real() -> Path:
    """The folder of real datasets."""
    if not (folder := os.environ.get("PRUNE2ONNX_DATA")):
        pytest.skip("PRUNE2ONNX_DATA names no folder of data sets")
    return Path(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Works in an empty folder, with an import path that is restored and without network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(url, timeout):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(idx_file.urllib.request, "urlopen", refuse)


def idx(array: np.ndarray) -> bytes:
    """Writes IDX, independently of the reader."""
    kind = array.dtype.str[1:]
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[kind], array.ndim, *array.shape)
    return head + array.astype(f">{kind}").tobytes()


def labels(n: int, classes: int = 3) -> np.ndarray:
    return (np.arange(n) % classes).astype(np.uint8)


def idx_folder(folder: Path, n: int = 40, **replaced: bytes) -> Path:
    """An IDX dataset of 5x4 images; `replaced` are other contents, by name with underscores."""
    images = np.arange(n * 20, dtype=np.uint8).reshape(n, 5, 4)
    contents = [idx(images), idx(labels(n)), idx(images[:12]), idx(labels(12))]
    for name, content in zip(IDX_NAMES, contents, strict=True):
        content = replaced.get(name.replace("-", "_"), content)
        (folder / f"{name}-idx-ubyte").write_bytes(content)
    return folder


def save(path: Path, width: int = 4, height: int = 3, mode: str = "L", value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), value if mode == "L" else (value, 0, 0)).save(path)


def class_folders(root: Path, n: int = 10, classes: str = "ba") -> Path:
    for name in classes:
        for i in range(n):
            save(root / name / f"{i:02}.png", value=100 * (name == "b") + i)
    return root


def script(text: str, name: str = "own.py") -> str:
    Path(name).write_text("import numpy as np, torch\n" + text)
    return name


# What every source gives


def test_digits_need_no_file():
    data = load_data("digits")
    assert (data.name, data.input_shape, data.classes) == ("digits", (1, 8, 8), 10)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    x, y = data.train[0]
    assert (x.dtype, x.shape, y.dtype, y.shape) == (np.float32, (1, 8, 8), np.int64, ())
    values = np.stack([data.train[i][0] for i in range(50)])
    assert values.min() == 0 and values.max() == 1
    assert np.array_equal(values * 16, (values * 16).round())


def test_a_batch_is_the_same_as_its_examples_one_by_one():
    data = load_data("digits")
    batches = DataLoader(data.train, batch_size=100, collate_fn=collate)
    start = 0
    for x, y in batches:
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        for i in range(0, len(y), 37):
            alone, label = data.train[start + i]
            assert np.array_equal(x[i].numpy(), alone) and y[i] == label
        start += len(y)
    assert start == len(data.train)


def test_collate_stacks_examples_into_a_batch():
    x, y = collate([(torch.zeros(2), 1), (torch.ones(2), 0)])
    assert x.tolist() == [[0, 0], [1, 1]] and y.tolist() == [1, 0] and y.dtype == torch.int64


def test_arrays_hold_uint8():
    held = arrays(np.full((4, 2), 51, np.uint8), np.arange(4), "here")
    assert isinstance(held, Arrays) and held.x.dtype == np.uint8
    assert np.allclose(held[0][0], 0.2)


def test_the_seed_moves_validation_but_never_test():
    a, again, b = (load_data("digits", seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(a.validation.x, again.validation.x) and np.array_equal(
        a.train.x, again.train.x
    )
    assert not np.array_equal(a.validation.x, b.validation.x)
    assert np.array_equal(a.test.x, b.test.x)


def test_sets_are_disjoint_and_complete():
    x = np.arange(200, dtype=np.float32).reshape(100, 2)
    np.savez("d.npz", x=x, y=labels(100))
    data = load_data("npz:d.npz", validation=0.25)
    rows = [part.x[:, 0].tolist() for part in (data.train, data.validation, data.test)]
    assert [len(r) for r in rows] == [60, 20, 20]
    assert sorted(rows[0] + rows[1] + rows[2]) == x[:, 0].tolist()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_stratified_fractions(fraction):
    y = np.repeat([0, 1, 5], [500, 99, 1]).astype(np.int64)
    keep, held = stratified(y, fraction, seed=3)
    assert sorted(np.concatenate([keep, held])) == list(range(600))
    for label, count in ((0, 500), (1, 99), (5, 1)):
        given = int((y[held] == label).sum())
        assert abs(given - fraction * count) < 2 and given < count
    assert len(held) == min(round(600 * fraction), 597)


def test_the_split_of_a_seed_is_frozen():
    # A recipe names a seed; another numpy must not mean another split.
    _, held = stratified(np.array([0, 1] * 10), 0.3, seed=0)
    assert held.tolist() == [1, 8, 10, 17, 18, 19]


# IDX


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 1, 3, 4)])
def test_idx_of_every_type(kind, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    for content in (idx(array), gzip.compress(idx(array))):
        found = parse_idx(content, "f")
        assert found.shape == shape and found.dtype == np.dtype(f">{kind}")
        assert (found == array).all()


def test_idx_bytes_written_out():
    assert parse_idx(bytes.fromhex("00000b01 00000002 0102 ffff"), "f").tolist() == [258, -1]


def test_idx_folder(tmp_path):
    data = load_data(f"idx:{idx_folder(tmp_path)}")
    assert (data.input_shape, data.classes) == ((1, 5, 4), 3)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 12)
    assert np.allclose(data.test[1][0].flatten() * 255, np.arange(20.0, 40.0))


def test_idx_other_types_are_not_scaled_and_channels_stay(tmp_path):
    x = np.full((40, 3, 2, 2), -300, np.int16)
    idx_folder(tmp_path, train_images=idx(x), t10k_images=gzip.compress(idx(x[:12])))
    data = load_data(f"idx:{tmp_path}")
    assert data.input_shape == (3, 2, 2) and (data.train[0][0] == -300).all()


def test_idx_prefers_the_plain_file_to_its_gz(tmp_path):
    idx_folder(tmp_path)
    (tmp_path / "train-images-idx-ubyte.gz").write_bytes(b"left over")
    assert len(load_data(f"idx:{tmp_path}").test) == 12


WHOLE = idx(np.zeros((40, 5, 4), np.uint8))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (WHOLE[:-1], "815 bytes found, 816 expected for uint8 [40, 5, 4]; the file is cut short"),
        (WHOLE + b"x", "817 bytes found, 816 expected for uint8 [40, 5, 4]; the file is too long"),
        (WHOLE[:9], "9 bytes found, 16 expected for a header of 3 axes"),
        (b"", "starts with the bytes (none), expected an IDX header"),
        (b"\x89PNG" + WHOLE, "starts with the bytes 89 50 4e 47"),
        (b"\0\0\x0a\x03" + WHOLE[4:], "starts with the bytes 00 00 0a 03"),
        (gzip.compress(WHOLE, mtime=0)[:-20], "gzip stream ends early"),
        (gzip.compress(WHOLE, mtime=0)[:-8] + b"12345678", "gzip stream is corrupt"),
        (b"\x1f\x8b\x08\0" + b"\xff" * 99, "gzip stream is corrupt"),
        (WHOLE[:4] + struct.pack(">I", 0) + WHOLE[8:16], "x has shape [0, 1, 5, 4]"),
        (idx(np.zeros(40, np.uint8)), "x has shape [40], expected [examples, ...]"),
        (idx(np.zeros((39, 5, 4), np.uint8)), "39 examples but 40 labels"),
        (idx(np.zeros((40, 5, 5), np.uint8)), "have shape [1, 5, 5], test examples [1, 5, 4]"),
    ],
)
def test_bad_idx_images(tmp_path, content, says):
    idx_folder(tmp_path, train_images=content)
    fails(f"idx:{tmp_path}", says, str(tmp_path))


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (np.zeros((40, 1), np.uint8), "y has shape [40, 1], expected [examples]"),
        (np.zeros(40, np.float32), "labels have dtype >f4"),
        (np.arange(40, dtype=np.int8) - 2, "label -2 in example 0, expected integers from 0"),
        (np.full(40, 3, np.uint8), "all 40 training examples have label 3"),
    ],
)
def test_bad_idx_labels(tmp_path, y, says):
    idx_folder(tmp_path, train_labels=idx(y))
    fails(f"idx:{tmp_path}", says)


def test_idx_folder_lacks_a_file(tmp_path):
    idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx-ubyte").unlink()
    fails(f"idx:{tmp_path}", "files t10k-labels*: none; expected exactly one")
    (tmp_path / "t10k-labels-a").touch()
    (tmp_path / "t10k-labels-b").touch()
    fails(f"idx:{tmp_path}", "t10k-labels-a, t10k-labels-b; expected exactly one")


# MNIST


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Four small files that count as canonical, by name."""
    folder = tmp_path / "origin"
    folder.mkdir()
    idx_folder(folder)
    contents = {
        name: (folder / f"{short}-idx-ubyte").read_bytes()
        for name, short in zip(idx_file.MNIST, IDX_NAMES, strict=True)
    }
    checksums = {name: idx_file._md5(content) for name, content in contents.items()}
    monkeypatch.setattr(idx_file, "MNIST", checksums)
    return contents


def test_mnist_is_downloaded_once_into_the_cache(small_mnist, tmp_path, monkeypatch):
    asked = []

    def serve(url, timeout):
        asked.append(url)
        if url.startswith(idx_file.MIRRORS[0]):
            if "labels" in url:
                return io.BytesIO(gzip.compress(b"some other file"))
            raise urllib.error.HTTPError(url, 503, "busy", {}, None)
        name = url.removeprefix(idx_file.MIRRORS[1]).removesuffix(".gz")
        return io.BytesIO(gzip.compress(small_mnist[name]))

    monkeypatch.setattr(idx_file.urllib.request, "urlopen", serve)
    first = load_data("mnist")
    assert len(asked) == 8 and all(url.startswith("https://") for url in asked)
    stored = tmp_path / "cache" / "prune2onnx" / "mnist"
    assert sorted(p.name for p in stored.iterdir()) == sorted(f"{n}.gz" for n in small_mnist)
    assert np.array_equal(load_data("mnist").train.x, first.train.x)
    assert np.array_equal(load_data(f"mnist:{stored}").train.x, first.train.x)
    assert len(asked) == 8


def test_mnist_without_network_says_where_the_files_belong(tmp_path):
    message = fails("mnist", "cannot be downloaded", "no network in tests", "mnist:DIR")
    for name in idx_file.MNIST:
        assert f"{name}.gz" in message
    assert str(tmp_path / "cache" / "prune2onnx" / "mnist") in message
    assert all(mirror in message for mirror in idx_file.MIRRORS)
    assert not (tmp_path / "cache").exists()


def test_mnist_checksum(small_mnist, tmp_path):
    name = "t10k-images-idx3-ubyte"
    for key, content in small_mnist.items():
        Path(key).write_bytes(content if key != name else content[:-1] + b"!")
    fails(f"mnist:{tmp_path}", name, "md5", idx_file.MNIST[name], "not the canonical MNIST")


def test_mirrors_that_all_give_something_else(small_mnist, tmp_path, monkeypatch):
    answers = iter([b"<html>sign in</html>", gzip.compress(WHOLE)[:30]])
    monkeypatch.setattr(
        idx_file.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(next(answers))
    )
    fails("mnist", "md5", "ends early", "cannot be downloaded")
    assert not (tmp_path / "cache").exists()


# Folders of images


def test_folder_with_train_and_test(tmp_path):
    class_folders(tmp_path / "train", 10, "ba")
    class_folders(tmp_path / "test", 3, "ab")
    (tmp_path / "README").touch()
    (tmp_path / "train" / "a" / ".DS_Store").touch()
    data = load_data(f"folder:{tmp_path}")
    assert (data.input_shape, data.classes) == ((1, 3, 4), 2)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)
    assert data.test.y.tolist() == [0, 0, 0, 1, 1, 1]  # a, b: by name
    assert [round(255 * float(data.test[i][0][0, 0, 0])) for i in range(6)] == [
        0, 1, 2, 100, 101, 102,
    ]  # fmt: skip
    assert data.train.x.dtype == np.uint8


def test_folder_of_classes(tmp_path):
    data = load_data(f"folder:{class_folders(tmp_path)}")
    assert (len(data.train), len(data.validation), len(data.test)) == (14, 2, 4)


def test_a_class_may_be_called_train(tmp_path):
    class_folders(tmp_path, 10, "ab")
    for i in range(10):
        save(tmp_path / "train" / f"{i}.png")
    assert load_data(f"folder:{tmp_path}").classes == 3


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    class_folders(tmp_path)
    save(tmp_path / "a" / "99.png", mode="RGB", value=200)
    data = load_data(f"folder:{tmp_path}")
    assert data.input_shape == (3, 3, 4)
    x = np.concatenate([data.train.x, data.validation.x, data.test.x])[:, :, 0, 0].tolist()
    assert [200, 0, 0] in x and [100, 100, 100] in x


def test_bad_folders(tmp_path):
    fails(f"folder:{tmp_path / 'none'}", "no such folder")
    fails("folder:", "no such folder")
    fails(f"folder:{tmp_path}", "no folders in it")
    class_folders(tmp_path / "one", classes="a")
    fails(f"folder:{tmp_path / 'one'}", "all 10 training examples have label 0")
    fails(f"folder:{tmp_path}", "a folder inside a class", "one")
    root = class_folders(tmp_path / "hollow")
    (root / "c").mkdir()
    fails(f"folder:{root}", "c: a class without images")
    (tmp_path / "file").touch()
    fails("folder:file", "file: is not a folder")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_bytes(b"no image"), "not a readable image"),
        (lambda p: p.write_bytes(p.read_bytes()[:45]), "not a readable image"),
        (lambda p: p.write_bytes(b""), "not a readable image"),
        (lambda p: save(p, width=5), "5x3 pixels, but"),
        (lambda p: Image.new("I;16", (4, 3)).save(p), "deeper than 8 bits (mode I;16"),
    ],
)
def test_bad_images_are_named(tmp_path, damage, says):
    bad = class_folders(tmp_path) / "b" / "05.png"
    damage(bad)
    message = fails(f"folder:{tmp_path}", says, str(bad))
    if "pixels, but" in message:
        assert f"{tmp_path / 'a' / '00.png'} has 4x3" in message


def test_train_and_test_must_agree(tmp_path):
    class_folders(tmp_path / "train", 10, "abc")
    class_folders(tmp_path / "test", 2, "ab")
    fails(f"folder:{tmp_path}", "class 'c' is in train/ but not in test/")
    class_folders(tmp_path / "test", 2, "cd")
    fails(f"folder:{tmp_path}", "class 'd' is in test/ but not in train/")
    class_folders(tmp_path / "val", 2, "abc")
    fails(f"folder:{tmp_path}", "has val/ beside train/")


# npz


def test_npz(tmp_path):
    x, y = np.random.default_rng(0).random((50, 6)), labels(50).astype(np.int64)
    np.savez("all.npz", x_train=x, y_train=y, x_test=x[:9] + 1, y_test=y[:9], more=1)
    np.savez_compressed("train.npz", x_train=x, y_train=y)
    both = load_data("npz:all.npz")
    assert (both.input_shape, len(both.train), len(both.validation)) == ((6,), 45, 5)
    assert np.array_equal(both.test.x, (x[:9] + 1).astype(np.float32))
    assert len(load_data(f"npz:{tmp_path / 'train.npz'}").test) == 10


def test_npz_of_pixels_is_scaled_like_images():
    x = np.full((40, 5, 4), 255, np.uint8)
    np.savez("d.npz", x=x, y=labels(40))
    data = load_data("npz:d.npz")
    assert data.input_shape == (1, 5, 4) and (data.train[0][0] == 1).all()


X = np.zeros((20, 4), np.float32)
Y = labels(20)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a": X}, "holds a but no x; expected x_train, y_train"),
        ({"x_train": X}, "but no y_train"),
        ({"x_train": X, "y_train": Y, "x_test": X}, "but no y_test"),
        ({"x": np.array([None] * 20), "y": Y}, "Object arrays cannot be loaded"),
        ({"x": X, "y": Y.astype(float)}, "labels have dtype float64, expected integers"),
        ({"x": X, "y": np.eye(20)}, "use y.argmax(1) for one-hot"),
        ({"x": X, "y": Y[:19]}, "20 examples but 19 labels"),
        ({"x": X, "y": Y.astype(int) - 1}, "label -1 in example 0"),
        ({"x": X, "y": Y.astype(np.uint64) + 2**63}, "label 9223372036854775808 in example 0"),
        ({"x": X, "y": Y * 0}, "all 20 training examples have label 0"),
        ({"x": X[:, 0], "y": Y}, "x has shape [20], expected [examples, ...]"),
        ({"x": np.where(np.arange(80) == 41, np.nan, 0).reshape(20, 4), "y": Y},
         "x is nan in example 10 at [1] (1 such values)"),
        ({"x": X.astype(float) + 1e300, "y": Y}, "x is inf in example 0"),
        ({"x": X.astype(complex), "y": Y}, "x has dtype complex128"),
        ({"x": X.astype(str), "y": Y}, "x has dtype <U32"),
        ({"x": X[:0], "y": Y[:0]}, "x has shape [0, 4] and is empty"),
        ({"x": X[:2], "y": Y[:2]}, "too few to hold 20% out for test"),
        ({"x_train": X[:4], "y_train": Y[:4], "x_test": X, "y_test": Y},
         "too few to hold 10% out for validation"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y},
         "training examples have shape [4], test examples [3]"),
    ],
)  # fmt: skip
def test_bad_npz(entries, says):
    np.savez("d.npz", **entries)
    fails("npz:d.npz", says, "d.npz")


def test_files_that_are_not_npz():
    fails("npz:none.npz", "no such file")
    np.save("single.npy", X)
    np.savez("whole.npz", x=X, y=Y)
    whole = Path("whole.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[:300])
    damaged = bytearray(whole)
    damaged[130:200] = bytes(70)
    Path("damaged.npz").write_bytes(damaged)
    Path("text.npz").write_text("x, y")
    Path("empty.npz").touch()
    for name in ("single.npy", "cut.npz", "damaged.npz", "text.npz", "empty.npz"):
        fails(f"npz:{name}", name, "not an .npz archive of plain arrays")


# The user's own

OWN_DATASET = """
class Own(torch.utils.data.Dataset):
    def __init__(self, n, **more): self.n = n; self.__dict__.update(more)
    def __len__(self): return self.n
    def __getitem__(self, i):
        assert 0 <= i < self.n
        return np.full((2, 3), i, np.float64), i % 4
"""


@pytest.mark.parametrize(
    ("returns", "counts"),
    [
        ("np.zeros((50, 2)), np.arange(50) % 4", (36, 4, 10)),
        ("[torch.zeros(50, 2, requires_grad=True), torch.arange(50) % 4]", (36, 4, 10)),
        ("(np.zeros((50, 2)), np.arange(50) % 4), (torch.ones(9, 2), torch.zeros(9).int())",
         (45, 5, 9)),
        ("Own(50), Own(8)", (45, 5, 8)),
        ("Own(50)", (36, 4, 10)),
        ("Own(50, targets=[i % 4 for i in range(50)]), Own(8, targets=['dog'] * 8)", (45, 5, 8)),
        ("torch.utils.data.TensorDataset(torch.ones(50, 2).bfloat16(), torch.arange(50) % 4)",
         (36, 4, 10)),
        ("Data('mine', Own(5), Own(6), Own(7), (2, 3), 4)", (5, 6, 7)),
    ],
)  # fmt: skip
def test_own_data(returns, counts):
    name = script(OWN_DATASET + "from prune2onnx.data import Data\n"
                  f"def data(): return {returns}\n")  # fmt: skip
    data = load_data(f"{name}:data")
    assert (len(data.train), len(data.validation), len(data.test)) == counts
    assert data.classes == 4 and data.input_shape in ((2,), (2, 3))
    seen = []
    for part in (data.train, data.validation, data.test):
        for x, y in DataLoader(part, batch_size=3, collate_fn=collate):
            assert x.dtype == torch.float32 and x.shape == (len(y), *data.input_shape)
            assert y.dtype == torch.int64
            if x.ndim == 3:
                assert (x[:, 0, 0] % 4 == y).all()
                seen += x[:, 0, 0].tolist()
    if returns == "Own(50)":
        assert sorted(seen) == list(range(50))


def test_own_data_is_given_seed_and_validation():
    script("def d(seed, validation): return np.full((9, 1), seed + validation), np.arange(9) % 2\n")
    assert load_data("own.py:d", seed=3, validation=0.25).train[0][0].item() == 3.25


def test_own_data_in_a_module():
    Path("own_package").mkdir()
    script("from own_package import _ as f\n", "own_package/inner.py")
    script("def _(): return np.zeros((20, 2)), np.arange(20) % 2\n", "own_package/__init__.py")
    script("from own_package.inner import f as data\n", "own_module.py")
    for spec in ("own_package.inner:f", "own_module:data"):
        assert len(load_data(spec).test) == 4


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        ("None", "returned a NoneType; expected Data, (train, test)"),
        ("1, 2", "train is a int; expected Data"),
        ("(np.zeros((9, 2)), np.arange(9)), None", "test is a NoneType"),
        ("(np.zeros((9, 2)), np.arange(9)), (np.zeros((9, 3)), np.arange(9))",
         "training examples have shape [2], test examples [3]"),
        ("np.zeros((9, 2)), np.zeros(9)", "labels have dtype float64"),
        ("np.zeros((9, 2)), np.arange(9) - 4", "label -4 in example 0"),
        ("np.zeros((9, 2)), np.ones(9, int)", "all 9 training examples have label 1"),
        ("(np.zeros((9, 2)), [[0], [1, 2]]), Own(3)", "train: y is a list, expected an array"),
        ("Own(0)", "the dataset is empty"),
        ("Bad(lambda i: i)", "example 0 is a int, expected a pair (x, y)"),
        ("Bad(lambda i: ('a', 0))", "example 0: x is a str, expected a tensor"),
        ("Bad(lambda i: (1.0, 0))", "example 0: x has shape [] and dtype float64"),
        ("Bad(lambda i: (np.zeros(2), 0.5))", "example 0: label 0.5 is a float"),
        ("Bad(lambda i: (np.zeros(2), i - 1))", "label -1 in example 0"),
        ("Bad(lambda i: (np.zeros(i + 1), i))", "example 1 has shape [2] but example 0 has [1]"),
        ("Bad(lambda i: (np.zeros(2) / (i != 2), i))", "example 2: x holds NaN"),
        ("Bad(lambda i: 1 / (2 - i) and (np.zeros(2), i))",
         "example 2: reading it raised ZeroDivisionError"),
        ("Stream()", "a Stream has no length and no order"),
        ("Data('d', Own(5), Own(0), Own(5), (2, 3), 4)", "validation: the dataset is empty"),
        ("Data('d', Own(5), Own(5), Own(5), (2, 3), 3)",
         "train: label 3, expected labels 0 ... 2 (classes is 3)"),
        ("Data('d', Own(5), Own(5), Own(5), (1, 3), 4)",
         "examples have shape [2, 3], but input_shape is [1, 3]"),
        ("Data('d', Own(5), Own(5), Own(5), (2, 3), 1)", "classes is 1, expected at least 2"),
    ],
)  # fmt: skip
def test_bad_own_data(returns, says):
    script(
        OWN_DATASET
        + f"""
from prune2onnx.data import Data
class Bad(Own):
    def __init__(self, item): self.item, self.n = item, 9
    def __getitem__(self, i):
        with np.errstate(all="ignore"): return self.item(i)
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): yield 1
def data(): return {returns}
"""
    )
    fails("own.py:data", says, "own.py:data")


# Sources that are none


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digit", "did you mean digits?"),
        ("MNIST:some/dir", "did you mean mnist:some/dir?"),
        ("foldr:pictures", "did you mean folder:pictures?"),
        ("", "unknown source; expected digits, mnist[:DIR]"),
        ("cifar", "unknown source; expected digits, mnist[:DIR]"),
        ("some", "did you mean folder:some or idx:some?"),
        ("d.npz", "did you mean npz:d.npz?"),
        ("digits:d", "it reads no file"),
        ("no_file:f", "unknown source"),
    ],
)
def test_unknown_source(spec, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "no_file", types.ModuleType("no_file"))  # as __main__ may be
    Path("some").mkdir()
    Path("d.npz").touch()
    with pytest.raises(RecipeError, match=re.escape(says)):
        load_data(spec)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_validation_fraction(fraction):
    with pytest.raises(RecipeError, match="expected a fraction between 0 and 1"):
        load_data("digits", validation=fraction)


def test_missing_idx_folder():
    fails("idx:nowhere", "nowhere: no such folder; expected idx:DIR")


def fails(spec: str, *says: str) -> str:
    """Expects one line that says all of this."""
    with pytest.raises(Prune2OnnxError) as caught:
        load_data(spec)
    message = str(caught.value)
    assert "\n" not in message
    for words in says:
        assert words in message
    return message


# Real data


def test_real_mnist(real):
    data = load_data(f"mnist:{real / 'mnist'}")  # checks the four md5 sums
    assert (data.input_shape, data.classes) == ((1, 28, 28), 10)
    assert (len(data.train), len(data.validation), len(data.test)) == (54_000, 6_000, 10_000)
    held = np.bincount(data.validation.y)
    whole = np.bincount(data.train.y) + held
    assert np.abs(held - whole / 10).max() < 1
    # The well-known mean of the training pixels.
    total = data.train.x.sum(dtype=np.float64) + data.validation.x.sum(dtype=np.float64)
    assert total / 60_000 / 784 / 255 == pytest.approx(0.1307, abs=5e-5)
    loader = DataLoader(data.train, batch_size=128, shuffle=True, collate_fn=collate)
    assert sum(len(y) for _, y in loader) == 54_000


def test_real_letters(real):
    data = load_data(f"idx:{real / 'emnist-letters'}")
    assert (data.input_shape, data.classes) == ((1, 28, 28), 26)
    assert (len(data.train), len(data.validation), len(data.test)) == (23_400, 2_600, 10_400)
    assert np.bincount(data.validation.y).tolist() == [100] * 26


def test_real_images(real, tmp_path):
    images = {"train": 40, "test": 10}
    with tarfile.open(real / "cifar10-jpeg.tar.gz") as archive:
        wanted = {(part, c): n // 2 for part, n in images.items() for c in ("airplane", "cat")}
        for member in archive:
            key = tuple(member.name.split("/")[:2])
            if member.isfile() and wanted.get(key):
                wanted[key] -= 1
                archive.extract(member, tmp_path, filter="data")
            if not any(wanted.values()):
                break
    data = load_data(f"folder:{tmp_path}")
    assert (data.input_shape, data.classes) == ((3, 32, 32), 2)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 10)
    first = sorted((tmp_path / "test" / "airplane").iterdir())[0]
    pixels = torch.tensor(np.asarray(Image.open(first))).permute(2, 0, 1) / 255
    assert np.allclose(data.test[0][0], pixels)


def test_a_label_far_above_the_others_is_pointed_out(tmp_path):
    x, y = np.zeros((100, 4), np.float32), np.arange(100) % 10
    np.savez(tmp_path / "d.npz", x=x, y=np.where(y == 9, 1000, y))
    with pytest.warns(DataWarning, match=r"1,001 classes, and 991 of them .* 9 the first"):
        assert load_data(f"npz:{tmp_path / 'd.npz'}").classes == 1001
