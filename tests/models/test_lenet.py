"""The example networks, and the user's functions that the command line loads like them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

from prune2onnx.callables import call_with, load_callable
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.runs.recipe import read_recipe, resolve

LENET = ROOT / "models" / "lenet.py"


def build(name: str, **available: object) -> torch.nn.Module:
    spec = f"{LENET}:{name}"
    return call_with(load_callable(spec), spec, **available)


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_name_a_network_beside_them(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = resolve(read_recipe(path), source=str(path))
    model = call_with(load_callable(recipe.model), recipe.model)
    assert isinstance(model, torch.nn.Module) and path.stem == recipe.model.rpartition(":")[2]


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("lenet_300_100", 266_610, ["fc1", "fc2", "fc3"]),
        ("lenet5", 431_080, ["conv1", "conv2", "fc1", "fc2"]),  # both counts: Han et al. 2015
    ],
)
def test_defaults_are_the_networks_of_the_literature(name, parameters, layers):
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [key for key, _ in model.named_children() if key != "dropout"] == layers
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("lenet_300_100", (1, 8, 8), 10),
        ("lenet_300_100", (64,), 2),
        ("lenet5", (1, 16, 16), 4),
        ("lenet5", (3, 17, 40), 26),
    ],
)
def test_other_shapes_and_classes(name, shape, classes):
    model = build(name, input_shape=shape, classes=classes, unasked=1)
    assert model(torch.zeros(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 8, 8), "at least 16x16, not 8x8"), ((1, 28, 15), "not 28x15"), ((64,), r"\[64\]")],
)
def test_lenet5_says_what_it_needs(shape, says):
    with pytest.raises(Prune2OnnxError, match=says) as caught:
        build("lenet5", input_shape=shape, classes=10)
    assert isinstance(caught.value.__cause__, ValueError)


# The user's functions


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Works in an empty folder, with an import path that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("own.py", "names no function: expected path/to/file.py:name"),
        ("own.py:", "write for example own.py:NAME"),
        ("none.py:f", "none.py: no such file"),
        ("owm.py:make", "did you mean own.py?"),
        ("dir/own.txt:f", "is not a .py file"),
        ("folder.py:f", "cannot be read"),
        ("own.py:maek", "has no 'maek', expected a function there; did you mean 'make'?"),
        ("own.py:zzzzzz", "it has: make, quit_"),
        ("own.py:value", "'value' is a value of type int, expected a function"),
        ("raises.py:f", "importing it raised ZeroDivisionError: division by zero (line 3)"),
        ("exits.py:f", "importing it raised SystemExit: 2 (line 2)"),
        ("syntax.py:f", "importing it raised SyntaxError"),
        ("needs.py:f", "importing it raised ModuleNotFoundError: No module named 'no_such'"),
        ("no_such.thing:f", "no module 'no_such' in"),
        ("os.no_such:f", "no module 'os.no_such' in"),
        ("needs:f", "needs: importing it raised ModuleNotFoundError: No module named 'no_such'"),
    ],
)
def test_bad_callables(spec, says, elsewhere):
    Path("own.py").write_text("value = 3\ndef make(): pass\ndef quit_(): raise SystemExit\n")
    Path("raises.py").write_text("def f():\n\n    return 1 / 0\n\nf()\n")
    Path("exits.py").write_text("import sys\nsys.exit(2)\n")
    Path("syntax.py").write_text("def f(:\n")
    Path("needs.py").write_text("import no_such\n")
    Path("folder.py").mkdir()
    with pytest.raises(Prune2OnnxError) as caught:
        load_callable(spec)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    if "raised" in says:
        assert caught.value.__cause__ is not None


def test_a_file_runs_once_for_each_content_and_sees_its_neighbours(elsewhere):
    Path("sub").mkdir()
    Path("sub/neighbour.py").write_text("three = 3\n")
    Path("sub/torch.py").write_text("raise ImportError('hides torch')\n")
    file = Path("sub/file.py")
    file.write_text("def f():\n    import neighbour, torch\n    return neighbour.three\n")
    first = load_callable("sub/file.py:f")
    assert first() == 3
    assert load_callable("./sub/file.py:f") is first
    file.write_text("def f(): return 4\n")
    assert load_callable("sub/file.py:f")() == 4


def test_call_with_passes_what_the_signature_takes():
    def takes(seed, *, classes=2, other=5):
        return seed, classes, other

    assert call_with(takes, "f", seed=1, classes=3, input_shape=(1,)) == (1, 3, 5)
    assert call_with(lambda: 7, "f", seed=1) == 7
    assert call_with(lambda **all: all, "f", seed=1, a=2) == {"seed": 1, "a": 2}
    assert call_with(dict, "f", seed=1) in ({}, {"seed": 1})  # no signature before Python 3.13


def test_call_with_fails_readably():
    def demands(width, seed=0):
        pass

    def raises(seed):
        raise KeyError("no\nsuch")

    def ours():
        raise Prune2OnnxError("as it is")

    with pytest.raises(Prune2OnnxError, match=r"f\.py:f requires the argument 'width'"):
        call_with(demands, "f.py:f", seed=1)
    with pytest.raises(Prune2OnnxError, match=r"with \(seed=1\) raised KeyError: ") as caught:
        call_with(raises, "f.py:f", seed=1)
    assert isinstance(caught.value.__cause__, KeyError) and "\n" not in str(caught.value)
    with pytest.raises(Prune2OnnxError, match=r"^as it is$"):
        call_with(ours, "f.py:f")
    with pytest.raises(Prune2OnnxError, match="raised SystemExit"):
        call_with(sys.exit, "f.py:f")
