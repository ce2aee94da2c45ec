"""Export: names and values are kept, nothing is superfluous or printed, any batch runs."""

import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.utils.prune as torch_prune
from onnx import numpy_helper
from tiny import tiny_conv, tiny_mlp
from torch import nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning import bake, prune
from prune2onnx.runtime.session import session
from prune2onnx.training.export import Template, export


class Sequence(nn.Module):
    """A linear layer over a sequence, which the exporter writes as MatMul with W transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.embed(x)).mean(1))


@pytest.mark.parametrize(
    ("network", "shape"),
    [(tiny_mlp, (1, 6, 6)), (tiny_conv, (1, 6, 6)), (Sequence, (5, 4))],
)
def test_onnxruntime_gives_torchs_output_for_any_batch(network, shape):
    model = network().eval()
    graph = export(model, shape)
    session = ort.InferenceSession(graph.SerializeToString())
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        (got,) = session.run(None, {"input": x.numpy()})
        np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("network", "shape"), [(tiny_mlp, (1, 6, 6)), (Sequence, (5, 4))])
def test_parameters_keep_their_names_and_bits(network, shape):
    model = network()
    stored = {t.name: numpy_helper.to_array(t) for t in export(model, shape).graph.initializer}
    for name, value in model.state_dict().items():
        value = value.numpy()
        assert stored[name].tobytes() in (value.tobytes(), value.T.copy().tobytes())


def test_the_file_holds_the_weights_and_little_else():
    model = tiny_mlp()
    graph = export(model, (1, 6, 6))
    weights = sum(4 * p.numel() for p in model.parameters())
    assert graph.ByteSize() < weights + 700
    assert not graph.metadata_props and not graph.producer_name
    assert not any(node.metadata_props or node.name for node in graph.graph.node)
    assert graph.ir_version <= 9  # onnxruntime 1.17 reads no newer one
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_newer_opset_is_honoured():
    graph = export(tiny_mlp(), (1, 6, 6), opset=20)
    assert [entry.version for entry in graph.opset_import] == [20]
    onnx.checker.check_model(graph, full_check=True)


def test_nothing_is_printed_and_the_model_is_not_changed(capfd):
    model = tiny_conv().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, (1, 6, 6))
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Forward(nn.Module):
    """A layer, and a forward to try."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)


class Branch(Forward):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


class Loop(Forward):
    def forward(self, x):
        while x.sum() < 10:
            x = x + 1
        return self.a(x)


class Two(Forward):
    def forward(self, x, y):
        return self.a(x) + y


class Raises(Forward):
    def forward(self, x):
        raise KeyError("nope")


class Bessel(Forward):
    def forward(self, x):
        return torch.special.bessel_j0(self.a(x))


class Nothing(Forward):
    def forward(self, x):
        return None


class PerExample(Forward):
    def forward(self, x):
        return torch.stack([self.a(row) for row in x])


class TwoAlone(Forward):
    def forward(self, x):
        return self.a(x) if len(x) == 2 else -self.a(x)


class Whole(Forward):
    def forward(self, x):
        return self.a(x).view(2, 2)


def compiled() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Branch, r"by values of its input \(test_export\.py:\d+: return self\.a\(x\) if"),
        (Loop, r"by values of its input \(test_export\.py:\d+: while .*; use torch\.where"),
        (Two, r"missing 1 required positional argument: 'y'; it is given one tensor"),
        (Raises, r"its forward fails: KeyError: 'nope' \(test_export\.py:\d+\)"),
        (Bessel, r"ONNX has no operator for \w+\.\w*bessel_j0; compute it otherwise"),
        (Nothing, r"its forward returns a NoneType, expected a tensor"),
        (PerExample, "forward fixes the batch size: the exported graph takes 2 examples"),
        (TwoAlone, "forward fixes the batch size"),
        (Whole, "forward fixes the batch size"),
        (lambda: nn.Sequential(nn.Embedding(9, 3)), r"indices.*inside forward, as by x\.long\(\)"),
        (lambda: nn.Linear(5, 2), r"\(2x4 and 5x2\); it was given a float32 input \[2, 4\]"),
        (lambda: nn.Linear(4, 2).half(), r"same dtype.*convert the model by model\.float\(\)"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), r"0\.weight: not initialised yet"),
        (compiled, r"compiled torch\.jit module; give the module that it was made from"),
    ],
)
def test_the_cause_is_in_one_short_line(make, says, capfd):
    with pytest.raises(Prune2OnnxError, match=says) as raised:
        export(make(), (4,))
    text = str(raised.value)
    assert len(text) < 420 and "step 1/3" not in text and "\\n" not in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["old weight_norm", "old spectral_norm", "new", "prune", "removed"])
def test_computed_weights_are_stored_under_the_layers_name(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    if how == "old weight_norm":
        nn.utils.weight_norm(model[0])
    elif how == "old spectral_norm":
        nn.utils.spectral_norm(model[0])
    elif how == "new":
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.spectral_norm(model[2])
    else:
        every = [(model[0], "weight"), (model[2], "weight"), (model[0], "bias")]
        torch_prune.global_unstructured(
            every, pruning_method=torch_prune.L1Unstructured, amount=0.9
        )
        if how == "removed":
            for layer, name in every:
                torch_prune.remove(layer, name)
    model(torch.randn(4, 8)).sum().backward()
    model.eval()
    x = torch.randn(5, 8)
    graph = export(model, (8,))
    stored = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    assert stored.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    (got,) = session(graph).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    if how in ("prune", "removed"):
        zeros = sum(int((stored[name] == 0).sum()) for name in ("0.weight", "0.bias", "2.weight"))
        assert zeros == round(0.9 * (128 + 16 + 32))
    template = Template(model, (8,))
    assert template.exact
    assert template.filled(model).SerializeToString() == graph.SerializeToString()


def test_what_is_around_a_model_is_taken_off():
    model = tiny_mlp()
    plain = export(model, (1, 6, 6)).SerializeToString()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert export(wrapped, (1, 6, 6)).SerializeToString() == plain


def test_a_model_with_thresholds_is_exported_as_it_would_be_baked():
    model = prune(tiny_mlp(), start=0.9).eval()
    with_thresholds = export(model, (1, 6, 6))
    bake(model)
    assert with_thresholds.SerializeToString() == export(model, (1, 6, 6)).SerializeToString()
