"""The phases of a fit, as a table: what each does to a model before, during and after training it.

- dense: only training.
- channels: learned thresholds on whole channels, by what they cost.
- prune: learned thresholds on weights. At the end of both, all thresholds are scaled by one factor,
  so that the budget is met.
- tune: fixed masks.
- quantize: BatchNorm folded, constants of dead parts propagated, weights on few levels; where the
  file is too large, survivors of least saliency are removed.

The training loop is in `loop`; how a budget of bytes is met is in `size_budget`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune2onnx.errors import Prune2OnnxError, PruningWarning
from prune2onnx.pruning import (
    ChannelThresholds,
    bake,
    channel_thresholds_of,
    checked_weights,
    density,
    hold_zeros,
    prunable_weights,
    prune,
    prune_channels,
    scale_thresholds,
    selected_weights,
)
from prune2onnx.runs.recipe import MACS
from prune2onnx.runs.recipe import PHASES as ORDER
from prune2onnx.training.compression.course import Course
from prune2onnx.training.levels import Norm, bake_levels, coarsen, put_on_levels
from prune2onnx.training.loop import Run
from prune2onnx.training.pressure import Pressure, too_short
from prune2onnx.training.size_budget import (
    MARGIN,
    aim,
    as_numbers,
    deployed,
    first_goal,
    is_over,
    largest_level,
    meet_budget,
    propagate_constants,
    put_on_recipe_levels,
    small_parameters,
    survivors_left,
)

_SPEED_COUNTS = {"size": 0.0, "balanced": 0.5, "latency": 1.0}
"""Fraction of a channel's cost that is time; the rest is its weights."""

_KEPT = {"balanced": 0.25, "latency": 0.5}
"""Density of the weights that channel pruning leaves, where speed counts: zeros add none."""

_MEASURE_FROM = 0.4  # fraction of the ramp after which files are measured
_KEEP_FROM = 0.5  # fraction of the last phase after which the budget is met after each epoch
_REACH = {"channels": 32.0, "prune": 2.0}
"""Thresholds may be scaled by at most this factor at the end, or by its inverse."""
_HALVINGS = 12

FALL, RISE = 0.8, 1.15
"""Of the density, while the accuracy loss is within its limit, or over it."""
_SPARSEST = 0.005  # of the densities that are tried where no budget is given

Finish = Callable[[], object]


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Phase:
    """What a phase does besides training.

    Attributes:
        begin: prepares the model; returns a function that ends the phase.
        after_epoch: called between two epochs, with the fraction of the phase that is over.
    """

    begin: Callable[[Course, nn.Module], Finish]
    after_epoch: Callable[[Course, nn.Module, float], None] = _nothing


def train_phase(run: Run, name: str, model: nn.Module) -> None:
    """Takes the model from the end of one phase to the end of the next, in place."""
    phase = PHASES[name]
    if name == "quantize":
        run.course.fold(model)
    finished = run.checkpoints.load_finished(name, model)
    if finished is not None:
        run.restore(finished)
        return
    finish = phase.begin(run.course, model)
    run.train(name, model, lambda one, progress: phase.after_epoch(run.course, one, progress))
    finish()
    run.checkpoints.save_finished(name, model, run.facts())


def _dense(course: Course, model: nn.Module) -> Finish:
    return _nothing


# -- channels -----------------------------------------------------------------------------------


def _channels(course: Course, model: nn.Module) -> Finish:
    _put_thresholds(course, course.copied(model))  # fails now if a weight cannot be pruned
    channels = _put_channel_thresholds(course, model)
    goal = _channel_goal(course)
    _set_pressure(course, "channels", 1, goal)

    def finish() -> None:
        _meet_goal(course, "channels", model, lambda one: _exceeds_channel_goal(course, one, goal))
        frozen = {id(parameter) for parameter in channels.bake()}
        course.state.frozen = tuple(n for n, p in model.named_parameters() if id(p) in frozen)
        plain = deployed(course, model, levels=False)
        with torch.no_grad():  # weights for channels that are pruned
            for name in course.state.pruned:
                model.get_parameter(name).mul_(plain.get_parameter(name) != 0)

    return finish


def _put_channel_thresholds(course: Course, model: nn.Module) -> ChannelThresholds:
    """Puts thresholds on the channel groups of the graph."""
    if course.deployment is None:
        raise Prune2OnnxError(
            "channels.epochs asks for channel pruning, but without a deployment the channel groups "
            "are not known; give fit a deployment, or no channels.epochs"
        )
    recipe = course.recipe
    plain = course.copied(model)
    norms = course.fold(plain)
    settings: Any = recipe.phase("channels")
    return prune_channels(
        model,
        course.deployment.structure(plain.cpu()),
        norms,
        # a budget of multiply-adds alone, without speed as a goal, counts nothing else
        speed=_SPEED_COUNTS[recipe.goal] or float(recipe.prunes_channels),
        by_macs=recipe.target_macs is not None,
        multiple=recipe.file.multiple,
        chosen=course.state.pruned,
        function=settings.function,
        beta=settings.beta,
        start=settings.start,
    )


