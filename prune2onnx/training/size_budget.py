"""Meets a budget of bytes, or of weights, by measuring the file that a model would become.

Where the file is too large, survivors of least saliency per bit are removed; how many is found by
bisection. Without a `Deployment` bytes are unknown, and only a density can be met. When to do so is
up to `phases`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prune2onnx.pruning import (
    bake,
    channel_thresholds_of,
    density,
    density_of_bits,
    prunable_weights,
    thresholds_of,
)
from prune2onnx.runs.recipe import Recipe
from prune2onnx.training.compression.course import Course
from prune2onnx.training.denormals import denormals
from prune2onnx.training.levels import (
    bake_levels,
    put_on_levels,
    refine,
    remove_below,
    round_to_levels,
    saliency,
    scales_of,
)

MARGIN = {"prune": 1.25, "tune": 1.1, "quantize": 1.03}
"""Size or density after pruning, and at the start of the phases after it, in multiples of the goal.
The excess is removed in steps, by saliency, which finds weights that the outputs do not need;
between the steps the other weights adapt."""

_BITS = 10.0
"""Approximate bits of a survivor where few are left, to guess a density from a size."""

_LEVELS, _FEW_LEVELS = 7, 2
_FEW_BITS = 0.5  # per weight: where so few are left, fewer levels leave more weights

_FINEST, _REFINEMENTS = 0.4, 7
_MOST_REMOVED = 0.9  # fraction of the survivors that may be removed to meet a size


def target_size(course: Course) -> int | None:
    """The wanted bytes of the file; None where none are given, or none can be measured."""
    return course.recipe.target_size if course.deployment is not None else None


def first_goal(course: Course) -> float:
    """The density to reach, before any file is measured."""
    target = target_size(course)
    if target is None:
        return course.state.goal
    most = course.recipe.target_density or 1.0
    each = 8 * target / course.state.size  # bits per element
    # where few are left, they are close together and take less than at random positions
    return min(most, max(each / _BITS, density_of_bits(each)))


def survivors_left(course: Course, model: nn.Module) -> int:
    """Nonzeros of the pruned weights."""
    names = course.state.pruned
    return sum(int(torch.count_nonzero(model.get_parameter(name))) for name in names)


def deployed(course: Course, model: nn.Module, *, levels: bool = True) -> nn.Module:
    """The model as it would be if training ended now: plain parameters on few levels."""
    return deployed_with_scales(course, model, levels=levels)[0]


def deployed_with_scales(
    course: Course, model: nn.Module, *, levels: bool = True
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model as it would be if training ended now, and its scales."""
    model = course.copied(model).eval()
    if (channels := channel_thresholds_of(model)) is not None:
        channels.bake()
    if thresholds_of(model):
        bake(model)
    scales: dict[str, Tensor] = {}
    if course.in_place and scales_of(model):  # BatchNorm is still there
        scales = bake_levels(model)
        course.fold(model)
        for name, scale in scales.items():
            round_to_levels(model, name, scale)
    if not scales_of(model):
        course.fold(model)
        names = (*course.state.pruned, *small_parameters(course, model)) if levels else ()
        left = [n for n in names if n not in scales and model.get_parameter(n).any()]
        put_on_recipe_levels(course, model, left)
    scales |= bake_levels(model)
    propagate_constants(course, model, scales)
    return model, scales


def largest_level(recipe: Recipe, size: int) -> int:
    """The largest level of a weight, by the recipe or by the bits that its target size leaves.

    Args:
        recipe: the settings.
        size: elements of the pruned weights.
    """
    if recipe.quantize.levels is not None:
        return recipe.quantize.levels
    few = recipe.target_size is not None and 8 * recipe.target_size < _FEW_BITS * size
    return _FEW_LEVELS if few else _LEVELS


def put_on_recipe_levels(course: Course, model: nn.Module, names: Iterable[str]) -> None:
    """Puts parameters on the recipe's numbers of levels: weights on few, biases on more."""
    settings = course.recipe.quantize
    few = largest_level(course.recipe, course.state.size)
    largest = {
        name: few if name in course.state.pruned else settings.small_levels for name in names
    }
    if settings.step == "network":
        put_on_levels(model, largest, common=True)
        return
    for name, count in largest.items():  # both directions of a recurrent layer are one in a file
        other = f"{name}_reverse"
        if other in largest:
            put_on_levels(model, {name: count, other: largest[other]}, common=True)
        elif name.removesuffix("_reverse") not in largest or not name.endswith("_reverse"):
            put_on_levels(model, {name: count})


