"""The comparison of tools/baselines.py: equal numbers of survivors, and nothing is run twice."""

import json
import math

import baselines
import magnitude
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import tiny_mlp, tiny_recipe
from torch import nn

NAMES = ("1.weight", "3.weight")


def net() -> nn.Module:
    return tiny_mlp()


@pytest.fixture
def setup(tiny_data, tmp_path) -> magnitude.Setup:
    save_file(tiny_mlp().state_dict(), tmp_path / "dense.safetensors")
    recipe = tiny_recipe(
        model=f"{__file__}:net",
        weights=str(tmp_path / "dense.safetensors"),
        **{"prune.epochs": 12, "prune.lr": 0.01},
    )
    return magnitude.Setup(tiny_data, recipe, NAMES, 0.1, torch.device("cpu"))


def survivors(model: nn.Module) -> int:
    return sum(int(model.get_parameter(name).count_nonzero()) for name in NAMES)


METHODS = [
    magnitude.one_shot,
    magnitude.iterative,
    magnitude.soft,
    lambda setup: magnitude.gradual(setup, "deviation"),
    lambda setup: magnitude.gradual(setup, "uniform"),
    magnitude.gradual,
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_the_density_and_learns(setup, method):
    pruned = method(setup)
    assert survivors(pruned.model) == round(0.1 * (36 * 40 + 40 * 3))
    assert [name for name, _ in pruned.model.named_parameters()] == [
        name for name, _ in tiny_mlp().named_parameters()
    ]
    before, after = (
        magnitude.measure(setup, model, 0.0).validation_error
        for model in (setup.model(), pruned.model)
    )
    assert after < before / 2
    assert pruned.seconds > 0


def test_the_same_seed_gives_the_same_network(setup):
    for method in METHODS[:4]:
        one, other = (method(setup).model.state_dict() for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_iterative_rounds_are_geometric_and_each_is_tuned_but_the_last(setup):
    curve = magnitude.iterative(setup, rounds=2).curve
    densities = [math.sqrt(0.1), math.sqrt(0.1), 0.1, 0.1**1.5, 0.1**1.5]
    assert [point.density for point in curve] == pytest.approx(densities, rel=0.01)
    assert curve[1].seconds > curve[0].seconds
    assert curve[2].seconds - curve[0].seconds < curve[4].seconds  # tuned copies do not count


def test_masks_keep_the_largest_over_all_layers_or_in_each():
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[10.0, -30.0, 20.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, -1.1], [0.9, -1.0]]))
    names = ("0.weight", "1.weight")
    half = magnitude.uniform(model, names, 0.5)
    assert half["0.weight"].tolist() == [[False, True, True, False]]
    assert half["1.weight"].sum() >= 2
    most = magnitude.by_deviation(model, names, 0.25)  # deviations 26 and 1.2
    assert most["0.weight"].tolist() == [[False, True, False, False]]
    assert most["1.weight"].tolist() == [[False, True], [False, False]]


def curve(*points: tuple[float, float]) -> list[baselines.Facts]:
    return [
        {"density": density, "test_error": error, "validation_error": error, "seconds": 100 * error}
        for density, error in points
    ]


def test_the_density_at_which_a_curve_reaches_an_error():
    known = curve((0.01, 4.0), (0.04, 2.0), (0.16, 2.5), (1.0, 1.0))  # 2.5 is an outlier

    def at(error):
        need = baselines.needed(known, error, "test_error")
        return need.bound, pytest.approx(need.density), need.seconds

    assert at(3.0) == ("", 0.02, 300)
    assert at(1.5) == ("", 0.2, 150)
    assert at(4.0) == ("", 0.01, 400)
    assert at(5.0) == ("<", 0.01, 400)
    assert at(0.5) == (">", 1.0, 100)


def test_the_table_at_equal_error_says_how_many_fewer():
    ours = curve((0.01, 3.0))[0] | {"size": 1000}
    lines = baselines.equal_error_table({0: (ours, curve((0.01, 4.0), (0.04, 2.0)))})
    expected = "| 0 | 3.00 % | 10 | 300 | 20 | 300 | 2.00 | 50 % | 2.00 |"
    assert lines[2] == expected
    assert lines[3] == expected.replace("| 0 |", "| mean of curves |")


TINY = ["distill=0.5", "target_size=null", "target_density=0.3", "quantize.levels=4"]
TINY += [f"{phase}.epochs={n}" for phase, n in {"dense": 2, "prune": 2, "tune": 1}.items()]
TINY += ["quantize.epochs=1"]


def call(folder, *arguments):
    sets = [part for text in TINY for part in ("--set", text)]
    given = ["lenet_300_100", "--data", "digits", "--seeds", "0", "-o", str(folder), *sets]
    return CliRunner().invoke(baselines.main, [*given, *arguments])


def test_a_comparison_is_run_once_and_at_equal_survivors(tmp_path):
    first = call(tmp_path, "--methods", "imp", "--rounds", "2")
    assert first.exit_code == 0, first.output
    again = call(tmp_path, "--methods", "imp", "--rounds", "2")
    assert again.stdout == first.stdout
    assert again.stderr == ""
    folder = tmp_path / "lenet_300_100" / "seed0"
    ours, theirs = (
        json.loads((folder / method / "summary.json").read_text()) for method in ("learned", "imp")
    )
    weights = load_file(folder / "imp" / "pruned.safetensors")
    left = sum(int(weights[name].count_nonzero()) for name in ours["pruned"]["pruned"])
    assert left / ours["pruned"]["size"] == pytest.approx(ours["pruned"]["density"], rel=1e-3)
    assert theirs["density"] == pytest.approx(ours["density"], rel=0.1)
    assert theirs["dense_error"] == ours["dense_error"]
    longer = call(tmp_path, "--methods", "imp", "--rounds", "2", "--imp-epochs", "6")
    assert longer.exit_code == 0, longer.output
    times = [
        json.loads((folder / name / "pruning.json").read_text())["seconds"]
        for name in ("imp", "imp-6")
    ]
    assert times[1] > times[0]
    other = call(tmp_path, "--set", "prune.epochs=3")
    assert other.exit_code == 1
    assert "prune.epochs was 2" in other.stderr


def test_an_unknown_method_is_named():
    result = CliRunner().invoke(baselines.main, ["lenet5", "--methods", "learned,lamp"])
    assert result.exit_code == 2
    assert "lamp" in result.stderr
