"""Modules with a learned parameter that the network may be kept from knowing.

In a training loop of the user's own, thresholds and scales have an optimizer of their own. As
parameters of the network they would be in the user's, too, at its learning rate, and in what
DistributedDataParallel, gradient clipping and averages of weights list once and for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Learned(nn.Module):
    """A module whose parameter, named by `learned`, can be hidden from `parameters()`."""

    learned = "rho"

    def hide(self) -> nn.Parameter:
        """Takes the learned parameter out of `parameters()` and `state_dict()`; returns it."""
        if self.learned in self._parameters:
            parameter: Any = self._parameters.pop(self.learned)
            self.__dict__[self.learned] = parameter
        hidden: nn.Parameter = self.__dict__[self.learned]
        return hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learned:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        hidden = self.__dict__.get(self.learned)
        if isinstance(hidden, nn.Parameter):
            with torch.no_grad():
                hidden.data = fn(hidden.data)
        return self
