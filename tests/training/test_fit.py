"""Training: phases do their work, errors name epoch and step, runs are reproducible and resume."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from places import ROOT
from safetensors.torch import load_file
from tiny import blobs, states, tiny_conv, tiny_mlp, tiny_recipe
from torch import nn

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.history import Callbacks
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.fit import fit, with_epochs
from prune2onnx.training.scoring import evaluate


@pytest.mark.parametrize("network", [tiny_mlp, tiny_conv])
def test_four_phases_train_prune_tune_and_quantize(network, tiny_data):
    epochs = []
    fitted = fit(
        network(),
        tiny_data,
        tiny_recipe(**{"prune.epochs": 8}),
        callbacks=Callbacks(on_epoch=epochs.append),
    )
    assert [e.phase for e in epochs] == ["dense"] * 3 + ["prune"] * 8 + ["tune"] * 2 + [
        "quantize"
    ] * 2
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
    # masks hold in tuning; the last phase may zero a few more
    tuned, ended = [e.density for e in epochs[-4:-2]], [e.density for e in epochs[-2:]]
    assert len(set(tuned)) == 1 and max(ended) <= tuned[0]


def test_batch_norm_is_folded_before_weights_are_quantized(tiny_data):
    fitted = fit(tiny_conv(), tiny_data, tiny_recipe())
    assert isinstance(fitted.model[1], nn.Identity)
    assert fitted.model[0].weight.unique().numel() <= 17


@pytest.mark.parametrize("goal", [0.3, 0.1])
def test_a_wanted_density_is_met_within_two_percent(goal, tiny_data):
    recipe = tiny_recipe(**{"prune.epochs": 20, "target_density": goal})
    assert 0.98 * goal < fit(tiny_mlp(), tiny_data, recipe).density <= goal


def test_a_density_is_met_early_in_the_last_phase(tiny_data):
    recipe = tiny_recipe(
        **{
            "quantize.epochs": 4,
            "quantize.levels": 127,
            "target_density": 0.2,
            "prune.threshold_lr": 0.05,
        }
    )
    fitted = fit(tiny_mlp(), tiny_data, recipe)
    ends = [epoch.density for epoch in fitted.history if epoch.phase == "quantize"]
    assert ends[0] > 0.2 >= ends[1] >= ends[2]  # removed after the second, at the latest
    assert 0.15 < fitted.density <= 0.2


def test_whole_channels_are_pruned_first_and_do_not_come_back(tiny_data, tmp_path):
    recipe = tiny_recipe(**{"channels.epochs": 10, "channels.margin": 2.0, "prune.epochs": 10})
    deployment = Deployment(tiny_data.input_shape)
    fitted = fit(tiny_mlp(), tiny_data, recipe, checkpoints=tmp_path, deployment=deployment)
    saved = load_file(tmp_path / "channels.safetensors")
    first, second = saved["1.weight"], saved["3.weight"]
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
    recipe = tiny_recipe(**{"quantize.small_levels": 4, "quantize.slack": 100.0})
    model = fit(tiny_mlp(), tiny_data, recipe).model
    assert all(model[i].bias.unique().numel() <= 9 for i in (1, 3))
    exact = fit(
        tiny_mlp(), tiny_data, tiny_recipe(**{"quantize.small_levels": 1, "quantize.slack": 0.0})
    )
    for bias in (exact.model[1].bias, exact.model[3].bias):
        assert bias.unique().numel() <= 3 or torch.equal(bias, bias.half().float())


def test_a_run_is_reproducible_and_depends_on_the_seed(tiny_data):
    first, again = (fit(tiny_conv(), tiny_data, tiny_recipe()) for _ in range(2))
    assert states(first.model) == states(again.model)
    other = fit(tiny_conv(), tiny_data, tiny_recipe(seed=1))
    assert states(first.model) != states(other.model)


def test_the_processors_mode_is_restored(tiny_data):
    fit(tiny_mlp(), tiny_data, tiny_recipe())
    assert float(torch.tensor(1e-39) * 0.5) > 0  # a denormal


def test_bfloat16_trains_and_leaves_float32(tiny_data):
    fitted = fit(tiny_conv(), tiny_data, tiny_recipe(precision="bf16"))
    assert {p.dtype for p in fitted.model.parameters()} == {torch.float32}
    assert evaluate(fitted.model, tiny_data.test)[0] < 20


def test_every_phase_trains_in_the_precision_of_the_run(tiny_data):
    seen = {}

    class Recorded(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            if self.training:
                seen.setdefault(len(ended), set()).add(y.dtype)
            return y

    ended = []
    model = tiny_conv()
    model[0] = Recorded(1, 8, 3, bias=False)
    recipe = tiny_recipe(precision="bf16", **{"channels.epochs": 2})
    phases = {"dense": 3, "channels": 2, "prune": 3, "tune": 2, "quantize": 2}
    deployment = Deployment(tiny_data.input_shape)
    fit(model, tiny_data, recipe, callbacks=Callbacks(on_epoch=ended.append), deployment=deployment)
    assert [e.phase for e in ended] == [name for name, n in phases.items() for _ in range(n)]
    for epoch, dtypes in seen.items():
        assert dtypes == {torch.bfloat16}, ended[epoch].phase


def test_the_teacher_runs_in_the_precision_of_the_run(tiny_data):
    answered = set()

    class Recorded(nn.Linear):
        def forward(self, x):
            scores = super().forward(x)
            answered.add((self.weight.requires_grad, scores.dtype))  # only a teacher's is frozen
            return scores

    model = nn.Sequential(nn.Flatten(), Recorded(36, tiny_data.classes))
    fit(model, tiny_data, tiny_recipe(precision="bf16", distill=1.0))
    assert (False, torch.bfloat16) in answered


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
    recipe = tiny_recipe(**{"prune.exclude": ["3", "5"], "quantize.slack": 100.0})

    def remember(epoch):
        if epoch.phase == "tune":
            excluded[:] = [model[5].weight.detach().clone()]

    fitted = fit(model, tiny_data, recipe, callbacks=Callbacks(on_epoch=remember))
    assert fitted.pruned == ("1.weight", "6.weight")
    kept = fitted.model[1].weight != 0
    assert not fitted.model[1].weight.requires_grad
    # levels stand for the frozen values, which did not move otherwise
    assert torch.corrcoef(torch.stack([frozen[kept], fitted.model[1].weight[kept]]))[0, 1] > 0.9
    assert fitted.model[5].weight.unique().numel() > 1000


def test_a_parameter_called_rho_is_not_a_threshold(tiny_data):
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
    with pytest.raises(
        Prune2OnnxError, match=r"phase dense, epoch 1, step 1, on a batch of float32"
    ):
        fit(model, tiny_data, recipe)


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
    with pytest.raises(Prune2OnnxError, match="no weight that can be pruned has a zero"):
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
def test_a_model_that_does_not_fit_the_data_fails_before_training(network, says, tiny_data):
    with pytest.raises(Prune2OnnxError, match=says):
        fit(network, tiny_data, tiny_recipe())


def test_default_epochs_are_a_number_of_steps():
    recipe = tiny_recipe(**{"dense.epochs": None, "batch_size": 100})
    assert with_epochs(recipe, 1000).dense.epochs == 150
    assert with_epochs(recipe, 10**6).dense.epochs == 8
    assert with_epochs(recipe, 1000).tune.epochs == 2  # given, so kept


def test_a_dataset_smaller_than_a_batch_trains(tiny_data):
    small = dataclasses.replace(tiny_data, train=blobs(12, 1))
    assert len(fit(tiny_mlp(), small, tiny_recipe(batch_size=64)).history) == 10


_TWO_PROCESSES = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import Accelerator
from tiny import *
from torch import nn
from prune2onnx.data import Data
from prune2onnx.training.fit import end_processes, fit

class Spare(nn.Module):
    # a layer that forward does not use, and a record of what dropout lets through
    def __init__(self):
        super().__init__()
        self.net, self.spare, self.masks = tiny_conv(), nn.Linear(6, 5), []

    def forward(self, x):
        if self.training:
            kept = nn.functional.dropout(torch.ones(64), 0.5, self.training)
            self.masks.append(kept.ne(0).int().tolist())
        return self.net(x)

data = Data("blobs", blobs(240, 1), blobs(60, 2), blobs(90, 3), (1, 6, 6), 3)
accelerator = Accelerator(cpu=True) if sys.argv[3] == "plain" else None
masks, recipe = [], tiny_recipe()
if accelerator:
    fitted = fit(tiny_conv(), data, recipe, accelerator=accelerator)
else:
    recipe = tiny_recipe(**{"dense.epochs": 1, "tune.epochs": 1})
    for _ in range(2):
        model = Spare()
        fitted = fit(model, data, recipe)
        masks += model.masks
rank = torch.distributed.get_rank()
digest = {n: hashlib.sha256(v.numpy().tobytes()).hexdigest()
          for n, v in fitted.model.state_dict().items()}
zeros = {n: (v == 0).flatten().nonzero().flatten().tolist()
         for n, v in fitted.model.state_dict().items()}
found = [torch.distributed.get_world_size(), digest, zeros, fitted.history[-1].validation_error]
with open(f"{sys.argv[2]}/{rank}.json", "w") as out:
    json.dump([found, masks], out)
end_processes()
"""


