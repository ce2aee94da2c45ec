"""Examples of any shape: what a task makes of them, from every source, and what does not fit."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from prune2onnx.data import Data, Images, batches, collate, load_data, with_integers
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.tasks.losses import squared_loss
from prune2onnx.tasks.metrics import IGNORED, RMSE
from prune2onnx.tasks.structure import leaves
from prune2onnx.tasks.task import TASKS, Task


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Works in an empty folder, with an import path that is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())


def own(body: str, task: str = "classification", **options) -> Data:
    """The data of a function that is written into a file."""
    text = "import numpy as np, torch\nfrom torch.utils.data import *\nn = 40\n"
    text += "tokens = np.arange(n * 5).reshape(n, 5) % 7\n"
    text += "classes = np.arange(n) % 3\n"
    path = Path("own.py")
    path.write_text(f"{text}def data():\n    return {body}\n")
    return load_data(f"{path.resolve()}:data", task=TASKS[task], **options)


@pytest.mark.parametrize(
    ("body", "shape", "dtype"),
    [
        ("(np.ones((n, 2)), classes)", (2,), "float32"),
        ("({'a': tokens, 'b': np.ones((n, 2))}, classes)", {"a": (5,), "b": (2,)}, None),
        ("((tokens, np.ones((n, 2))), classes)", ((5,), (2,)), None),
        ("TensorDataset(torch.ones(n, 2), torch.ones(n, 3), torch.tensor(classes))", None, None),
    ],
)
def test_inputs_are_an_array_a_tuple_or_a_dict(body, shape, dtype):
    data = own(body)
    shape = ((2,), (3,)) if shape is None else shape
    assert data.input_shape == shape and data.classes == 3
    if dtype:
        assert data.input_dtype == dtype
    (x, y) = next(iter(DataLoader(data.train, batch_size=4, collate_fn=collate)))
    assert y.dtype == torch.int64 and y.shape == (4,)
    for array, wanted in zip(leaves(x), leaves(data.input_dtype), strict=True):
        assert len(array) == 4 and str(array.dtype) == f"torch.{wanted}"
    given, _ = next(batches(data.test, 4))
    assert [len(array) for array in leaves(given)] == [4] * len(leaves(x))


CLASS = """
class Words(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return {{"ids": torch.arange(5) + i % 3, "mask": torch.ones(5), "labels": i % 3}}
def padded(batch):
    return {{key: torch.tensor(np.array([item[key] for item in batch])) for key in batch[0]}}
def data():
    return {result}
"""


@pytest.mark.parametrize(
    "result",
    [
        "Words()",
        "DataLoader(Words(), batch_size=7)",
        "DataLoader(Words(), batch_size=7, collate_fn=padded)",
    ],
)
def test_datasets_and_loaders_of_dicts_have_their_labels_in_them(result):
    head = "import numpy as np, torch\nfrom torch.utils.data import *\n"
    Path("own.py").write_text(head + CLASS.format(result=result))
    data = load_data("own.py:data")
    assert data.input_shape == {"ids": (5,), "mask": (5,)} and data.tokens == 7
    assert data.input_dtype == {"ids": "int64", "mask": "float32"} and data.classes == 3
    x, y = next(iter(DataLoader(data.train, batch_size=9, collate_fn=collate)))
    assert torch.equal(x["ids"][:, 0], y)
    sizes = [len(part) for part in (data.train, data.validation, data.test)]
    assert sum(sizes) == 40 and min(sizes) > 0


def test_npz_has_several_inputs_by_name():
    np.savez("d.npz", x_left=np.ones((30, 2)), x_right=np.zeros((30, 4), int), y=np.arange(30) % 2)
    data = load_data("npz:d.npz")
    assert data.input_shape == {"left": (2,), "right": (4,)} and data.classes == 2
    both = {f"{part}_{split}{name}": np.ones((30, 2)) for part in "x" for split in ("train", "test")
            for name in ("_a", "_b")}  # fmt: skip
    np.savez("e.npz", **both, y_train=np.ones(30), y_test=np.ones(30))
    data = load_data("npz:e.npz", task=TASKS["regression"])
    assert data.input_shape == {"a": (2,), "b": (2,)} and len(data.test) == 30
    np.savez("f.npz", x=np.ones((30, 2)), x_b=np.ones((30, 2)), y=np.ones(30))
    with pytest.raises(Prune2OnnxError, match="one array without a name beside b"):
        load_data("npz:f.npz", task=TASKS["regression"])


def test_a_language_model_learns_the_next_token():
    data = own("tokens.astype(np.uint8)", "language-modelling")
    x, y = data.train[0]
    assert x.dtype == y.dtype == np.int64 and np.array_equal(x[1:], y[:-1])
    assert (data.input_shape, data.classes, data.tokens) == ((4,), 7, 7)
    given = own("(tokens, (tokens + 1) % 7)", "language-modelling")
    assert given.input_shape == (5,)
    with pytest.raises(Prune2OnnxError, match=r"targets are int64 \[40\].* expected no targets"):
        own("(tokens, classes)", "language-modelling")
    with pytest.raises(Prune2OnnxError, match="inputs have dtype float64, expected integers"):
        own("np.ones((n, 4))", "language-modelling")


def test_a_reconstruction_has_its_inputs_as_targets_and_labels_are_ignored():
    digits = load_data("digits", task=TASKS["reconstruction"])
    for data in (own("np.ones((n, 2))", "reconstruction"), digits):
        x, y = data.train[0]
        assert np.array_equal(x, y) and x.dtype == np.float32
    x, y = data.train[0]
    assert x.max() == 1  # pixels are scaled, in the targets, too


def test_regression_takes_numbers_of_any_shape():
    data = own("(np.ones((n, 2)), np.arange(n) / 2)", "regression")
    assert data.train[0][1].dtype == np.float32 and data.classes == 1
    assert own("(np.ones((n, 2)), np.ones((n, 3)))", "regression").classes == 3


@pytest.mark.parametrize(
    ("task", "body", "says"),
    [
        ("regression", "np.ones((n, 2))", "has no targets, and task regression needs numbers"),
        ("classification", "(np.ones((n, 2)), None)", "has no targets, and task classification"),
        ("regression", "(np.ones((n, 2)), np.full(n, np.nan))", "targets are nan at [0]"),
        ("multi-label", "(np.ones((n, 2)), classes)", "needs 0 or 1 for each label"),
        ("multi-label", "(np.ones((n, 2)), np.full((n, 3), 0.5))", "needs 0 or 1 for each label"),
        ("segmentation", "(np.ones((n, 1, 4, 4)), np.ones((n, 4, 4)))", "needs integer classes"),
        ("segmentation", "(np.ones((n, 1, 4, 4)), classes)", "needs integer classes"),
        ("token-classification", "(tokens, classes)", "needs integer classes"),
        ("token-classification", "(tokens, -tokens)", "class -6, expected integers from 0"),
        ("regression", "(np.ones((n, 2)), np.ones(n - 1))", "expected as many examples in each"),
        ("regression", "({}, classes)", "train is a dict; expected Data"),
        ("regression", "(np.full((n, 2), 'a'), classes)", "inputs have dtype <U1"),
        ("classification", "({'a': tokens}, np.ones(n))", "needs integers from 0"),
    ],
)
def test_data_that_do_not_fit_the_task_are_one_clear_error(task, body, says):
    with pytest.raises(Prune2OnnxError, match=re.escape(says)):
        own(body, task)


def test_tokens_may_come_with_other_inputs():
    data = own("({'ids': tokens, 'mask': np.ones((n, 5))}, tokens)", "token-classification")
    assert data.input_dtype == {"ids": "int64", "mask": "float32"} and data.tokens == 7


def test_an_ignored_class_is_no_class():
    data = own("(tokens, np.where(tokens > 4, -100, tokens))", "token-classification")
    assert data.classes == 5 and IGNORED in data.train.y


def test_a_task_of_ones_own_makes_its_own_batches():
    task = Task("ahead", squared_loss, (RMSE,), batch=lambda x, y: (x[:, :-1], x[:, -1:]))
    Path("own.py").write_text("import numpy as np\ndef data():\n    return np.ones((40, 5))\n")
    data = load_data("own.py:data", task=task)
    assert data.input_shape == (4,) and data.train[0][1].shape == (1,)
    bad = Task("ahead", squared_loss, (RMSE,), batch=lambda x, y: (x[:, :-1], y + 1))
    with pytest.raises(Prune2OnnxError, match="task ahead: its batch fails on inputs float32"):
        load_data("own.py:data", task=bad)


def test_integers_alone_are_numbers_until_a_model_asks_for_integers():
    data = own("(tokens, classes)")
    assert data.input_dtype == "float32"
    integers = with_integers(data)
    assert integers is not None
    assert (integers.input_dtype, integers.tokens) == ("int64", 7)
    assert integers.train[0][0].dtype == np.int64
    assert with_integers(own("(np.ones((n, 2)), classes)")) is None


# Images


def save(path: Path, size: tuple[int, int], value: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(path)


def test_images_are_resized_cropped_and_normalised():
    for name in "ab":
        for i in range(10):
            save(Path("d") / name / f"{i}.png", (12 + i, 10), 51 if name == "a" else 255)
    images = Images((8,), (6,), (0.2, 0.0, 0.0), (0.5,))
    data = load_data("folder:d", images=images)
    assert data.input_shape == (3, 6, 6)
    x, y = next(iter(DataLoader(data.train, batch_size=16, collate_fn=collate)))
    assert torch.allclose(x[y == 0][:, 0], torch.tensor(0.0), atol=1e-6)
    assert torch.allclose(x[y == 1][:, 0], torch.tensor(1.6), atol=1e-6)
    with pytest.raises(RecipeError, match="crop 40x40 of an image of"):
        load_data("folder:d", images=Images((8,), (40,)))
    with pytest.raises(RecipeError, match="resize and crop are for folder:DIR"):
        load_data("digits", images=Images((8,)))
    with pytest.raises(RecipeError, match="mean has 2 values, the images have 3 channels"):
        load_data("folder:d", images=Images((8,), (6,), (0.1, 0.2)))


def test_folders_of_images_and_masks_are_for_segmentation():
    for i in range(20):
        save(Path("d/images") / f"{i:02}.png", (6, 4), 9 * i)
        save(Path("d/masks") / f"{i:02}.png", (6, 4), 255 if i == 3 else i % 3, "L")
    data = load_data("folder:d", task=TASKS["segmentation"])
    assert (data.input_shape, data.classes) == ((3, 4, 6), 3)
    assert data.train[0][1].shape == (4, 6) and data.train[0][1].dtype == np.int64
    every = np.concatenate([part.y for part in (data.train, data.validation, data.test)])
    assert (every == IGNORED).sum() == 24 and every.max() == 2
    half = load_data("folder:d", task=TASKS["segmentation"], images=Images((2,)))
    assert half.train[0][1].shape == (2, 3) and half.classes == 3
    Path("d/masks/05.png").unlink()
    with pytest.raises(Prune2OnnxError, match=r"05.png: no mask masks/05.\*"):
        load_data("folder:d", task=TASKS["segmentation"])
