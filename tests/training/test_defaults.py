"""What is done where the recipe leaves it open: how sparse, how many levels, whom to learn from."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from prune2onnx import fit, resolve
from prune2onnx.runs.history import Callbacks
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.fit import make_accelerator, with_epochs
from prune2onnx.training.loop import Run
from prune2onnx.training.phases import FALL, PHASES, RISE
from prune2onnx.training.pressure import MEASURES, Pressure
from prune2onnx.training.size_budget import largest_level


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3))


def run_of(tiny_data, **settings) -> Run:
    recipe = with_epochs(resolve({"model": "none", **settings}), len(tiny_data.train))
    deployment = Deployment(tiny_data.input_shape)
    accelerator = make_accelerator(recipe, cpu=True)
    return Run(tiny_data, recipe, accelerator, None, Callbacks(), deployment)


@pytest.mark.parametrize("over", [False, True])
def test_without_a_budget_the_density_follows_the_metric(tiny_data, over):
    run, model = run_of(tiny_data), network()
    run.set_teacher(model)
    PHASES["prune"].begin(run.course, model)
    course = run.course
    course.pressure = Pressure(run.recipe.prune, course.state.size, 100, 0.3, course.device)
    run.course.drop = lambda _: course.noise() * (1.01 if over else 0.99)
    PHASES["prune"].after_epoch(course, model, 1.0)
    assert course.density(model) > 0.9
    expected = min(1.0, course.density(model) * RISE) if over else 0.3
    assert course.pressure.goal == pytest.approx(expected)
    course.pressure.goal = 1.0
    PHASES["prune"].after_epoch(course, model, 1.0)
    followed = course.density(model) * (RISE if over else FALL)
    assert course.pressure.goal == pytest.approx(min(1.0, followed))
    enough = followed if over else course.density(model)
    assert course.state.goal == pytest.approx(min(1.0, enough))


def test_a_budget_is_not_changed_by_the_metric(tiny_data):
    run, model = run_of(tiny_data, target_density=0.3), network()
    run.set_teacher(model)
    PHASES["prune"].begin(run.course, model)
    run.course.drop = lambda _: 1 / 0
    before = run.course.pressure.goal
    PHASES["prune"].after_epoch(run.course, model, 1.0)
    assert run.course.pressure.goal == before


@pytest.mark.parametrize(
    ("error", "examples", "expected"),
    [(2.0, 2500, 0.28), (2.0, 100, 0.5), (0.0, 400, 0.25), (0.0, 4000, 0.025)],
)
def test_noise_is_one_standard_error_up_to_half_a_point(tiny_data, error, examples, expected):
    validation = [tiny_data.validation[0]] * examples
    run = run_of(replace(tiny_data, validation=validation))
    run.dense_value = error
    assert run.noise() == pytest.approx(expected, rel=0.01)


def test_another_metric_has_a_small_tolerance(tiny_data):
    from prune2onnx.tasks.task import load_task

    run = run_of(tiny_data)
    run.task, run.dense_value = load_task("regression"), 3.0
    assert run.noise() == pytest.approx(0.03)


def test_a_teacher_is_believed_as_far_as_it_is_right(tiny_data):
    run = run_of(tiny_data)
    run.set_teacher(network())
    assert run.teacher.weight == pytest.approx(1 - run.dense_value / 100) and run.dense_value > 0
    run = run_of(tiny_data, distill=0.3)
    run.set_teacher(network())
    assert run.teacher.weight == 0.3
    run = run_of(tiny_data, start="tune", weights="pruned.safetensors")
    run.set_teacher(network())  # pruned already: it knows less than the labels
    assert run.teacher.weight == 0


def test_few_levels_where_few_bits_are_left():
    open_recipe = resolve({"model": "m"})
    small = resolve({"model": "m", "target_size": "9KB"})
    chosen = resolve({"model": "m", "target_size": "9KB", "quantize": {"levels": 5}})
    sizes = (266_200, 50_000)
    assert [largest_level(open_recipe, n) for n in sizes] == [7, 7]
    assert [largest_level(small, n) for n in sizes] == [2, 7]
    assert [largest_level(chosen, n) for n in sizes] == [5, 5]


@pytest.mark.parametrize("epochs", [1, 3, 12, 20, 150])
def test_short_epochs_are_measured_a_few_times_only(tiny_data, epochs):
    course = run_of(tiny_data, prune={"epochs": epochs}).course
    due = [course.is_due("prune", epoch / epochs) for epoch in range(1, epochs + 1)]
    assert sum(due) == min(epochs, MEASURES) and due[-1]


def test_a_run_without_a_budget_ends_below_the_first_density_it_tries(tiny_data):
    recipe = resolve(
        {
            "model": "none",
            "batch_size": 40,
            "dense": {"epochs": 12, "lr": 1e-2},
            "prune": {"epochs": 20, "threshold_lr": 0.1},
            "tune": {"epochs": 3},
            "quantize": {"epochs": 3},
        }
    )
    fitted = fit(network(), tiny_data, recipe, deployment=Deployment(tiny_data.input_shape))
    assert 0 < fitted.density < 0.2
    assert fitted.error - fitted.dense_error < 5
