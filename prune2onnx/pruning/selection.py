"""Selects weights to prune: those of supported layers whose names match patterns.

Thresholds on them are in `weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.pruning.computed import remedy

# Layer type -> the axis of its output channels in `weight`.
PRUNABLE: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
}


def _matching(names: Sequence[str], pattern: str) -> set[str]:
    """The weights that a pattern matches, by their own names or by their layers'."""
    return {
        name
        for name in names
        if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    }


def select(names: Sequence[str], patterns: Iterable[str], what: str) -> set[str]:
    """The weights that any of the patterns matches; `what` names the patterns in an error."""
    chosen: set[str] = set()
    for pattern in patterns:
        matched = _matching(names, pattern)
        if not matched:
            raise RecipeError(
                f"{what} pattern {pattern!r} matches no prunable weight; "
                f"there are {', '.join(names)}"
            )
        chosen |= matched
    return chosen


def check_weight(name: str, weight: Tensor) -> None:
    """Checks that a weight is initialised, floating point and finite."""
    if isinstance(weight, UninitializedParameter):
        raise Prune2OnnxError(
            f"{name}: not initialised yet (a lazy layer); run one batch through the model first"
        )
    if not weight.is_floating_point():
        raise Prune2OnnxError(
            f"{name}: dtype {weight.dtype}, expected a floating-point one; exclude the layer"
        )
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise Prune2OnnxError(
            f"{name}: {bad:,} of {weight.numel():,} values are NaN or infinite; "
            "check the weights you loaded, or exclude the layer"
        )


def check_ties(name: str, weight: Tensor, modules: Sequence[nn.Module], model: nn.Module) -> None:
    """Checks that a weight is not shared with a layer of another type, which is not pruned."""
    for other, module in model.named_modules():
        if module not in modules and any(p is weight for p in module._parameters.values()):
            raise Prune2OnnxError(
                f"{name}: shared with {other}, a {type(module).__name__}, which is not pruned; "
                "exclude the weight"
            )


def prunable_weights(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Weight name -> the Linear and convolution layers that hold it, in module order.

    A weight that several layers share is listed once, under its first name.
    """
    holders: dict[int, tuple[str, list[nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, tuple(PRUNABLE)):
            layer: Any = module
            weight = layer.weight
            if parametrize.is_parametrized(layer, "weight"):
                # a parametrization of several tensors (weight_norm) has no single original
                weight = getattr(layer.parametrizations.weight, "original", layer)
            key = f"{name}.weight" if name else "weight"
            holders.setdefault(id(weight), (key, []))[1].append(layer)
    return {name: tuple(modules) for name, modules in holders.values()}


def _holds(module: nn.Module) -> bool:
    """Whether a module holds parameters itself."""
    return next(module.parameters(recurse=False), None) is not None


def channel_axis(layer: nn.Module) -> int:
    """The axis of a prunable layer's weight along which its output channels lie."""
    return next(axis for type_, axis in PRUNABLE.items() if isinstance(layer, type_))


def selected_weights(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """Names of the prunable weights that patterns select, in module order.

    Raises:
        RecipeError: a pattern matches nothing, or nothing is left.
        Prune2OnnxError: the model has no prunable layer.
    """
    names = list(prunable_weights(model))
    if not names:
        types = ", ".join(dict.fromkeys(type(m).__name__ for m in model.modules() if _holds(m)))
        where = f"its parameters are in {types}" if types else "it has no parameters"
        raise Prune2OnnxError(
            f"{type(model).__name__}: no layer to prune, expected at least one of "
            f"{', '.join(t.__name__ for t in PRUNABLE)}; "
            f"{where}"
        )
    chosen = select(names, include, "include") - select(names, exclude, "exclude")
    if not chosen:
        raise RecipeError("include and exclude leave no weight to prune")
    return tuple(name for name in names if name in chosen)


def checked_weights(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, tuple[nn.Module, ...]]:
    """The weights that patterns select, each with the layers that hold it, fit to be pruned.

    Raises:
        RecipeError: a pattern matches nothing, or nothing is left.
        Prune2OnnxError: the model has no prunable layer, or a weight is computed by its layer, not
            finite, not initialised, or shared with a layer of another type.
    """
    holders = prunable_weights(model)
    chosen = {name: holders[name] for name in selected_weights(model, include, exclude)}
    for name, modules in chosen.items():
        for module in modules:
            if what := remedy(module, "weight"):
                raise Prune2OnnxError(f"{name}: {what}, or exclude the layer")
        weight: Any = modules[0].weight
        check_weight(name, weight)
        check_ties(name, weight, modules, model)
    return chosen
