"""Checkpoints: plain files, and runs that continue from them end in the same bits."""

import pytest
from safetensors.torch import load_file
from tiny import states, tiny_conv, tiny_mlp, tiny_recipe
from torch import nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.runs.history import Callbacks
from prune2onnx.runs.recipe import PHASES
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.fit import fit

DEPLOYMENT = Deployment((1, 6, 6))
"""Of one network, so that it is exported once."""


class _KilledError(Exception):
    """Stands for a kill at any moment; the next test uses a real one."""


RECIPE = tiny_recipe(**{"channels.epochs": 2})


@pytest.fixture(scope="module")
def whole(tiny_data):
    """A run that nothing interrupts."""
    return fit(tiny_conv(), tiny_data, RECIPE, deployment=DEPLOYMENT)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("moment", ["in the epoch", "after the epoch"])
def test_a_resumed_run_ends_in_the_same_bits(phase, moment, whole, tiny_data, tmp_path):
    known = {"deployment": DEPLOYMENT, "checkpoints": tmp_path}

    def kill(event):
        if event.phase == phase and event.epoch == 2:
            raise _KilledError

    stops = Callbacks(on_step=kill) if moment == "in the epoch" else Callbacks(on_epoch=kill)
    with pytest.raises(_KilledError):
        fit(tiny_conv(), tiny_data, RECIPE, callbacks=stops, **known)
    fresh = tiny_conv()
    nn.init.ones_(fresh[0].weight)  # the initial weights must not matter any more
    rest = fit(fresh, tiny_data, RECIPE, resume=True, **known)
    assert states(rest.model) == states(whole.model)
    assert rest.pruned == whole.pruned
    assert [e.density for e in rest.history] == [e.density for e in whole.history]
    assert {k: v.numpy().tobytes() for k, v in rest.dense.items()} == {
        k: v.numpy().tobytes() for k, v in whole.dense.items()
    }


def test_checkpoints_are_plain_safetensors_and_a_new_run_removes_them(tiny_data, tmp_path):
    fit(tiny_mlp(), tiny_data, tiny_recipe(), checkpoints=tmp_path)
    there = sorted(p.stem for p in tmp_path.iterdir())
    assert there == sorted(set(PHASES) - {"channels"})  # not asked for
    tiny_mlp().load_state_dict(load_file(tmp_path / "tune.safetensors"))
    again = fit(tiny_mlp(), tiny_data, tiny_recipe(seed=5), checkpoints=tmp_path)
    assert len(again.history) == 10
    path = tmp_path / "tune.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Prune2OnnxError, match=r"tune\.safetensors: not a checkpoint"):
        fit(tiny_mlp(), tiny_data, tiny_recipe(seed=5), checkpoints=tmp_path, resume=True)


def test_a_checkpoint_of_other_settings_is_refused(tiny_data, tmp_path):
    fit(tiny_mlp(), tiny_data, tiny_recipe(), checkpoints=tmp_path)
    with pytest.raises(Prune2OnnxError, match="made with another recipe or other data"):
        fit(tiny_mlp(), tiny_data, tiny_recipe(seed=7), checkpoints=tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tiny_data, tmp_path):
    fit(tiny_mlp(), tiny_data, tiny_recipe(), checkpoints=tmp_path)
    with pytest.raises(Prune2OnnxError, match="does not fit the model"):
        fit(tiny_conv(), tiny_data, tiny_recipe(), checkpoints=tmp_path, resume=True)
