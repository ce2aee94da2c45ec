"""Granularity: how a weight is split into groups that are pruned as a whole.

A granularity measures each group by one number, which the pruning function compares with the
threshold, and spreads the pruned measure back over the group. Thresholds are in `weights`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """Every element is a group of its own; its measure is its value."""

    channel_axis: int

    def measure(self, w: Tensor) -> Tensor:
        """The measure of every group: w itself."""
        return w

    def spread(self, w: Tensor, pruned: Tensor) -> Tensor:
        """The weight whose measure is `pruned`: `pruned` itself."""
        return pruned


@dataclass(frozen=True)
class Channel:
    """An output channel or neuron is a group; its measure is the root mean square of its weights.

    The root mean square, not the norm, so that thresholds of layers with different fan-in are
    comparable.
    """

    channel_axis: int

    def measure(self, w: Tensor) -> Tensor:
        """[1, ..., channels, ..., 1]: root mean square per output channel of w."""
        rest = [axis for axis in range(w.ndim) if axis != self.channel_axis]
        # The clamp keeps the square root's gradient finite for a channel of zeros.
        tiny = 1e-12 if w.element_size() > 2 else 1e-4
        return w.square().mean(dim=rest, keepdim=True).clamp_min(tiny**2).sqrt()

    def spread(self, w: Tensor, pruned: Tensor) -> Tensor:
        """Scales every channel of w from its measure to `pruned` ([1, ..., channels, ..., 1])."""
        return w * (pruned / self.measure(w))


GRANULARITIES: dict[str, type[Weight] | type[Channel]] = {"weight": Weight, "channel": Channel}
