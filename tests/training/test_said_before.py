"""What a training says before it starts; and BatchNorm's statistics before it is folded."""

import pytest
import torch
from tiny import tiny_conv, tiny_mlp, tiny_recipe
from torch import nn

from prune2onnx.errors import PruningWarning
from prune2onnx.runs.history import Callbacks
from prune2onnx.training import loop
from prune2onnx.training.batch_statistics import with_own_statistics
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


def test_statistics_are_those_of_the_batches_without_dropout():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3, momentum=0.3), nn.ReLU())
    x = torch.randn(64, 3) * 5 + 2
    fresh = with_own_statistics(model, [x[:32], x[32:], x[:1]])
    torch.testing.assert_close(fresh[1].running_mean, x.mean(0))
    variances = torch.stack([x[:32].var(0), x[32:].var(0)]).mean(0)
    torch.testing.assert_close(fresh[1].running_var, variances)
    assert fresh[1].momentum == 0.3 and not fresh.training
    assert not model[1].running_mean.any()
    assert with_own_statistics(tiny_mlp(), [x]) is None


@pytest.mark.parametrize("stale", [True, False])
def test_statistics_are_renewed_where_validation_data_agree(stale, tiny_data, monkeypatch):
    """Statistics of the tune phase are fine, so wrong ones have to be made."""
    real = loop.with_own_statistics

    def made(model, batches):
        fresh = real(model, batches)
        with torch.no_grad():
            (model if stale else fresh)[1].running_mean += 100
        return fresh

    monkeypatch.setattr(loop, "with_own_statistics", made)
    assert fit(tiny_conv(), tiny_data, tiny_recipe(**ONCE)).error < 60
