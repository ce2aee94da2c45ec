"""The pressure: its schedule, its multiplier, and a goal that follows from bytes."""

import pytest
import torch

from prune2onnx.runs.sections import Prune
from prune2onnx.training.pressure import Pressure


def pressure(goal: float = 0.1, steps: int = 100, **settings: float) -> Pressure:
    return Pressure(Prune(**settings), 1000, steps, goal, torch.device("cpu"))


def test_the_wanted_density_falls_from_one_to_the_goal():
    one = pressure(ramp=0.5)
    wanted = [1000 / (1 + float(one.above(torch.tensor(1000), p))) / 1000 for p in (0, 0.1, 0.5, 1)]
    assert wanted[0] == pytest.approx(1) and wanted[2] == wanted[3] == pytest.approx(0.1)
    assert wanted == sorted(wanted, reverse=True)
    assert wanted[1] < 0.8  # quickly at first


def test_lambda_grows_while_there_is_too_much_and_falls_while_there_is_too_little():
    one = pressure(pressure=2.0)
    much, little = torch.tensor(0.5), torch.tensor(-0.5)
    rising = [float(one.factor(much)) for _ in range(20)]
    assert rising == sorted(rising) and rising[0] == pytest.approx(2 / 1000, rel=0.2)
    for _ in range(60):
        assert float(one.factor(little)) == 0  # no pressure below the goal
    assert float(one.factor(much)) < rising[-1]


@pytest.mark.parametrize("slope", [0.6, 1.0])
def test_the_goal_is_found_from_the_bytes_of_two_files(slope):
    one, density = pressure(), 0.2
    for _ in range(8):
        one.aim(density, round(100_000 * density**slope), 20_000)
        density = one.goal
    assert 100_000 * density**slope == pytest.approx(20_000, rel=0.01)


def test_a_resumed_run_restores_its_state():
    one, other = pressure(), pressure()
    one.aim(0.3, 5000, 2000)
    for _ in range(5):
        one.factor(torch.tensor(0.2))
    other.restore(one.state())
    assert other.state() == one.state()
    assert float(other.factor(torch.tensor(0.1))) == float(one.factor(torch.tensor(0.1)))


def test_the_schedule_may_begin_below_full_density():
    one = pressure(goal=0.01, ramp=0.5)
    less = Pressure(Prune(ramp=0.5), 1000, 100, 0.01, torch.device("cpu"), start=0.1)
    alive = torch.tensor(100)
    assert float(less.above(alive, 0.0)) == pytest.approx(0) and float(one.above(alive, 0)) < 0
    assert float(less.above(alive, 0.1)) > float(one.above(alive, 0.1))
    assert float(less.above(alive, 0.9)) == pytest.approx(9) == float(one.above(alive, 0.9))


@pytest.mark.parametrize(("density", "amount"), [(0.0, 2000), (0.1, 0)])
def test_the_goal_rises_where_nothing_is_left(density, amount):
    one = pressure(goal=0.05)
    one.aim(0.2, 4000, 400)
    before = one.goal
    one.aim(density, amount, 400)
    assert one.goal >= 2 * before
    one.aim(0.1, 3000, 400)
    assert 0 < one.goal < 0.1
