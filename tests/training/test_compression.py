"""A loop of one's own: budgets, and all that such a loop may do besides."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prune2onnx.errors import Prune2OnnxError, PruningWarning, RecipeError
from prune2onnx.pruning import density
from prune2onnx.runtime.session import session
from prune2onnx.training.compression.compression import Compression
from prune2onnx.training.compression.plain_names import use_plain_names

X = torch.randn(256, 20, generator=torch.Generator().manual_seed(3))
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
STEPS = 60


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))


def loss_of(net: nn.Module, index: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(net(X[index]), Y[index])


class Loop:
    """A training loop as users write them."""

    def __init__(self, wrap=lambda model: model, make=network, **options):
        self.model = make()
        self.net = wrap(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        # as few steps as these need quick thresholds
        chosen = {"steps": STEPS, "settings": {"prune.threshold_lr": 0.2}}
        self.compression = Compression(self.net, X[:2], **(chosen | options))
        self.drawing = torch.Generator().manual_seed(1)

    def batch(self) -> torch.Tensor:
        return torch.randint(0, 256, (32,), generator=self.drawing)

    def step(self) -> None:
        self.net.train()
        self.optimizer.zero_grad()
        (loss_of(self.net, self.batch()) + self.compression.penalty()).backward()
        self.optimizer.step()
        self.compression.step()

    def run(self, steps: int = STEPS):
        for _ in range(steps):
            self.step()
        return self


def check(small: nn.Module, packed) -> None:
    """What the file computes is what the network computes; the weights are on few levels."""
    x = X[:8]
    with torch.no_grad():
        expected = small(x).numpy()
    (got,) = session(packed.model).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in small.modules())
    for name in ("0.weight", "3.weight"):
        assert len(small.get_parameter(name).unique()) <= 37  # 7 levels, up to 2.5 times as fine


def test_a_size_is_met_and_the_optimizer_stays():
    loop = Loop(target_size=1_400)
    optimized = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in loop.model.parameters()} == optimized  # thresholds are not among them
    loop.run()
    assert {id(p) for p in loop.model.parameters()} == optimized
    progress = loop.compression.epoch_end()
    assert (progress.phase, progress.step, progress.steps) == ("quantize", STEPS, STEPS)
    small, packed = loop.compression.finish()
    assert 1_350 <= packed.model.ByteSize() <= 1_400
    check(small, packed)


def test_a_density_is_met():
    small, packed = Loop(target_density=0.2).run().compression.finish()
    weights = [small[0].weight, small[-1].weight]
    left = sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)
    assert 0.1 < left <= 0.2
    check(small, packed)


def test_channels_are_removed_for_multiply_adds():
    from prune2onnx.shrinking.costs import multiply_adds
    from prune2onnx.training.export import export

    phases = {"channels": 30, "prune": 20, "tune": 10, "quantize": 10}
    loop = Loop(target_macs=0.5, steps=None, phases=phases).run(70)
    small, packed = loop.compression.finish()
    dense = multiply_adds(export(network(), (20,)))
    assert multiply_adds(loop.compression.shrunk(small)) <= 0.5 * dense
    check(small, packed)


def test_an_accuracy_loss_is_kept_by_the_density():
    calls = []

    def error(model: nn.Module) -> float:
        assert not model.training
        calls.append(density(model).total if calls else 1.0)
        return 100.0 if calls[-1] < 0.6 else 0.0  # whatever the network is

    # thresholds that move slowly enough to be corrected
    slow = {"prune.threshold_lr": 0.02}
    loop = Loop(max_drop=1.0, evaluate=error, steps=400, settings=slow).run(400)
    assert loop.model.training and 0.4 < loop.compression.epoch_end().density < 0.9
    with pytest.warns(PruningWarning, match="the error is larger by 100"):
        calls[:] = [0.5]
        loop.compression.finish()
    with pytest.raises(RecipeError, match="max_drop needs evaluate"):
        Loop(max_drop=1.0)


@pytest.mark.parametrize(
    ("at", "first"),
    [(10, "network"), (40, "compression"), (52, "network")],
    ids=["prune", "tune", "quantize"],
)
def test_a_loop_that_goes_on_from_a_file_ends_in_the_same_bytes(at, first):
    loop = Loop(target_density=0.2).run(at)
    file = io.BytesIO()
    parts = {
        "network": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "compression": loop.compression.state_dict(),
        "drawing": loop.drawing.get_state(),
    }
    torch.save(parts, file)
    assert set(parts["network"]) == set(network().state_dict())
    whole = loop.run(STEPS - at).compression.finish()[1]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Loop(target_density=0.2)
    order = ["model", "compression"] if first == "network" else ["compression", "model"]
    for part in order:
        owner = getattr(other, part)
        owner.load_state_dict(saved["network" if part == "model" else "compression"])
    other.optimizer.load_state_dict(saved["optimizer"])
    other.drawing.set_state(saved["drawing"])
    again = other.run(STEPS - at).compression.finish()[1]
    assert again.model.SerializeToString() == whole.model.SerializeToString()


def test_accumulation_clipping_mixed_precision_and_an_average_of_weights():
    loop = Loop(target_density=0.2)
    average = copy.deepcopy(loop.model.state_dict())
    for _ in range(STEPS):
        loop.net.train()
        loop.optimizer.zero_grad()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = (loss_of(loop.net, loop.batch()) + loop.compression.penalty()) / 2
            loss.backward()
        nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.optimizer.step()
        loop.compression.step()
        for name, value in loop.model.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 0.1)
    trained = {name: value.clone() for name, value in loop.model.state_dict().items()}
    small, packed = loop.compression.finish(weights=average)
    check(small, packed)
    for name, value in loop.model.state_dict().items():
        assert torch.equal(value, trained[name])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_a_compiled_network_follows_the_phases():
    loop = Loop(lambda model: torch.compile(model, backend="eager"), target_density=0.2).run()
    loop.net.eval()
    loop.model.eval()
    torch.testing.assert_close(loop.net(X[:8]), loop.model(X[:8]))
    check(*loop.compression.finish())


def test_penalties_may_be_added_to_gradients():
    loop, other = Loop(target_density=0.2), Loop(target_density=0.2)
    for _ in range(10):
        loop.step()
        other.net.train()
        other.optimizer.zero_grad()
        loss_of(other.net, other.batch()).backward()
        other.compression.add_penalty()
        other.optimizer.step()
        other.compression.step()
    for name, value in loop.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name])


def test_mistakes_are_said():
    with pytest.raises(RecipeError, match="no budget"):
        Loop()
    with pytest.raises(RecipeError, match="phase 'pruning' is not one of"):
        Loop(target_density=0.2, phases={"pruning": 1.0})
    with pytest.raises(RecipeError, match="steps is 60, but the phases have 30 together"):
        Loop(target_density=0.2, phases={"prune": 20, "tune": 10})
    with pytest.raises(RecipeError, match="matches no prunable weight"):
        Loop(target_density=0.2, settings={"prune.exclude": ["nothing"]})
    loop = Loop(target_density=0.2)
    loss_of(loop.net, loop.batch()).backward()
    with pytest.raises(Prune2OnnxError, match="without penalty"):
        loop.compression.step()
    loop = Loop(target_density=0.2)
    with pytest.raises(Prune2OnnxError, match="before gradients are set to zero"):
        loop.compression.step()
    loop = Loop(target_density=0.2).run(10)
    with pytest.raises(Prune2OnnxError, match="before its first step"):
        loop.compression.load_state_dict(loop.compression.state_dict())
    with pytest.raises(Prune2OnnxError, match="same steps and phases"):
        Loop(target_density=0.2, steps=90).compression.load_state_dict(
            loop.compression.state_dict()
        )
    with pytest.warns(PruningWarning, match="50 of 60 steps left"):
        loop.compression.finish()


def test_a_phase_that_is_too_short_is_said_before():
    with pytest.warns(PruningWarning, match=r"rise for 27 of 36 steps, but need about 4\d\d"):
        Loop(target_density=0.1, settings={})


def test_plain_names_in_their_order():
    from prune2onnx.pruning import prune

    model = network()
    expected = list(model.state_dict())
    use_plain_names(model)
    prune(model)
    assert list(model.state_dict()) == expected
    other = {name: torch.full_like(value, 3) for name, value in network().state_dict().items()}
    model.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    nn.Sequential(model).load_state_dict(nn.Sequential(network()).state_dict())
    assert torch.equal(model.state_dict()["0.weight"], network()[0].weight)


class Reader(nn.Module):
    """A GRU that reads an example in four parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.last = nn.GRU(5, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.read(x.unflatten(1, (4, 5)))[0][:, -1])


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        return float((net(X).argmax(1) == Y).float().mean())


_RANKS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.distributed.init_process_group("gloo")
from test_compression import Loop, Reader, accuracy, network, nn
rank, lines = torch.distributed.get_rank(), []
for make in (network, Reader):
    loop = Loop(nn.parallel.DistributedDataParallel, make, target_density=0.3)
    loop.drawing.manual_seed(rank)
    loop.run()
    small, packed = loop.compression.finish()
    zeros = [int((p == 0).sum()) for p in small.parameters() if p.ndim > 1]
    lines.append(f"{accuracy(small)} {zeros} {hash(packed.model.SerializeToString())}")
Path(sys.argv[2], str(rank)).write_text("\\n".join(lines))
torch.distributed.destroy_process_group()
"""


def test_two_processes_come_to_the_same_zeros_and_near_what_one_comes_to(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(_RANKS)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), here, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = ((tmp_path / rank).read_text().splitlines() for rank in "01")
    assert one == other
    alone, _ = Loop(make=Reader, target_density=0.3).run().compression.finish()
    assert abs(float(one[1].split()[0]) - accuracy(alone)) < 0.15
