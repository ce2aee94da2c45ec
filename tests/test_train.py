"""Training: the phases do what they say, errors name epoch and step, runs repeat and continue."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import blobs, tiny_conv, tiny_mlp, tiny_recipe
from safetensors.torch import load_file
from torch import nn

from prune2onnx.deployment import Deployment
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.training import PHASES, evaluate, fit, with_epochs


def states(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("network", [tiny_mlp, tiny_conv])
def test_the_four_phases_learn_prune_and_share(network, tiny_data):
    epochs = []
    fitted = fit(network(), tiny_data, tiny_recipe(**{"prune.epochs": 8}), on_epoch=epochs.append)
    assert [e.phase for e in epochs] == ["dense"] * 3 + ["prune"] * 8 + ["tune"] * 2 + ["share"] * 2
    assert fitted.history == tuple(epochs)
    assert not fitted.model.training
    error, _ = evaluate(fitted.model, tiny_data.test)
    assert error < 15
    nnz = size = 0
    for name in fitted.pruned:
        weight = fitted.model.get_parameter(name)
        nnz, size = nnz + int(weight.count_nonzero()), size + weight.numel()
        assert weight[weight != 0].unique().numel() <= 16
    assert nnz / size == pytest.approx(fitted.density)
    assert fitted.density <= epochs[-1].density
    assert 0.05 < nnz / size < 0.5
    # the dense network is kept as it was before pruning
    dense = network()
    dense.load_state_dict(fitted.dense)
    assert evaluate(dense, tiny_data.test)[0] < 15
    # masks hold while tuning; the last phase may make zeros of a few more
    tuned, ended = [e.density for e in epochs[-4:-2]], [e.density for e in epochs[-2:]]
    assert len(set(tuned)) == 1 and max(ended) <= tuned[0]


def test_batch_norm_is_folded_before_values_are_shared(tiny_data):
    fitted = fit(tiny_conv(), tiny_data, tiny_recipe())
    assert isinstance(fitted.model[1], nn.Identity)
    assert fitted.model[0].weight.unique().numel() <= 17


@pytest.mark.parametrize("goal", [0.3, 0.1])
def test_a_wanted_density_is_met_within_two_percent(goal, tiny_data):
    recipe = tiny_recipe(**{"prune.epochs": 20, "target_density": goal})
    assert 0.98 * goal < fit(tiny_mlp(), tiny_data, recipe).density <= goal


def test_a_density_is_kept_while_the_last_phase_can_still_make_up_for_it(tiny_data):
    recipe = tiny_recipe(
        **{
            "share.epochs": 4,
            "share.levels": 127,
            "target_density": 0.2,
            "prune.threshold_lr": 0.05,
        }
    )
    fitted = fit(tiny_mlp(), tiny_data, recipe)
    ends = [epoch.density for epoch in fitted.history if epoch.phase == "share"]
    assert ends[0] > 0.2 >= ends[1] >= ends[2]  # culled after the second, at the latest
    assert 0.15 < fitted.density <= 0.2


def test_whole_channels_go_first_and_stay_away(tiny_data, tmp_path):
    recipe = tiny_recipe(**{"narrow.epochs": 10, "narrow.spare": 2.0, "prune.epochs": 10})
    deployment = Deployment(tiny_data.input_shape, recipe.opset)
    fitted = fit(tiny_mlp(), tiny_data, recipe, checkpoints=tmp_path, deployment=deployment)
    narrow = load_file(tmp_path / "narrow.safetensors")
    first, second = narrow["1.weight"], narrow["3.weight"]
    alive = (first != 0).any(1)
    assert 2 <= alive.sum() < 40
    assert (first[alive] != 0).float().mean() > 0.9  # no single weight was pruned
    assert not (second[:, ~alive] != 0).any()
    left = (int(first.count_nonzero()) + int(second.count_nonzero())) / (36 * 40 + 40 * 3)
    assert 0.25 < left <= 2.0 * 0.2
    for name, weight in (("1.weight", first), ("3.weight", second)):
        assert not (fitted.model.get_parameter(name) != 0)[weight == 0].any()
    assert fitted.density <= 0.2
    assert fitted.error < 15


def test_biases_become_levels_or_half_precision_where_accuracy_allows(tiny_data):
    recipe = tiny_recipe(**{"share.small_levels": 4, "share.slack": 100.0})
    model = fit(tiny_mlp(), tiny_data, recipe).model
    assert all(model[i].bias.unique().numel() <= 9 for i in (1, 3))
    exact = fit(tiny_mlp(), tiny_data, tiny_recipe(**{"share.small_levels": 1, "share.slack": 0.0}))
    for bias in (exact.model[1].bias, exact.model[3].bias):
        assert bias.unique().numel() <= 3 or torch.equal(bias, bias.half().float())


def test_a_run_repeats_itself_and_a_seed_changes_it(tiny_data):
    first, again = (fit(tiny_conv(), tiny_data, tiny_recipe()) for _ in range(2))
    assert states(first.model) == states(again.model)
    other = fit(tiny_conv(), tiny_data, tiny_recipe(seed=1))
    assert states(first.model) != states(other.model)


def test_the_processors_mode_is_put_back(tiny_data):
    fit(tiny_mlp(), tiny_data, tiny_recipe())
    assert float(torch.tensor(1e-39) * 0.5) > 0  # a denormal


def test_bfloat16_trains_and_leaves_float32(tiny_data):
    fitted = fit(tiny_conv(), tiny_data, tiny_recipe(precision="bf16"))
    assert {p.dtype for p in fitted.model.parameters()} == {torch.float32}
    assert evaluate(fitted.model, tiny_data.test)[0] < 20


def test_every_phase_trains_in_the_precision_of_the_run(tiny_data):
    seen = {}

    class Told(nn.Conv2d):
        def forward(self, x):
            made = super().forward(x)
            if self.training:
                seen.setdefault(len(ended), set()).add(made.dtype)
            return made

    ended = []
    model = tiny_conv()
    model[0] = Told(1, 8, 3, bias=False)
    recipe = tiny_recipe(precision="bf16", **{"narrow.epochs": 2})
    phases = {"dense": 3, "narrow": 2, "prune": 3, "tune": 2, "share": 2}
    deployment = Deployment(tiny_data.input_shape, recipe.opset)
    fit(model, tiny_data, recipe, on_epoch=ended.append, deployment=deployment)
    assert [e.phase for e in ended] == [name for name, n in phases.items() for _ in range(n)]
    for epoch, kinds in seen.items():
        assert kinds == {torch.bfloat16}, ended[epoch].phase


def test_the_teacher_answers_in_the_precision_of_the_run(tiny_data):
    answered = set()

    class Told(nn.Linear):
        def forward(self, x):
            scores = super().forward(x)
            answered.add((self.weight.requires_grad, scores.dtype))  # only a teacher's is frozen
            return scores

    model = nn.Sequential(nn.Flatten(), Told(36, tiny_data.classes))
    fit(model, tiny_data, tiny_recipe(precision="bf16", distill=1.0))
    assert (False, torch.bfloat16) in answered


DEPLOYMENT = Deployment((1, 6, 6), 18)
"""For one network; it exports that once."""


class _KilledError(Exception):
    """Stands for a kill at any moment; the next test uses a real one."""


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("moment", ["in the epoch", "after the epoch"])
def test_a_continued_run_ends_in_the_same_bits(phase, moment, tiny_data, tmp_path):
    recipe = tiny_recipe(**{"narrow.epochs": 2})
    known = {"deployment": DEPLOYMENT}
    whole = fit(tiny_conv(), tiny_data, recipe, **known)

    def kill(event):
        if event.phase == phase and event.epoch == 2:
            raise _KilledError

    stops = {"on_step": kill} if moment == "in the epoch" else {"on_epoch": kill}
    with pytest.raises(_KilledError):
        fit(tiny_conv(), tiny_data, recipe, checkpoints=tmp_path, **known, **stops)
    fresh = tiny_conv()
    nn.init.ones_(fresh[0].weight)  # what the model starts from must not matter any more
    rest = fit(fresh, tiny_data, recipe, checkpoints=tmp_path, resume=True, **known)
    assert states(rest.model) == states(whole.model)
    assert rest.pruned == whole.pruned
    assert [e.density for e in rest.history] == [e.density for e in whole.history]
    assert {k: v.numpy().tobytes() for k, v in rest.dense.items()} == {
        k: v.numpy().tobytes() for k, v in whole.dense.items()
    }


def test_checkpoints_are_plain_safetensors_and_a_new_run_forgets_them(tiny_data, tmp_path):
    fit(tiny_mlp(), tiny_data, tiny_recipe(), checkpoints=tmp_path)
    there = sorted(p.stem for p in tmp_path.iterdir())
    assert there == sorted(set(PHASES) - {"narrow"})  # not asked for
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


def test_frozen_excluded_and_normalised_layers_are_left_as_they_are(tiny_data):
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 40),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)),
        nn.ReLU(),
        nn.Linear(40, 40),
        nn.Linear(40, 3),
    )
    model[1].requires_grad_(False)
    frozen, excluded = model[1].weight.detach().clone(), []
    recipe = tiny_recipe(**{"prune.exclude": ["3", "5"], "share.slack": 100.0})

    def remember(epoch):
        if epoch.phase == "tune":
            excluded[:] = [model[5].weight.detach().clone()]

    fitted = fit(model, tiny_data, recipe, on_epoch=remember)
    assert fitted.pruned == ("1.weight", "6.weight")
    kept = fitted.model[1].weight != 0
    assert not fitted.model[1].weight.requires_grad
    # levels stand for the frozen values, which did not move otherwise
    assert torch.corrcoef(torch.stack([frozen[kept], fitted.model[1].weight[kept]]))[0, 1] > 0.9
    assert fitted.model[5].weight.unique().numel() > 1000


def test_a_parameter_called_rho_is_no_threshold(tiny_data):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rho = nn.Linear(36, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.fc(x.flatten(1)) * self.rho

    assert fit(Scaled(), tiny_data, tiny_recipe()).pruned == ("fc.weight",)


def test_a_batch_the_model_cannot_take_is_named(tiny_data):
    recipe = tiny_recipe(batch_size=1)  # BatchNorm after a linear layer needs two examples
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(Prune2OnnxError, match=r"phase dense, epoch 1, step 1, on a batch of shape"):
        fit(model, tiny_data, recipe)


def test_a_checkpoint_of_another_model_is_refused(tiny_data, tmp_path):
    fit(tiny_mlp(), tiny_data, tiny_recipe(), checkpoints=tmp_path)
    with pytest.raises(Prune2OnnxError, match="does not fit the model"):
        fit(tiny_conv(), tiny_data, tiny_recipe(), checkpoints=tmp_path, resume=True)


def test_training_may_start_from_trained_or_pruned_weights(tiny_data):
    dense = fit(tiny_mlp(), tiny_data, tiny_recipe())
    model = tiny_mlp()
    model.load_state_dict(dense.dense)
    fitted = fit(model, tiny_data, tiny_recipe(), start="prune")
    assert fitted.history[0].phase == "prune"
    assert torch.equal(fitted.dense["1.weight"], dense.dense["1.weight"])
    with torch.no_grad():
        model = tiny_mlp()
        model[1].weight[model[1].weight.abs() < 0.05] = 0
    zeros = model[1].weight == 0
    tuned = fit(model, tiny_data, tiny_recipe(), start="tune")
    assert tuned.pruned == ("1.weight", "3.weight")
    assert not tuned.model[1].weight[zeros].any()
    assert not tuned.model[1].weight[zeros].signbit().any()  # -0 would have to be coded
    with pytest.raises(Prune2OnnxError, match="no Linear or convolution weight has a zero"):
        fit(tiny_mlp(), tiny_data, tiny_recipe(), start="tune")


def test_a_loss_that_is_nan_stops_with_phase_epoch_and_step(tiny_data):
    class Bomb(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(36, 3), 0

        def forward(self, x):
            self.calls += self.training
            bad = float("nan") if self.calls == 9 else 0.0
            return self.fc(x.flatten(1)) + bad

    # 240 examples, 40 a batch: the 9th training step is step 3 of epoch 2
    with pytest.raises(
        Prune2OnnxError, match="nan in phase dense, epoch 2, step 3; lower --dense-lr"
    ):
        fit(Bomb(), tiny_data, tiny_recipe())


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), r"returns \[2, 2\].*\[2, 3\]"),
        (nn.Sequential(nn.Linear(7, 3)), "fails on an input of shape \\[2, 1, 6, 6\\]"),
        (nn.Identity(), r"returns \[2, 1, 6, 6\]"),
    ],
)
def test_a_model_that_does_not_fit_the_data_says_so_before_training(network, says, tiny_data):
    with pytest.raises(Prune2OnnxError, match=says):
        fit(network, tiny_data, tiny_recipe())


def test_default_epochs_are_a_number_of_steps():
    recipe = tiny_recipe(**{"dense.epochs": None, "batch_size": 100})
    assert with_epochs(recipe, 1000).dense.epochs == 150
    assert with_epochs(recipe, 10**6).dense.epochs == 5
    assert with_epochs(recipe, 1000).tune.epochs == 2  # given, so kept


def test_a_data_set_smaller_than_a_batch_trains(tiny_data):
    small = dataclasses.replace(tiny_data, train=blobs(12, 1))
    assert len(fit(tiny_mlp(), small, tiny_recipe(batch_size=64)).history) == 10


_TWO_PROCESSES = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import Accelerator
from conftest import *
from prune2onnx.pruning import density
from prune2onnx.training import end_processes, fit
data = Data("blobs", blobs(240, 1), blobs(60, 2), blobs(90, 3), (1, 6, 6), 3)
accelerator = Accelerator(cpu=True)
fitted = fit(tiny_conv(), data, tiny_recipe(), accelerator=accelerator)
digest = {n: float(v.double().abs().sum()) for n, v in fitted.model.state_dict().items()}
zeros = {n: (v == 0).flatten().nonzero().flatten().tolist()
         for n, v in fitted.model.state_dict().items()}
with open(f"{sys.argv[2]}/{accelerator.process_index}.json", "w") as out:
    json.dump([accelerator.num_processes, digest, zeros, fitted.history[-1].validation_error], out)
end_processes()
"""


def test_two_processes_agree_on_masks_and_weights(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(_TWO_PROCESSES)
    # accelerate launch starts one process on a CPU; torchrun is what it uses for several GPUs
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == 2
    assert first == second
    assert first[2]["0.weight"]


def test_a_batch_that_processes_cannot_share_is_refused(tiny_data):
    class Three:
        num_processes = 3

    with pytest.raises(RecipeError, match="batch_size 40 cannot be split among 3"):
        fit(tiny_mlp(), tiny_data, tiny_recipe(), accelerator=Three())
