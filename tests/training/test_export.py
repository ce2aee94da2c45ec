"""Export: names and values are kept, nothing is superfluous or printed, any batch runs."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from tiny import tiny_conv, tiny_mlp
from torch import nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.training.export import export


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


def test_a_model_that_cannot_be_traced_is_named():
    class Dynamic(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(Prune2OnnxError, match=r"Dynamic: torch.onnx cannot export the model"):
        export(Dynamic(), (3,))