def two_processes(folder: Path, network: str) -> list[list[Any]]:
    """What each of two processes found, and the dropout masks that it drew."""
    script = folder / "run.py"
    script.write_text(_TWO_PROCESSES)
    # accelerate launch starts one process on a CPU; torchrun is what it uses for several GPUs
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(ROOT / "tests" / "support"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, network], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_agree_on_masks_and_weights(tmp_path):
    (first, _), (second, _) = two_processes(tmp_path, "plain")
    assert first[0] == 2
    assert first == second
    assert first[2]["0.weight"]


def test_two_processes_train_with_a_spare_layer_and_draw_their_own_dropout(tmp_path):
    (first, masks), (second, others) = two_processes(tmp_path, "spare")
    assert first == second and first[2]["spare.weight"]
    assert len(masks) == len(others) > 0
    assert not any(mask == other for mask, other in zip(masks, others, strict=True))
    half = len(masks) // 2  # the second half is a second training
    assert masks[:half] == masks[half:] and others[:half] == others[half:]


def test_a_batch_that_cannot_be_split_among_processes_is_refused(tiny_data):
    class Three:
        num_processes = 3

    with pytest.raises(RecipeError, match="batch_size 40 cannot be split among 3"):
        fit(tiny_mlp(), tiny_data, tiny_recipe(), accelerator=Three())


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(36, 3))

    def forward(self, x):
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (nn.Flatten(), "Flatten: has no parameters, expected at least one to train"),
        (tiny_mlp().requires_grad_(False), "has only frozen parameters"),
        (Bare(), r"Bare: no layer to prune, .*its parameters are in Bare"),
    ],
)
def test_a_model_with_nothing_to_train_or_to_prune_fails_at_once(network, says, tiny_data):
    epochs = []
    with pytest.raises(Prune2OnnxError, match=says):
        fit(network, tiny_data, tiny_recipe(), callbacks=Callbacks(on_epoch=epochs.append))
    assert not epochs


