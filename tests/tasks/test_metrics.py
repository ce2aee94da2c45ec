"""Metrics: values by hand, batches that add up, and what is said where there is no value."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, r2_score

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.tasks import metrics
from prune2onnx.tasks.losses import class_loss, squared_loss, token_loss
from prune2onnx.tasks.metrics import IGNORED, Metric, batch_sums, final, measured
from prune2onnx.tasks.quantity import Quantity
from prune2onnx.tasks.task import TASKS, Task, load_task, misfit


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def value(metric: Metric, outputs, targets) -> float:
    return measured([metric], outputs, targets)[metric.name]


def one_hot(classes: np.ndarray, count: int, axis: int) -> np.ndarray:
    return np.moveaxis(np.eye(count, dtype=np.float32)[classes], -1, axis)


def test_errors_and_accuracies_count_what_is_not_ignored():
    scores = one_hot(np.array([0, 1, 2, 2]), 3, 1)
    assert value(metrics.CLASS_ERROR, scores, np.array([0, 1, 1, 1])) == 50
    found = np.array([[[0, 1], [2, 2]]])
    wanted = np.array([[[0, 1], [1, IGNORED]]])
    assert value(metrics.PIXEL_ACCURACY, one_hot(found, 3, 1), wanted) == pytest.approx(200 / 3)
    # classes 0, 1, 2: 1 of 1, 1 of 2, 0 of 1
    assert value(metrics.MEAN_IOU, one_hot(found, 3, 1), wanted) == pytest.approx(50)
    tokens = np.array([[0, 1, 2], [2, 2, 0]])
    wanted = np.array([[0, 1, IGNORED], [2, 1, 0]])
    assert value(metrics.TOKEN_ERROR, one_hot(tokens, 3, -1), wanted) == 20


def test_a_class_that_never_occurs_does_not_count_in_the_mean_iou():
    found = np.array([[[0, 0], [1, 1]]])
    assert value(metrics.MEAN_IOU, one_hot(found, 9, 1), found) == 100


def test_perplexity_of_equal_scores_is_the_number_of_tokens():
    targets = np.array([[3, 0, 6], [1, 1, IGNORED]])
    assert value(metrics.PERPLEXITY, np.zeros((2, 3, 7), np.float32), targets) == pytest.approx(7)
    scores = drawn(4, 5, 7)
    targets = np.random.default_rng(0).integers(0, 7, (4, 5))
    loss = float(token_loss(torch.from_numpy(scores), torch.from_numpy(targets)))
    assert value(metrics.PERPLEXITY, scores, targets) == pytest.approx(np.exp(loss), rel=1e-5)


def test_f1_and_r2_are_those_of_scikit_learn():
    scores, labels = drawn(60, 5), (drawn(60, 5)[::-1] > 0.3).astype(np.float32)
    wanted = 100 * f1_score(labels, scores > 0, average="micro")
    assert value(metrics.F1, scores, labels) == pytest.approx(wanted)
    assert value(metrics.LABEL_ERROR, scores, labels) == pytest.approx(
        100 * np.mean((scores > 0) != labels)
    )
    made, targets = drawn(50, 3), 3 * drawn(50, 3)[::-1] + 100
    assert value(metrics.R2, made, targets) == pytest.approx(r2_score(targets, made), rel=1e-4)


def test_numbers_of_shape_n_belong_to_outputs_of_shape_n_1():
    made, targets = np.array([[1.0], [2.0]], np.float32), np.array([2.0, 4.0], np.float32)
    assert value(metrics.RMSE, made, targets) == pytest.approx(2.5**0.5)
    assert value(metrics.MAE, made, targets) == 1.5
    loss = squared_loss(torch.from_numpy(made), torch.from_numpy(targets))
    assert float(loss) == 2.5  # not 4.5, as broadcasting to [2, 2] would give


def test_the_output_error_is_relative_and_over_all_outputs():
    wanted = (np.array([[3.0]]), np.array([[4.0]]))
    assert value(metrics.OUTPUT_ERROR, (np.array([[3.0]]), np.array([[3.5]])), wanted) == 10


@pytest.mark.parametrize(
    ("metric", "outputs", "targets"),
    [
        (metrics.CLASS_ERROR, drawn(12, 4), np.arange(12) % 4),
        (metrics.MEAN_IOU, drawn(12, 4, 3, 3), np.arange(108).reshape(12, 3, 3) % 4),
        (metrics.PERPLEXITY, drawn(12, 4, 6), np.arange(48).reshape(12, 4) % 6),
        (metrics.F1, drawn(12, 4), (drawn(12, 4) > 0).astype(np.float32)),
        (metrics.RMSE, drawn(12, 4), drawn(12, 4)),
        (metrics.R2, drawn(12, 4), 2 * drawn(12, 4)),
        (metrics.OUTPUT_ERROR, drawn(12, 4), 2 * drawn(12, 4)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_batches_of_any_size_give_the_value_of_the_whole(metric, outputs, targets):
    cuts = [slice(0, 5), slice(5, 6), slice(6, 12)]
    sums = sum(batch_sums(metric, outputs[cut], targets[cut]) for cut in cuts)
    whole = value(metric, outputs, targets)
    assert final(metric, sums, "here") == pytest.approx(whole)


def test_a_metric_that_is_nan_or_fails_is_one_clear_error():
    never = Metric("yield", lambda made, wanted: np.array([0.0, 0.0]))
    with pytest.raises(Prune2OnnxError, match="metric yield is nan on the test set, expected"):
        measured([never], drawn(2, 2), drawn(2, 2), "the test set")
    fails = Metric("yield", lambda made, wanted: made @ wanted)
    with pytest.raises(Prune2OnnxError, match=r"yield: its sums fail on outputs \[2, 3\]"):
        measured([fails], drawn(2, 3), drawn(2, 3))
    flat = Metric("yield", lambda made, wanted: np.mean(made))
    with pytest.raises(Prune2OnnxError, match=r"its sums have shape \[\], expected \[k\]"):
        measured([flat], drawn(2, 3), drawn(2, 3))


def test_quantities_know_which_way_is_worse():
    miou, rmse = Quantity("mIoU", "%", True), Quantity("RMSE")
    assert miou.drop(90, 87) == 3 and rmse.drop(2, 3) == 1
    assert miou.badness(90) < miou.badness(87) and rmse.badness(2) < rmse.badness(3)
    assert miou.point(90) == 1 and rmse.point(50) == 0.5


def test_an_unknown_task_is_an_error_that_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"known are classification.*did you mean regression"):
        load_task("regresion")
    assert load_task("segmentation") is TASKS["segmentation"]


def test_a_task_of_ones_own_comes_from_a_function(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import prune2onnx\n"
        "from prune2onnx import Metric, Task\n"
        "def huber():\n"
        "    error = lambda made, wanted: [abs(made - wanted).sum(), made.size]\n"
        "    return Task('huber', lambda made, wanted: (made - wanted).abs().mean(),\n"
        "                (Metric('deviation', error),))\n"
        "def number():\n"
        "    return 3\n"
    )
    task = load_task(f"{path}:huber")
    assert (task.name, task.metric) == ("huber", Quantity("deviation"))
    assert value(task.metrics[0], drawn(2, 2), drawn(2, 2)) == 0
    with pytest.raises(Prune2OnnxError, match=r"returned a int, expected a prune2onnx\.Task"):
        load_task(f"{path}:number")


def test_a_task_needs_a_metric():
    with pytest.raises(RecipeError, match="its metrics are none; expected at least one"):
        Task("idle", class_loss, ())


@pytest.mark.parametrize(
    ("targets", "made", "wanted", "fits"),
    [
        ("class", (2, 10), (2,), True),
        ("class", (2, 9), (2,), False),
        ("class map", (2, 10, 4, 4), (2, 4, 4), True),
        ("class map", (2, 4, 4, 10), (2, 4, 4), False),
        ("next token", (2, 7, 10), (2, 7), True),
        ("next token", (2, 10, 7), (2, 7), False),
        ("next token", (), (2, 7), False),
        ("labels", (2, 3), (2, 3), True),
        ("labels", (2, 4), (2, 3), False),
        ("values", (2, 1), (2,), True),
        ("values", (2, 3, 2), (2, 2, 3), False),
        ("any", (5,), (2,), True),
    ],
)
def test_outputs_fit_a_task_or_it_says_what_it_needs(targets, made, wanted, fits):
    said = misfit(targets, made, wanted, 10)
    assert (said is None) == fits


def test_regression_does_not_depend_on_the_unit_of_its_targets():
    task = TASKS["regression"]
    made, wanted = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    loss = task.normalized(2.0).loss(made, wanted)
    grams = task.normalized(2000.0).loss(1000 * made, 1000 * wanted)
    assert float(loss) == pytest.approx(1) and float(grams) == pytest.approx(1)
