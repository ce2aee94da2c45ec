"""The file that a network would become: a filled template is an export, dead parts are gone."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import FileOptions
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.export import Template, export


def network(inputs: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString()).run(None, {"input": x})[0]


class Transposed(nn.Module):
    """Its weight is stored transposed: x @ W.T without a bias is a MatMul."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.reshape(-1, 2, 6)).flatten(1)


@pytest.mark.parametrize(("make", "shape"), [(network, (12,)), (Transposed, (12,))])
def test_a_filled_template_is_the_export(make, shape):
    first, other = make(), make()
    template = Template(first, shape)
    assert template.exact
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    assert template.filled(other) == export(other, shape)


def test_values_are_assigned_to_parameters():
    model, template = Transposed(), Template(Transposed(), (12,))
    graph = template.filled(model)
    name = "fc.weight"
    (tensor,) = [t for t in graph.graph.initializer if t.name == name]
    wanted = numpy_helper.to_array(tensor) * 2
    before = model.fc.weight.detach().clone()
    template.assign(model, {name: wanted})
    assert torch.equal(model.fc.weight, 2 * before)
    template.assign(model, {name: wanted * 3, "something else": wanted})
    assert torch.equal(model.fc.weight, 2 * before)  # some of a change would be wrong


class Doubled(nn.Module):
    """The exporter folds the doubling into its weight, so that the graph holds another value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.flip(0) * 2)


def test_a_network_whose_parameters_are_not_in_the_graph_is_exported_again():
    torch.manual_seed(0)
    first, other = Doubled(), Doubled()
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    filled = Template(first, (12,)).filled(other)
    with torch.no_grad():
        expected = other(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(outputs(filled, x), expected, rtol=1e-5, atol=1e-6)


def dying() -> nn.Sequential:
    """Two neurons have no inputs and a constant output, one is not read."""
    model = network()
    with torch.no_grad():
        model[0].weight[[1, 5]] = 0
        model[0].bias[1], model[0].bias[5] = 2.0, -2.0
        model[2].weight[:, 7] = 0
    return model


def test_constants_are_propagated_and_dead_parts_zeroed_with_the_same_outputs():
    model, x = dying().eval(), torch.randn(9, 12)
    before = model(x)
    Deployment((12,)).propagate_constants(model)
    torch.testing.assert_close(model(x), before)
    for neuron in (1, 5, 7):
        assert not model[0].weight[neuron].any() and not model[0].bias[neuron]
        assert not model[2].weight[:, neuron].any()


def test_the_file_has_no_dead_neuron_and_the_same_outputs():
    model, x = dying().eval(), torch.randn(9, 12)
    deployment = Deployment((12,))
    packed = deployment.pack(model)
    assert deployment.nbytes(model) == packed.model.ByteSize()
    shapes = {row.name: row.shape for row in packed.rows}
    assert shapes["0.weight"] == (13, 12) and shapes["2.weight"] == (16, 13)
    np.testing.assert_allclose(
        outputs(packed.model, x.numpy()), model(x).detach().numpy(), rtol=1e-4, atol=1e-5
    )


def test_unused_inputs_are_left_out_where_that_is_smaller():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 60), nn.ReLU(), nn.Linear(60, 3)).eval()
    with torch.no_grad():
        model[0].weight[:, 40:] = 0
        for parameter in model.parameters():
            parameter.copy_((parameter * 100).round() / 128)
    packed = Deployment((400,)).pack(model)
    assert {row.name: row.shape for row in packed.rows}["0.weight"] == (60, 40)
    x = torch.randn(4, 400)
    np.testing.assert_allclose(
        outputs(unpack(packed.model), x.numpy()), model(x).detach().numpy(), rtol=1e-4, atol=1e-5
    )


def test_anonymous_weights_have_the_shortest_names():
    named, anonymous = (
        Deployment((12,), FileOptions(anonymize=choice)).pack(dying()).model
        for choice in (False, True)
    )
    assert anonymous.ByteSize() < named.ByteSize() - 30
    assert b"0.weight" not in anonymous.SerializeToString()


def test_a_portable_file_has_no_functions():
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
    packed = Deployment((200,), FileOptions(portable=True)).pack(model).model
    assert is_packed(packed) and not packed.functions


@pytest.mark.parametrize(("compute", "element_type"), [("int8", "INT8"), ("int4", "UINT8")])
def test_the_size_that_training_measures_is_of_what_computes(compute, element_type):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    with torch.no_grad():  # levels of training, -7 ... 7
        for parameter in model.parameters():
            parameter.copy_((parameter * 50).round().clamp(-7, 7) / 64 + 0)  # no -0
    steps = dict.fromkeys(dict(model.named_parameters()), 1 / 64)
    deployment = Deployment((64,), FileOptions(compute=compute))
    packed = deployment.pack(model, steps).model
    assert deployment.nbytes(model, steps) == packed.ByteSize()
    plain = unpack(packed)
    weight = next(t for t in plain.graph.initializer if t.name == "0.weight")
    assert weight.data_type == getattr(onnx.TensorProto, element_type)
    x = torch.randn(9, 64)
    want, got = model(x).detach().numpy(), outputs(packed, x.numpy())
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)  # activations are rounded
    as_float = deployment.pack(model, steps, compute="float32").model
    np.testing.assert_allclose(outputs(as_float, x.numpy()), want, rtol=1e-4, atol=1e-5)
