"""Networks with several inputs, tokens and several outputs: exported, trained, judged."""

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tiny import tiny_recipe
from torch import nn

from prune2onnx import Metric, Task, export, fit, load_task
from prune2onnx.data import Arrays, Data
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.tasks.task import TASKS
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.scoring import check_output, evaluated


class Two(nn.Module):
    """Tokens and numbers to two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(7, 8), nn.Linear(8 + 3, 4)

    def forward(self, tokens, numbers):
        x = torch.cat([self.embed(tokens).mean(1), numbers], 1)
        scores = self.fc(x)
        return {"scores": scores, "features": x}


TOKENS, NUMBERS = torch.arange(10).reshape(2, 5) % 7, torch.ones(2, 3)


def ran(graph, inputs):
    opened = ort.InferenceSession(graph.SerializeToString())
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(None, inputs), strict=True)), opened


@pytest.mark.parametrize("named", [True, False])
def test_several_inputs_and_outputs_are_exported_with_their_names(named):
    torch.manual_seed(0)
    model = Two().eval()
    example = {"tokens": TOKENS, "numbers": NUMBERS} if named else (TOKENS, NUMBERS)
    graph = export(model, example)
    five = {"tokens": np.zeros((5, 5), np.int64), "numbers": np.ones((5, 3), np.float32)}
    outputs, opened = ran(graph, five)
    assert [i.type for i in opened.get_inputs()] == ["tensor(int64)", "tensor(float)"]
    assert list(outputs) == ["scores", "features"]
    with torch.no_grad():
        wanted = model(*(torch.from_numpy(value) for value in five.values()))
    for name, value in outputs.items():
        assert np.allclose(value, wanted[name], atol=1e-6)


def test_names_and_open_axes_can_be_chosen():
    graph = export(
        Two(),
        (TOKENS, NUMBERS),
        input_names=("ids", "facts"),
        output_names=("a", "b"),
        dynamic_shapes={"ids": {0: "batch", 1: "length"}},
    )
    inputs = {"ids": np.zeros((3, 9), np.int64), "facts": np.ones((3, 3), np.float32)}
    outputs, opened = ran(graph, inputs)
    assert list(outputs) == ["a", "b"] and outputs["a"].shape == (3, 4)
    assert opened.get_inputs()[0].shape == ["batch", "length"]


def test_a_batch_of_one_example_stays_open():
    graph = export(Two(), (TOKENS[:1], NUMBERS[:1]))
    outputs, _ = ran(
        graph, {"tokens": np.zeros((4, 5), np.int64), "numbers": np.ones((4, 3), np.float32)}
    )
    assert outputs["scores"].shape == (4, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"input_names": ("a",)}, "input_names are a, expected 2 different ones"),
        ({"dynamic_shapes": {"ids": {0: "n"}}}, "dynamic_shapes name 'ids', the inputs are tokens"),
        ({"dynamic_shapes": {"tokens": {4: "n"}}}, "input tokens has 2 axes, and no axis 4"),
    ],
)
def test_names_that_do_not_fit_are_one_clear_error(options, says):
    with pytest.raises(Prune2OnnxError, match=says):
        export(Two(), (TOKENS, NUMBERS), **options)


def test_inputs_that_do_not_fit_the_model_are_named():
    with pytest.raises(Prune2OnnxError, match=r"its forward fails: TypeError.*int64"):
        export(Two(), {"tokens": TOKENS})
    with pytest.raises(Prune2OnnxError, match="example inputs are of type str"):
        export(Two(), ("a", "b"))
    with pytest.raises(Prune2OnnxError, match="either example_inputs or input_shape"):
        export(Two())


def arrays(x, y) -> Data:
    parts = [slice(0, 200), slice(200, 260), slice(260, 320)]

    def split(part):
        cut = {k: v[part] for k, v in x.items()} if isinstance(x, dict) else x[part]
        return Arrays(cut, cut if y is x else y[part])

    train, validation, test = map(split, parts)
    dtype = {k: str(v.dtype) for k, v in x.items()} if isinstance(x, dict) else str(x.dtype)
    return Data("made", train, validation, test, train.shape, 4, dtype)


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((320, *shape)).astype(np.float32)


def made(name: str) -> tuple[Data, nn.Module]:
    """Data that a small network can learn, and the network."""
    torch.manual_seed(0)
    x = drawn(12)
    mix = np.random.default_rng(1).standard_normal((12, 4)).astype(np.float32)
    mlp = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 4))
    tokens = np.cumsum(np.ones((320, 7), np.int64), 1) + np.arange(320)[:, None] % 3
    words = nn.Sequential(nn.Embedding(10, 24), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 11))
    image = drawn(1, 4, 4)
    if name == "segmentation":
        return arrays(image, (image[:, 0] > 0).astype(np.int64)), nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1)
        )
    if name in ("token-classification", "language-modelling"):
        data = arrays(tokens[:, :-1], tokens[:, 1:])
        return dataclasses.replace(data, classes=11, tokens=11), words
    if name == "reconstruction":
        return arrays(x, x), nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 12))
    if name == "multi-label":
        return arrays(x, (x @ mix > 0).astype(np.float32)), mlp
    return arrays(x, x @ mix + 50), mlp


@pytest.mark.parametrize(
    "name", [name for name in TASKS if name not in ("classification", "distillation")]
)
def test_every_task_is_learned_and_pruned(name):
    data, model = made(name)
    task = load_task(name)
    before, _ = evaluated(model, data.validation, task)
    recipe = tiny_recipe(**{"dense.epochs": 12, "dense.lr": 2e-2, "batch_size": 20, "distill": 0.5})
    fitted = fit(model, data, recipe, task=task)
    first = task.metric.name
    assert task.metric.badness(fitted.dense_error) < task.metric.badness(before[first])
    assert task.metric.badness(fitted.error) < task.metric.badness(before[first])
    assert fitted.density < 0.5
    epoch = fitted.history[-1]
    assert list(epoch.metrics) == [metric.name for metric in task.metrics]
    assert epoch.validation_error is None and np.isfinite(epoch.value)


def test_distillation_needs_a_trained_network_and_no_targets():
    data, model = made("regression")
    data = dataclasses.replace(
        data,
        **{name: Arrays(getattr(data, name).x, None) for name in ("train", "validation", "test")},
    )
    task = load_task("distillation")
    with pytest.raises(Prune2OnnxError, match="no targets but the outputs of a trained network"):
        evaluated(model, data.validation, task)
    fitted = fit(model, data, tiny_recipe(), task=task, start="prune")
    assert fitted.dense_error == 0 and 0 < fitted.error < 100


def test_two_inputs_are_trained_and_their_file_is_measured():
    torch.manual_seed(0)
    x = {"tokens": np.arange(320 * 5).reshape(320, 5) % 7, "numbers": drawn(3)}
    data = arrays(x, np.arange(320) % 4)
    deployment = Deployment({"tokens": TOKENS, "numbers": NUMBERS})
    fitted = fit(Two(), data, tiny_recipe(), deployment=deployment)
    packed = deployment.pack(fitted.model, fitted.steps)
    assert {"tokens", "numbers"} == {value.name for value in packed.model.graph.input}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("segmentation", r"returns \[2, 4\].*expected scores \[2, 4, 1\]"),
        ("multi-label", r"returns \[2, 4\].*expected scores \[2, 1\]: one for each label"),
        ("regression", r"returns \[2, 4\].*expected numbers \[2, 1\]: one for each target"),
    ],
)
def test_a_model_that_does_not_fit_the_task_is_one_clear_error(name, says):
    data, model = made("regression")
    targets = {"segmentation": np.zeros((2, 1), np.int64)}.get(name, np.zeros((2, 1), np.float32))
    data = dataclasses.replace(data, train=Arrays(data.train.x[:2], targets))
    with pytest.raises(Prune2OnnxError, match=says):
        check_output(model, data, load_task(name))


def test_a_loss_of_ones_own_that_fails_is_one_clear_error():
    data, model = made("regression")
    metric = Metric("error", lambda made, wanted: np.array([1.0, 1.0]))
    fails = Task("own", lambda made, wanted: made @ wanted, (metric,))
    with pytest.raises(
        Prune2OnnxError, match=r"task own: its loss fails on outputs float32 \[2, 4"
    ):
        check_output(model, data, fails)
    vector = Task("own", lambda made, wanted: (made - wanted).square().mean(1), (metric,))
    with pytest.raises(Prune2OnnxError, match=r"its loss returns \[2\], expected a scalar"):
        check_output(model, data, vector)
