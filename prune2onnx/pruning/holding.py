"""Holds the zeros of a baked model: its copies hold theirs, too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning.wrappers import unwrapped

_HELD = "_held_zeros"
"""The attribute of a layer with what holds its zeros: it goes wherever the layer is copied to."""


class _Held:
    """A parameter whose gradient is zero where its mask is False.

    A hook on a tensor is lost in copies and in files. So this object is in the layer's attributes:
    copied, or loaded from a file, it puts its hook on the parameter that was copied with it.
    """

    def __init__(self, parameter: nn.Parameter, mask: Tensor) -> None:
        self.parameter, self.mask = parameter, mask
        self.handle: Any = None
        if parameter.requires_grad:  # a frozen one does not move
            self.handle = parameter.register_hook(self._masked)  # type: ignore[no-untyped-call]

    def _masked(self, gradient: Tensor) -> Tensor:
        if self.mask.device != gradient.device:  # the model was moved
            self.mask = self.mask.to(gradient.device)
        return self.mask * gradient

    def release(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held(copy.deepcopy(self.parameter, memo), copy.deepcopy(self.mask, memo))

    def __reduce__(self) -> tuple[type[_Held], tuple[nn.Parameter, Tensor]]:
        return _Held, (self.parameter, self.mask)


def hold_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """Keeps pruned elements at zero while the survivors are trained on.

    Their gradients become zero, so an optimizer that does not update a zero element with zero
    gradients (SGD, Adam, AdamW) never moves them. Make a new optimizer first: an old one still has
    their momentum. Deep copies of the model hold their zeros, too, and so does a whole model that
    was saved with `torch.save` and loaded; a state_dict has values only.

    Args:
        model: the baked model.
        masks: what `bake` returned.

    Returns:
        A function that ends this, for this model and not for its copies.

    Raises:
        Prune2OnnxError: a mask fits no parameter of the model.
    """
    model = unwrapped(model)
    parameters = {name: _parameter(model, name, mask) for name, mask in masks.items()}
    held: list[tuple[nn.Module, _Held]] = []
    for name, mask in masks.items():
        one = _Held(parameters[name], mask)
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.__dict__.setdefault(_HELD, []).append(one)
        held.append((layer, one))

    def release() -> None:
        for layer, one in held:
            one.release()
            layer.__dict__[_HELD] = [other for other in layer.__dict__[_HELD] if other is not one]

    return release


def _parameter(model: nn.Module, name: str, mask: Tensor) -> nn.Parameter:
    """The parameter that a mask is for."""
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise Prune2OnnxError(
            f"{name}: not a parameter of this {type(model).__name__}; give hold_zeros the model "
            "that was baked, and the masks that bake returned"
        ) from error
    if parameter.shape != mask.shape or mask.dtype != torch.bool:
        raise Prune2OnnxError(
            f"{name}: a mask of shape {list(mask.shape)} and {mask.dtype}, expected "
            f"{list(parameter.shape)} and torch.bool, as bake returns it"
        )
    return parameter
