"""A network's state_dict under plain names while its weights are parametrized.

So what a loop saves in the middle of a compression, averages, or hands to another library is a
state_dict of the plain network: `fc.weight`, not `fc.parametrizations.weight.original`. What the
parametrizations learn besides is in the state of `compression`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

_ORIGINAL = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")
_OTHER = re.compile(r"(^|\.)parametrizations\.[^.]+\.\d+\.")


def use_plain_names(model: nn.Module) -> None:
    """Lets `state_dict` and `load_state_dict` of a network use plain names, in that order, too.

    Args:
        model: with plain parameters, whose order is kept.
    """
    order = {name: index for index, name in enumerate(model.state_dict())}

    def saved(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
        own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        named = {}
        for key, value in own.items():
            if not _OTHER.search(key):
                named[_plain(key)] = value
        last = len(order)
        for key in sorted(named, key=lambda key: order.get(key.removeprefix(prefix), last)):
            state[key] = named[key]

    def loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        for key, value in _own_state(module).items():
            if _OTHER.search(key):  # not a part of the plain network
                state.setdefault(prefix + key, value)
            elif (plain := prefix + _plain(key)) in state and plain != prefix + key:
                state[prefix + key] = state.pop(plain)

    model._register_state_dict_hook(saved)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(loaded)  # type: ignore[no-untyped-call]


def _plain(name: str) -> str:
    return _ORIGINAL.sub(r"\1\2", name)


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the names they have in the modules."""
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        stem = f"{path}." if path else ""
        for name, value in module._parameters.items():
            if value is not None:
                state[stem + name] = value
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                state[stem + name] = buffer
    return state
