"""What a training says before it starts."""

import pytest
import torch
from tiny import tiny_mlp, tiny_recipe
from torch import nn

from prune2onnx.errors import PruningWarning
from prune2onnx.runs.history import Callbacks
from prune2onnx.training.fit import fit
from prune2onnx.training.scoring import warn_of_saturation

ONCE = {f"{phase}.epochs": 1 for phase in ("dense", "prune", "tune", "quantize")}


def test_fit_says_before_training_that_thresholds_have_too_few_steps(tiny_data):
    recipe = tiny_recipe(**ONCE, **{"prune.threshold_lr": 0.01})

    def stopped(*_):
        raise KeyboardInterrupt

    with (
        pytest.warns(PruningWarning, match=r"rise for 4 of 6 steps, but need about 3\d\d"),
        pytest.raises(KeyboardInterrupt),
    ):
        fit(tiny_mlp(), tiny_data, recipe, callbacks=Callbacks(on_step=stopped))


@pytest.mark.filterwarnings("error")
def test_enough_steps_or_no_goal_say_nothing(tiny_data):
    fit(tiny_mlp(), tiny_data, tiny_recipe(**{**ONCE, "prune.epochs": 3}))
    slow = {"prune.threshold_lr": 0.01, "prune.pressure": 0.0}
    fit(tiny_mlp(), tiny_data, tiny_recipe(**ONCE, **slow))


class Scaled(nn.Sequential):
    """Outputs between 0 and 255."""

    def forward(self, x):
        return 255 * super().forward(x).view(len(x), -1)


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (nn.Sigmoid(), "come from a sigmoid"),
        (nn.Softmax(1), "come from a softmax"),
        (nn.Tanh(), "come from a tanh"),
        (nn.LogSoftmax(1), None),
        (nn.ReLU(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_outputs_that_saturate_are_warned_of(last, says, tiny_data, recwarn):
    model = Scaled(nn.Flatten(), nn.Linear(36, 3), last).train()
    warn_of_saturation(model, tiny_data, torch.device("cpu"))
    assert model.training
    said = [str(one.message) for one in recwarn]
    assert len(said) == (says is not None) and (not said or says in said[0])
