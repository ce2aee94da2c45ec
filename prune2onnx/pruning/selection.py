"""Selects weights to prune: the matrices of supported layers whose names match patterns.

Which attribute of which layer is one: `PRUNABLE`, `places_in`. Thresholds on them are in `weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.pruning.computed import remedy

# Layer type -> its matrices: attribute, and the axis of the output channels.
PRUNABLE: dict[type[nn.Module], dict[str, int]] = {
    nn.Linear: {"weight": 0},
    nn.Conv1d: {"weight": 0},
    nn.Conv2d: {"weight": 0},
    nn.Conv3d: {"weight": 0},
    nn.ConvTranspose1d: {"weight": 1},
    nn.ConvTranspose2d: {"weight": 1},
    nn.ConvTranspose3d: {"weight": 1},
    nn.Bilinear: {"weight": 0},
    nn.Embedding: {"weight": 0},  # a row is a token
    nn.EmbeddingBag: {"weight": 0},
    nn.MultiheadAttention: {  # its out_proj is a Linear
        "in_proj_weight": 0,
        "q_proj_weight": 0,
        "k_proj_weight": 0,
        "v_proj_weight": 0,
    },
    nn.RNNCellBase: {"weight_ih": 0, "weight_hh": 0},
}

# The same for types of libraries that are not imported, by module and name. Conv1D of GPT-2 is a
# linear layer whose weight is [in, out].
_FOREIGN: dict[tuple[str, str], dict[str, int]] = {
    ("transformers.pytorch_utils", "Conv1D"): {"weight": 1},
}

KINDS = "Linear, convolution, recurrent, attention, Embedding and Bilinear layers"
"""The layers above, in words."""


@dataclass(frozen=True)
class Place:
    """Where a weight is: an attribute of a layer.

    Attributes:
        module: the layer.
        attribute: "weight" in most.
        axis: of the weight, along which the output channels lie.
    """

    module: nn.Module
    attribute: str
    axis: int

    @property
    def value(self) -> Tensor:
        """The weight, computed if the layer computes it."""
        value: Tensor = getattr(self.module, self.attribute)
        return value


def places_in(module: nn.Module) -> Iterator[Place]:
    """The matrices of one layer that can be pruned; of most modules there are none."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (
        module.max_norm is not None or module.sparse
    ):
        return  # changed in place by each look-up; or its gradients are sparse tensors
    if isinstance(module, nn.RNNBase):
        names: Any = module._flat_weights_names
        axes = {name: 0 for name in names if name.startswith("weight")}
    else:
        axes = next(
            (axes for type_, axes in PRUNABLE.items() if isinstance(module, type_)),
            {},
        ) or next(
            (
                _FOREIGN[one.__module__, one.__name__]
                for one in type(module).__mro__
                if (one.__module__, one.__name__) in _FOREIGN
            ),
            {},
        )
    for attribute, axis in axes.items():
        computed = parametrize.is_parametrized(module, attribute)
        if computed or getattr(module, attribute, None) is not None:
            yield Place(module, attribute, axis)


def _matching(names: Sequence[str], pattern: str) -> set[str]:
    """The weights that a pattern matches, by their own names or by their layers'."""
    return {
        name
        for name in names
        if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
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


def check_ties(name: str, weight: Tensor, places: Sequence[Place], model: nn.Module) -> None:
    """Checks that a weight is not shared with a layer of another type, which is not pruned."""
    known = {place.module for place in places}
    for other, module in model.named_modules():
        if module not in known and any(p is weight for p in module._parameters.values()):
            raise Prune2OnnxError(
                f"{name}: shared with {other}, a {type(module).__name__}, which is not pruned; "
                "exclude the weight"
            )


def prunable_weights(model: nn.Module) -> dict[str, tuple[Place, ...]]:
    """Weight name -> where it is, in module order.

    A weight that several layers share is listed once, under its first name.
    """
    found: dict[int, tuple[str, list[Place]]] = {}
    for path, module in model.named_modules():
        for place in places_in(module):
            layer: Any = module
            if parametrize.is_parametrized(layer, place.attribute):
                # a parametrization of several tensors (weight_norm) has no single original
                chain = layer.parametrizations[place.attribute]
                weight = getattr(chain, "original", chain)
            else:
                weight = place.value
            name = f"{path}.{place.attribute}" if path else place.attribute
            found.setdefault(id(weight), (name, []))[1].append(place)
    return {name: tuple(places) for name, places in found.values()}


def _holds(module: nn.Module) -> bool:
    """Whether a module holds parameters itself."""
    return next(module.parameters(recurse=False), None) is not None


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
            f"{type(model).__name__}: no layer to prune, expected at least one of {KINDS}; {where}"
        )
    chosen = select(names, include, "include") - select(names, exclude, "exclude")
    if not chosen:
        raise RecipeError("include and exclude leave no weight to prune")
    return tuple(name for name in names if name in chosen)


def checked_weights(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, tuple[Place, ...]]:
    """The weights that patterns select, each with where it is, fit to be pruned.

    Raises:
        RecipeError: a pattern matches nothing, or nothing is left.
        Prune2OnnxError: the model has no prunable layer, or a weight is computed by its layer, not
            finite, not initialised, or shared with a layer of another type.
    """
    found = prunable_weights(model)
    chosen = {name: found[name] for name in selected_weights(model, include, exclude)}
    for name, places in chosen.items():
        for place in places:
            if what := remedy(place.module, place.attribute):
                raise Prune2OnnxError(f"{name}: {what}, or exclude the layer")
        weight = places[0].value
        check_weight(name, weight)
        check_ties(name, weight, places, model)
    return chosen
