"""How an initializer is made of parameters: as one is, transposed, or with its elements rearranged.

The exporter stores some parameters in another order than torch does: the gates of LSTM and GRU,
whose two directions it stacks, the matrix of Bilinear. Which element comes from where is read from
a graph that was exported with a different value in each element. So no rule of any operator is
written down here, and weights that ONNX orders in its own way can be filled in, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Arrays = Mapping[str, NDArray[Any]]

_UNIQUE = 1 << 24
"""Most elements with a value of their own: whole numbers that float32 holds exactly."""

_SMALL = 2.0**-20  # times a whole number below 2**24: exact, and no larger than 16


@dataclass(frozen=True)
class Arrangement:
    """How the elements of an initializer come from those of parameters.

    Attributes:
        sources: names of the parameters.
        transposed: of a single source: whether it is transposed.
        order: int64, of the initializer's shape: the element's index in the sources, one after the
            other and flattened; None: all of a single source, in its own order or transposed.
    """

    sources: tuple[str, ...]
    transposed: bool = False
    order: NDArray[np.int64] | None = None

    def gathered(self, state: Arrays) -> NDArray[Any]:
        """The initializer, from the values of the parameters."""
        if self.order is None:
            array = state[self.sources[0]]
            return np.ascontiguousarray(array.T if self.transposed else array)
        flat: NDArray[Any] = np.concatenate([state[name].ravel() for name in self.sources])
        return flat[self.order]

    def scattered(self, array: NDArray[Any], state: Arrays) -> dict[str, NDArray[Any]]:
        """The parameters, from an initializer; elements that are not in it keep their values."""
        if self.order is None:
            return {self.sources[0]: np.array(array.T if self.transposed else array, order="C")}
        flat = np.concatenate([state[name].ravel() for name in self.sources])
        flat[self.order] = array
        ends = np.cumsum([state[name].size for name in self.sources])
        parts = np.split(flat, ends[:-1])
        return {
            name: part.reshape(state[name].shape)
            for name, part in zip(self.sources, parts, strict=True)
        }


def mark(model: nn.Module, seed: int = 0) -> None:
    """Gives each element of a model's parameters a value of its own, in place, as far as it can."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    with torch.no_grad():
        if size > _UNIQUE or any(parameter.dtype != torch.float32 for parameter in parameters):
            for parameter in parameters:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            return
        values = (torch.randperm(size, generator=generator) + 1).mul(_SMALL)
        parts = torch.split(values, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view(parameter.shape))


def same_or_transposed(name: str, array: NDArray[Any], own: NDArray[Any]) -> Arrangement | None:
    """How an initializer comes from the parameter of its name; None: in another way."""
    if np.array_equal(array, own):
        return Arrangement((name,))
    return Arrangement((name,), transposed=True) if np.array_equal(array, own.T) else None


def rearranged(initializers: Arrays, state: Arrays, names: Iterable[str]) -> dict[str, Arrangement]:
    """The initializers that are made of some parameters' elements, and how.

    Args:
        initializers: name -> values, of a graph that was exported from marked parameters.
        state: name -> values of the parameters.
        names: those to look for; one of which values occur twice, here or there, is left out.
    """
    names = [name for name in names if state[name].size]
    if not names:
        return {}
    flat = np.concatenate([state[name].ravel() for name in names])
    owner = np.repeat(np.arange(len(names)), [state[name].size for name in names])
    by_value = np.argsort(flat, kind="stable")
    ordered = flat[by_value]
    if (ordered[1:] == ordered[:-1]).any():
        return {}
    found: dict[str, Arrangement] = {}
    for initializer, array in initializers.items():
        if not array.size or array.dtype != flat.dtype:
            continue
        at = np.searchsorted(ordered, array.ravel()).clip(max=len(ordered) - 1)
        if not np.array_equal(ordered[at], array.ravel()):
            continue
        index = by_value[at]
        used = np.unique(owner[index])
        # indices into the used sources alone
        offset = np.zeros(len(names), np.int64)
        offset[used] = np.cumsum([0, *(state[names[one]].size for one in used)])[:-1]
        starts = np.cumsum([0, *(state[name].size for name in names)])[:-1]
        order = index - starts[owner[index]] + offset[owner[index]]
        sources = tuple(names[one] for one in used)
        found[initializer] = Arrangement(sources, order=order.reshape(array.shape))
    return found


def covered(arrangements: Iterable[Arrangement], state: Arrays) -> set[str]:
    """The parameters of which every element is in an initializer."""
    seen: dict[str, NDArray[np.bool_]] = {}
    whole: set[str] = set()
    for one in arrangements:
        if one.order is None:
            whole.add(one.sources[0])
            continue
        begin = 0
        for name in one.sources:
            size = state[name].size
            flat = one.order.ravel()
            mine = flat[(flat >= begin) & (flat < begin + size)] - begin
            seen.setdefault(name, np.zeros(size, np.bool_))[mine] = True
            begin += size
    return whole | {name for name, elements in seen.items() if elements.all()}