def _exceeds_channel_goal(course: Course, model: nn.Module, goal: float) -> bool:
    """Whether more of the channels' cost is left than wanted."""
    channels = channel_thresholds_of(model)
    assert channels is not None  # the caller scales them
    target = course.recipe.target_macs
    if target is not None and float(channels.macs_left()) > target:
        return True
    return float(channels.left()) > goal


def _channel_goal(course: Course) -> float:
    """Fraction of the channels' cost that is to be left."""
    recipe = course.recipe
    if recipe.goal == "size" and recipe.target_macs is None:
        return min(1.0, recipe.channels.margin * first_goal(course))
    return recipe.target_macs or MACS


# -- prune --------------------------------------------------------------------------------------


def _prune(course: Course, model: nn.Module) -> Finish:
    release: Finish = _nothing
    start = 1.0
    if course.recipe.channels.epochs:
        release = _hold(course, model)
        start = survivors_left(course, model) / course.state.size
        if course.recipe.goal != "size" and not course.recipe.target_density:
            course.state.goal = _KEPT[course.recipe.goal] * start
    _put_thresholds(course, model)
    _set_pressure(
        course, "prune", course.state.size, min(start, MARGIN["prune"] * first_goal(course)), start
    )

    def finish() -> None:
        _meet_goal(course, "prune", model, lambda one: is_over(course, one, MARGIN["prune"]))
        bake(model)
        release()

    return finish


def warn_of_a_short_phase(course: Course, model: nn.Module, stacklevel: int) -> None:
    """Says before the training that thresholds cannot reach their goal in the steps they have.

    Channels pruned before would leave fewer weights, so with them it is not known.
    """
    recipe = course.recipe
    if not recipe.prune.pressure:  # no goal
        return
    chosen = checked_weights(model, recipe.prune.include, recipe.prune.exclude)
    course.state.size = sum(places[0].value.numel() for places in chosen.values())
    goal = MARGIN["prune"] * first_goal(course)
    if text := too_short(recipe.prune, course.steps_of("prune"), goal):
        warnings.warn(text, PruningWarning, stacklevel=stacklevel + 1)


def _put_thresholds(course: Course, model: nn.Module) -> None:
    chosen = course.recipe.prune
    prune(
        model,
        function=chosen.function,
        granularity=chosen.granularity,
        thresholds=chosen.thresholds,
        beta=chosen.beta,
        start=chosen.start,
        include=chosen.include,
        exclude=chosen.exclude,
        balance=chosen.balance,
        importance=chosen.importance,
    )
    layers = density(model).layers
    course.state.pruned = tuple(layer.name for layer in layers)
    course.state.size = sum(layer.size for layer in layers)


def _set_pressure(course: Course, phase: str, size: int, goal: float, start: float = 1.0) -> None:
    if not start:
        raise Prune2OnnxError(
            "no weight is left in the channels that remain; raise --channels-margin or "
            "--channels-epochs, or ask for less"
        )
    chosen: Any = course.recipe.phase(phase)
    steps = course.steps_of(phase)
    course.pressure = Pressure(chosen, size, steps, goal, course.device, start=start)


def _meet_goal(
    course: Course, phase: str, model: nn.Module, over: Callable[[nn.Module], bool]
) -> None:
    """Ends the pressure; scales all thresholds by one factor, so that not too much is left."""
    course.pressure = None
    if not course.recipe.prune.pressure:
        return
    low, high = 1 / _REACH[phase], _REACH[phase]
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        trial = course.copied(model)
        _scale(trial, middle)
        low, high = (middle, high) if over(trial) else (low, middle)
    _scale(model, high)


def _scale(model: nn.Module, factor: float) -> None:
    """Multiplies all thresholds of a model, on channels or on weights, by a factor."""
    if (channels := channel_thresholds_of(model)) is not None:
        channels.scale_thresholds(factor)
    else:
        scale_thresholds(model, factor)


def _aim(course: Course, model: nn.Module, progress: float) -> None:
    if progress <= _MEASURE_FROM * course.recipe.prune.ramp or not course.is_due("prune", progress):
        return
    if course.recipe.has_no_budget and course.deployment is not None:
        _follow_metric(course, model)
    else:
        aim(course, model)