def small_parameters(course: Course, model: nn.Module) -> list[str]:
    """Names of parameters that are not prunable weights, whether those are pruned or not."""
    kept = {*course.state.pruned, *prunable_weights(model)}
    return [name for name, _ in model.named_parameters() if name not in kept]


def propagate_constants(course: Course, model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Zeroes dead parts and moves their constants to biases, which are kept on levels."""
    if course.deployment is None:
        return
    before = {name: model.get_parameter(name).detach().clone() for name in scales}
    with denormals(flushed=False):
        course.deployment.propagate_constants(model)
    for name, old in before.items():
        if not torch.equal(old, model.get_parameter(name)):
            round_to_levels(model, name, scales[name])


def is_over(course: Course, model: nn.Module, margin: float) -> bool:
    """Whether the file would be larger, or hold more weights, than `margin` times the goal."""
    model, scales = deployed_with_scales(course, model)
    left, size = survivors_left(course, model), course.state.size
    target = target_size(course)
    if target is None:
        return left > margin * course.state.goal * size
    if left > margin * (course.recipe.target_density or 1) * size:
        return True
    return _nbytes(course, model, scales) > margin * target


def aim(course: Course, model: nn.Module) -> None:
    """Updates the density that the pressure aims at, by the current size of the file."""
    target = target_size(course)
    if course.pressure is None or target is None:
        return
    nbytes = _nbytes(course, *deployed_with_scales(course, model))
    course.pressure.aim(density(model).total, nbytes, round(MARGIN["prune"] * target))
    if course.recipe.target_density:
        limit = MARGIN["prune"] * course.recipe.target_density
        course.pressure.goal = min(course.pressure.goal, limit)


def _nbytes(course: Course, model: nn.Module, scales: Mapping[str, Tensor]) -> int:
    """Bytes of the file of a deployed model."""
    assert course.deployment is not None  # else there is no target size
    with denormals(flushed=False):
        return course.deployment.nbytes(model.cpu(), as_numbers(scales))


def as_numbers(scales: Mapping[str, Tensor]) -> dict[str, float]:
    """Scales as numbers, which float32 holds exactly."""
    return {name: float(scale) for name, scale in scales.items()}


def meet_budget(course: Course, model: nn.Module, margin: float) -> None:
    """Removes the survivors of least saliency per bit until few enough are left."""
    if not course.meets or not course.recipe.prune.pressure or not is_over(course, model, margin):
        return
    plain = course.copied(model).eval()
    bake_levels(plain)  # as clamped weights on levels get no gradient
    weights = {name: plain.get_parameter(name).detach() for name in course.state.pruned}
    saliencies = saliency(weights, course.sensitivity(plain))
    ranked = torch.cat([s[torch.isfinite(s)] for s in saliencies.values()]).sort().values
    if not len(ranked):
        return
    low, high = 0, int(_MOST_REMOVED * len(ranked))
    while high - low > max(1, len(ranked) // 1000):
        middle = (low + high) // 2
        trial = course.copied(model)
        remove_below(trial, saliencies, float(ranked[middle]))
        low, high = (middle, high) if is_over(course, trial, margin) else (low, middle)
    remove_below(model, saliencies, float(ranked[high]))


def use_budget(course: Course, model: nn.Module) -> None:
    """Makes levels finer while the file stays within its size: where rounding made more zeros.

    Training on levels rounds to zero what no budget asks for. What is left of the budget is better
    spent on the precision of the weights.
    """
    if target_size(course) is None or not scales_of(model) or is_over(course, model, 1.0):
        return
    low, high = _FINEST, 1.0
    for _ in range(_REFINEMENTS):
        middle = math.sqrt(low * high)
        trial = course.copied(model)
        refine(trial, middle)
        low, high = (middle, high) if is_over(course, trial, 1.0) else (low, middle)
    refine(model, high)
