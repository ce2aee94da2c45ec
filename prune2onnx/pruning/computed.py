"""Weights that a layer computes before each use: copied, or replaced by plain parameters.

1. parametrizations (`torch.nn.utils.parametrize`), those of this project and torch's own
   weight_norm, spectral_norm and orthogonal
2. the older weight_norm and spectral_norm, and the masks of `torch.nn.utils.prune`: hooks that
   recompute an attribute before each forward

`copy.deepcopy` refuses the computed tensor of 2, as it has a gradient's history. In 1 it lets copy
and original share the class that has the weight as a property: whoever removes the property from
one removes it from both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_Module = TypeVar("_Module", bound=nn.Module)

_ORDER = "_prune2onnx_order"
"""Attribute of a module: the names of its parameters before one of them was computed."""


def remedy(module: nn.Module, name: str) -> str | None:
    """What makes a computed tensor of a module a plain parameter, in words; None if it is one."""
    hook = next((hook for hook, attribute in _hooks(module) if attribute == name), None)
    if isinstance(hook, prune.BasePruningMethod):
        return (
            "masked by torch.nn.utils.prune; make its zeros permanent with "
            f"torch.nn.utils.prune.remove(layer, {name!r})"
        )
    if hook is not None:
        kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
        return f"under {kind}; remove it with torch.nn.utils.remove_{kind}(layer)"
    if parametrize.is_parametrized(module, name):
        return (
            "already parametrized; bake it, or remove it with "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        )
    value = getattr(module, name)
    if value is None or isinstance(value, nn.Parameter):
        return None
    return f"a {type(value).__name__} that the layer computes; give it a parameter"


def parametrize_own(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Registers a parametrization on this module alone, not on those that it is a copy of.

    The parameter keeps its hooks: torch sets it to what it is by `set_`, with which those of
    DistributedDataParallel would be lost, and with them its gradients.
    """
    _own_class(module)
    order = getattr(module, _ORDER, None) or tuple(module._parameters)
    setattr(module, _ORDER, order if name in order else (*order, name))
    parameter: Any = module._parameters.get(name)
    if parameter is not None:
        parameter.set_ = lambda _: parameter
    try:
        parametrize.register_parametrization(module, name, parametrization)
    finally:
        if parameter is not None:
            del parameter.set_
    if isinstance(module, nn.RNNBase):
        _compute_flat_weights(module)


def unparametrize_own(module: nn.Module, name: str) -> None:
    """Leaves the original tensor as a plain parameter of this module; copies keep theirs.

    It is in its old place, not the last: the order of parameters is that of the file's, too.
    """
    _own_class(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    order = getattr(module, _ORDER)
    if not parametrize.is_parametrized(module):
        delattr(module, _ORDER)
    _put_in_place(module, name, order)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _compute_flat_weights(module: nn.RNNBase) -> None:
    """Lets a recurrent layer compute its weights in each forward pass.

    It keeps a list of them beside the attributes, as cuDNN has it, and would go on reading the
    tensors from before. That list is made at the beginning of a pass here, and emptied at the end:
    computed tensors that stay could not be copied.
    """
    own: Any = type(module)
    if "_init_flat_weights" not in vars(own):
        forward = own.forward

        def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
            try:
                return forward(self, *args, **kwargs)
            finally:
                self._init_flat_weights()

        own.forward = compute
        own._init_flat_weights = _empty_flat_weights
        own._update_flat_weights = lambda self: None
    module._init_flat_weights()


def _empty_flat_weights(module: Any) -> None:
    module._flat_weights = [None] * len(module._flat_weights_names)
    module._flat_weight_refs = []


def deep_copy(model: _Module) -> _Module:
    """A copy of a model that shares nothing with it, whatever its layers compute."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    result = copy.deepcopy(model, memo)
    for module in result.modules():
        _own_class(module)
    return result


def has_computed(model: nn.Module) -> bool:
    """Whether any layer computes a weight."""
    return any(
        parametrize.is_parametrized(module) or next(_hooks(module), None) is not None
        for module in model.modules()
    )


def with_plain_parameters(model: _Module) -> _Module:
    """The model itself if no layer computes a weight; else a copy that has the values instead.

    The copy is in evaluation mode, in which its outputs are the model's. Tensors that layers shared
    are shared in it, too.
    """
    if not has_computed(model):
        return model
    model = deep_copy(model).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # these are older, which is why we are here
        for module in list(model.modules()):
            for hook, name in list(_hooks(module)):
                if isinstance(hook, WeightNorm):
                    remove_weight_norm(module, name)
                elif isinstance(hook, SpectralNorm):
                    remove_spectral_norm(module, name)
                else:
                    prune.remove(module, name)  # type: ignore[no-untyped-call]
        computed = [
            (module, name, getattr(module, name).clone())
            for module in model.modules()
            if parametrize.is_parametrized(module)
            for name in cast(Any, module).parametrizations
        ]
        shared: dict[tuple[int, ...], nn.Parameter] = {}
        for module, name, value in computed:
            if not parametrize.is_parametrized(module, name):
                continue  # it was part of a parametrization that is gone
            chain = cast(Any, module).parametrizations[name]
            same = tuple(id(tensor) for tensor in (*chain.parameters(), *chain.buffers()))
            plain = shared.setdefault(same, nn.Parameter(value, requires_grad=False))
            parametrize.remove_parametrizations(
                module, name, leave_parametrized=not chain.is_tensor
            )
            delattr(module, name)
            module.register_parameter(name, plain)
            if name in (order := getattr(module, _ORDER, ())):
                _put_in_place(module, name, order)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return model


def _put_in_place(module: nn.Module, name: str, order: Sequence[str]) -> None:
    """Moves the parameters that come behind one behind it."""
    own = module._parameters
    for later in order[order.index(name) + 1 :]:
        if later in own:
            own[later] = own.pop(later)


def _own_class(module: nn.Module) -> None:
    """Gives a parametrized module a class of its own, not that of its copies."""
    if not parametrize.is_parametrized(module):
        return
    old = type(module)
    own = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(old.__name__, old.__bases__, own)


def _hooks(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """The hooks that compute a tensor before each forward, with the attribute that gets it."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            yield hook, hook.name
        elif isinstance(hook, prune.BasePruningMethod):
            yield hook, hook._tensor_name


def _tensors(value: object, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in an attribute, and in the lists, tuples and dictionaries there."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)