def _follow_metric(course: Course, model: nn.Module) -> None:
    """Without a budget, the density falls as long as the metric is within noise of the dense one.

    What is within it while the learning rate is high is so after tuning, too.
    """
    assert course.pressure is not None  # it is the phase that prunes
    left = course.density(model)
    over = course.drop(model) > course.noise()
    goal = left * RISE if over else min(course.pressure.goal, left * FALL)
    course.pressure.goal = min(1.0, max(goal, _SPARSEST))
    # what is left at the end is as much as was seen to be enough, not what was tried next
    course.state.goal = min(1.0, goal if over else left)


# -- tune ---------------------------------------------------------------------------------------


def _tune(course: Course, model: nn.Module) -> Finish:
    if not course.state.pruned:
        _take_masks(course, model)
    meet_budget(course, model, MARGIN["tune"])
    return _hold(course, model)


def _hold(course: Course, model: nn.Module) -> Callable[[], None]:
    """Freezes zeros of pruned weights and branches; returns a function that ends this.

    Where the optimizer is not made anew, it has momentum: `compression` zeroes them after steps.
    """
    if course.in_place:
        return _nothing
    names = (*course.state.pruned, *course.state.frozen)
    weights = {name: model.get_parameter(name).detach() for name in names}
    return hold_zeros(model, {name: w != 0 for name, w in weights.items()})


def _take_masks(course: Course, model: nn.Module) -> None:
    """Uses the zeros of the given model as its masks."""
    chosen = selected_weights(model, course.recipe.prune.include, course.recipe.prune.exclude)
    layers = [layer for layer in density(model).layers if layer.name in chosen]
    if all(layer.nnz == layer.size for layer in layers):
        raise Prune2OnnxError(
            "start is 'tune', but no weight that can be pruned has a zero; "
            "start with 'prune', or give pruned weights"
        )
    course.state.pruned = tuple(layer.name for layer in layers)
    course.state.size = sum(layer.size for layer in layers)
    course.state.goal = course.recipe.target_density or 1.0  # else as sparse as it is


# -- quantize -----------------------------------------------------------------------------------


def _quantize(course: Course, model: nn.Module) -> Finish:
    settings = course.recipe.quantize

    def error() -> float:
        return course.error(model)

    propagate_constants(course, model, {})
    small, halves = coarsen(
        model,
        small_parameters(course, model),
        settings.small_levels,
        error,
        allowed=error() + course.slack(),
    )
    put_on_recipe_levels(course, model, (*course.state.pruned, *small))
    others = small_parameters(course, model)
    zeros = [name for name in others if not model.get_parameter(name).any()]
    for name in (*halves, *zeros):  # rounded already: not trained any more
        model.get_parameter(name).requires_grad_(False)
    meet_budget(course, model, MARGIN["quantize"])

    def finish() -> None:
        meet_budget(course, model, 1.0)
        scales = bake_levels(model)
        propagate_constants(course, model, scales)
        course.state.steps = as_numbers(scales)

    return finish


def _quantize_in_place(course: Course, model: nn.Module) -> Finish:
    """The same where layers have to stay: BatchNorm is folded in the file alone.

    Until then it is in evaluation mode, so that what is on levels is what the file will hold.
    """
    folded = course.fold(course.copied(model))
    norms: dict[str, Norm] = {}
    chosen = dict.fromkeys(course.state.pruned, largest_level(course.recipe, course.state.size))
    places = prunable_weights(model)
    for norm_name, layer in folded.items():
        place = places[f"{layer}.weight"][0]
        if place.axis == 1 and getattr(place.module, "groups", 1) > 1:
            chosen.pop(f"{layer}.weight", None)  # its channels are along two axes
            continue
        norm: Any = model.get_submodule(norm_name)
        norms[f"{layer}.weight"] = Norm(norm, place.axis)
    hooks = [one.module.register_forward_pre_hook(_evaluates) for one in norms.values()]
    put_on_levels(model, chosen, norms=norms)
    meet_budget(course, model, MARGIN["quantize"])

    def finish() -> None:
        for hook in hooks:
            hook.remove()

    return finish


def _evaluates(layer: nn.Module, _: object) -> None:
    layer.eval()


def _keep_budget(course: Course, model: nn.Module, progress: float) -> None:
    if _KEEP_FROM <= progress < 1 and course.is_due("quantize", progress):
        meet_budget(course, model, 1.0)


PHASES: Mapping[str, Phase] = {
    "dense": Phase(_dense),
    "channels": Phase(_channels),
    "prune": Phase(_prune, _aim),
    "tune": Phase(_tune),
    "quantize": Phase(_quantize, _keep_budget),
}
"""Name -> phase, in the order of the recipe."""

IN_PLACE: Mapping[str, Phase] = {**PHASES, "quantize": Phase(_quantize_in_place, _keep_budget)}
"""The same for a network whose layers have to stay, as its optimizer holds their parameters."""

assert tuple(PHASES) == ORDER
