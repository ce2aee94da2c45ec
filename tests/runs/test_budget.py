"""Budgets: what counts as met, and a search that ends at the smallest density allowed."""

import pytest

from prune2onnx.errors import RecipeError
from prune2onnx.runs.budget import Search, Trial, goals
from prune2onnx.runs.recipe import Recipe, resolve
from prune2onnx.runs.report import Goal
from prune2onnx.tasks.quantity import Quantity


def run(search: Search, drop_of) -> list[float]:
    tried = []
    while (density := search.next()) is not None:
        tried.append(density)
        search.trials.append(Trial(density, drop_of(density), round(1e5 * density)))
    return tried


@pytest.mark.parametrize("edge", [0.011, 0.05, 0.2, 0.6])
def test_the_search_closes_in_on_the_smallest_density_within_the_drop(edge):
    search = Search(0.3, first=0.07, trials=12)
    run(search, lambda density: 0.1 if density >= edge else 1.0)
    assert edge <= search.trials[search.best].fraction < 1.2 * edge


def test_the_search_takes_no_more_trials_than_it_may():
    search = Search(0.3, first=0.07, trials=4)
    assert len(run(search, lambda density: 0.0)) == 4
    assert search.trials[search.best].fraction == 0.07 / 8


def test_where_nothing_keeps_to_the_limit_the_smallest_drop_is_best():
    search = Search(0.1, first=0.07, trials=6)
    tried = run(search, lambda density: 1 - density / 2)
    assert tried[-1] == 1.0 and search.trials[search.best].fraction == 1.0


def test_a_lucky_trial_below_one_that_failed_is_not_followed():
    search = Search(0.3, first=0.08, trials=8)
    drops = {0.08: 0.5, 0.16: 0.1}
    run(search, lambda density: drops.get(density, 0.4))
    assert search.trials[search.best].fraction == 0.16


def test_a_budget_says_what_was_asked_and_by_how_much_it_was_missed():
    recipe = Recipe(
        model="m", target_size=12_000, target_density=0.02, target_macs=0.5, max_drop=0.3
    )
    figures = {"nbytes": 11_980, "density": 0.02001, "macs": 0.6, "dense": 2.0, "value": 2.42}
    size, density, macs, drop = goals(recipe, **figures)
    assert (size.met, density.met, macs.met, drop.met) == (True, True, False, False)
    assert str(macs) == "multiply-adds 60 % of 50 % (missed by 10 %)"
    assert str(size) == "size 11,980 bytes of 12,000 bytes (met)"
    assert (
        str(drop)
        == "error 0.42 points higher than dense, 0.3 points allowed (missed by 0.12 points)"
    )
    lower, same = Goal("drop", 1, -2.083), Goal("drop", 0.5, 0.0)
    assert str(lower) == "error 2.08 points lower than dense, 1 point allowed (met)"
    assert str(same) == "error the same as dense, 0.5 points allowed (met)"
    assert str(Goal("drop", 1, 2)) == (
        "error 2 points higher than dense, 1 point allowed (missed by 1 point)"
    )
    assert str(Goal("size", 1, 2)) == "size 2 bytes of 1 byte (missed by 1 byte)"
    assert goals(Recipe(model="m"), nbytes=1, density=1, macs=1, dense=0, value=9) == ()
    none = Recipe(model="m", max_drop=0)
    even = {"nbytes": 1, "density": 1, "macs": 1, "dense": 0}
    assert [goals(none, **even, value=d)[0].met for d in (0, 0.1)] == [True, False]


def test_a_drop_is_in_the_metrics_unit_and_direction_and_may_be_relative():
    figures = {"nbytes": 1, "density": 1.0, "macs": 1.0}
    miou, rmse = Quantity("mIoU", "%", True), Quantity("RMSE", "kg")
    (drop,) = goals(Recipe(model="m", max_drop=2), **figures, dense=90, value=87, metric=miou)
    assert str(drop) == ("mIoU 3 points lower than dense, 2 points allowed (missed by 1 point)")
    (drop,) = goals(Recipe(model="m", max_drop="5%"), **figures, dense=40, value=41, metric=rmse)
    assert str(drop) == "RMSE 1 kg higher than dense, 2 kg allowed (met)"
    (drop,) = goals(Recipe(model="m", max_drop="5%"), **figures, dense=40, value=38, metric=rmse)
    assert drop.met and str(drop).startswith("RMSE 2 kg lower")


@pytest.mark.parametrize("value", ["-1", "5 kg", "nan", "-5%", "%"])
def test_a_drop_that_is_no_amount_is_an_error(value):
    with pytest.raises(RecipeError, match=r"max_drop is .* expected a number such as 0.5, or 5%"):
        resolve({"model": "m", "max_drop": value})
