"""Inputs and targets as one array, a tuple of arrays or a dict of arrays; the same for tensors.

A model gets an array as its argument, a tuple as arguments, a dict as keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def leaves(value: Any) -> list[Any]:
    """The arrays, in order; none where there is nothing (None)."""
    if value is None:
        return []
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else [value]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure, with a function applied to each array."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: function(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(function(each) for each in value)
    return function(value)


def stacked(values: Sequence[Any], stack: Callable[[list[Any]], Any]) -> Any:
    """One structure with the arrays of many, put together by a function such as `numpy.stack`."""
    head = values[0]
    if head is None:
        return None
    if isinstance(head, dict):
        return {name: stack([value[name] for value in values]) for name in head}
    if isinstance(head, tuple):
        return tuple(stack(list(parts)) for parts in zip(*values, strict=True))
    return stack(list(values))


def shapes(value: Any) -> Any:
    """The same structure, of shapes."""
    return mapped(lambda array: tuple(array.shape), value)


def described(value: Any) -> str:
    """Shapes and types in words: 'float32 [2, 3]', '(int64 [2], float32 [2, 4])'.

    >>> import numpy as np
    >>> described({"a": np.zeros((2, 3), np.float32)})
    '{a: float32 [2, 3]}'
    """
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {described(each)}" for name, each in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(described, value)) + ")"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments with which a model is called."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