def test_a_pattern_that_matches_nothing_fails_before_training(tiny_data):
    with pytest.raises(RecipeError, match="exclude pattern 'fc9'"):
        fit(tiny_mlp(), tiny_data, tiny_recipe(**{"prune.exclude": ["fc9"]}))


def test_the_parameters_that_are_not_pruned_are_counted(tiny_data):
    fitted = fit(tiny_mlp(), tiny_data, tiny_recipe(**{"prune.exclude": ["3"]}))
    assert (fitted.size, fitted.others) == (36 * 40, 40 * 3 + 40 + 3)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_older_norms_and_masks_are_trained_through_all_phases(tiny_data):
    model = nn.Sequential(
        nn.Flatten(),
        nn.utils.weight_norm(nn.Linear(36, 40)),
        nn.ReLU(),
        nn.utils.spectral_norm(nn.Linear(40, 20)),
        nn.ReLU(),
        nn.Linear(20, 20),
        nn.ReLU(),
        nn.Linear(20, 20),
        nn.ReLU(),
        nn.Linear(20, 3),
    )
    torch_prune.l1_unstructured(model[5], "bias", 0.5)
    zeros = model[5].bias == 0
    recipe = tiny_recipe(**{"prune.exclude": ["1", "3"], "channels.epochs": 2})
    deployment = Deployment(tiny_data.input_shape)
    fitted = fit(model, tiny_data, recipe, deployment=deployment)
    assert fitted.pruned == ("5.weight", "7.weight", "9.weight") and fitted.error < 50
    fitted.model(torch.zeros(2, 1, 6, 6))
    assert not fitted.model[5].bias[zeros].any()
    assert deployment.shrunk(fitted.model).graph.node
