"""The user's network: what its function is given, and weights saved by wrappers."""

import pytest
import torch
from torch import nn

from prune2onnx.data import load_data
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.runs.recipe import resolve
from prune2onnx.training.model import make_model

WRAPPED = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
NETS = """
import torch
from torch import nn
def compiled(classes): return torch.compile(nn.Linear(2, classes), backend="eager")
def classes(classes): return nn.Linear(2, classes)
def num_classes(num_classes): return nn.Linear(2, num_classes)
def keywords(**given):
    assert set(given) == {"input_shape", "classes"}
    return nn.Linear(2, given["classes"])
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize("name", ["classes", "num_classes", "keywords"])
def test_the_number_of_classes_is_filled_in_by_either_name(name, nets):
    data = load_data("digits")
    model = make_model(resolve({"model": f"{nets}:{name}", "data": "digits"}), data)
    assert model.out_features == data.classes


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_saved_from_a_wrapped_network_fit(prefix, nets, tmp_path):
    data = load_data("digits")
    state = nn.Linear(2, data.classes).state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "w.pt")
    recipe = {"model": f"{nets}:classes", "data": "digits", "weights": str(tmp_path / "w.pt")}
    model = make_model(resolve(recipe), data)
    assert torch.equal(model.weight, state["weight"])
    torch.save({"other.weight": state["weight"]}, tmp_path / "w.pt")
    with pytest.raises(Prune2OnnxError, match="does not fit the model"):
        make_model(resolve(recipe), data)


def test_a_compiled_network_is_made_without_what_is_around_it(nets):
    data = load_data("digits")
    model = make_model(resolve({"model": f"{nets}:compiled", "data": "digits"}), data)
    assert set(model.state_dict()) == {"weight", "bias"}
