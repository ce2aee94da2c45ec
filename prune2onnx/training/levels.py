"""Quantization-aware training: each parameter on levels, whole multiples of one learned scale.

Forward, a weight is `clamp(round(w / s), -k, k) * s`; backward, rounding counts as the identity
within the range of the levels, and the scale is learned, too: Learned Step Size Quantization (Esser
et al., arXiv 1902.08153). Zeros stay zeros. A survivor may still change its level, unlike with
fixed clusters, and a file needs no codebook for it.

`put_on_levels` starts this, `bake_levels` leaves plain parameters again; when, is up to `phases`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.pruning.computed import parametrize_own, unparametrize_own
from prune2onnx.pruning.functions import laid_out_as
from prune2onnx.pruning.learned import Learned
from prune2onnx.pruning.rate import survivor_bits
from prune2onnx.pruning.wrappers import refuse_distributed, unwrapped

MOST_LEVELS = 127
"""Largest level: that of a signed byte."""

_SAMPLE = 1 << 16
_CANDIDATES = 46


class _Round(torch.autograd.Function):
    """Rounds to levels; straight-through gradient for the weight, LSQ's for the scale."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, alive: Tensor, largest: int) -> Tensor:
        steps = w / scale
        levels = steps.round().clamp_(-largest, largest).mul_(alive).add_(0.0)  # no -0
        ctx.save_for_backward(steps, levels, alive)
        ctx.largest = largest
        return laid_out_as(w, levels * scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        steps, levels, alive = ctx.saved_tensors
        grad = grad * alive
        within = steps.abs() <= ctx.largest + 0.5
        moved = torch.where(within, levels - steps, levels)
        # in float64, as on the host, for which a step would have to wait
        counted = alive.sum().clamp_min(1).double() * ctx.largest
        balance = counted.sqrt().reciprocal().to(grad.dtype)
        return grad * within, (moved * grad).sum() * balance, None, None


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNorm that will be folded into the weight before it: a factor on each channel.

    Attributes:
        module: the layer, in evaluation mode from now on, so that the factor is the folded one.
        axis: of the weight's output channels.
    """

    module: Any
    axis: int

    def factor(self, w: Tensor) -> Tensor:
        """[1, ..., channels, ..., 1], what folding multiplies the weight with; never 0."""
        norm = self.module
        with torch.no_grad():
            factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            factor = torch.where(factor.abs() > 1e-12, factor, torch.ones_like(factor))
            shape = [1] * w.ndim
            shape[self.axis] = -1
            return factor.view(shape).to(w.dtype)


class _Levels(Learned):
    """The parametrization of one parameter: w -> levels * scale.

    With a BatchNorm behind, the product of weight and factor is on levels: what a file will hold.
    """

    learned = "scale"
    alive: Tensor

    def __init__(
        self,
        name: str,
        weight: Tensor,
        largest: int,
        scale: nn.Parameter | None = None,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.name, self.largest, self.norm = name, largest, norm
        if scale is None:
            w = weight.detach()
            w = w if norm is None else w * norm.factor(w)
            scale = nn.Parameter(_best_scale(w, largest), weight.requires_grad)
        self.scale = scale
        self.register_buffer("alive", weight.detach() != 0)

    def step(self) -> Tensor:
        """The scale, positive whatever the optimizer does."""
        return self.scale.abs().clamp_min(1e-12)

    def levels(self, w: Tensor) -> Tensor:
        """The levels: whole numbers, float, of w's shape."""
        return _nearest_levels(w, self.step(), self.largest) * self.alive + 0.0  # no -0

    def value(self, w: Tensor) -> Tensor:
        """The weight on levels, rounded once, without gradient; before a BatchNorm is folded."""
        if self.norm is None:
            return self.levels(w) * self.step()
        factor = self.norm.factor(w)
        return self.levels(w * factor) * self.step() / factor

    def forward(self, w: Tensor) -> Tensor:
        factor = None if self.norm is None else self.norm.factor(w)
        folded = w if factor is None else w * factor
        result: Tensor = _Round.apply(  # type: ignore[no-untyped-call]
            folded, self.step(), self.alive, self.largest
        )
        return result if factor is None else result / factor


def _best_scale(w: Tensor, largest: int) -> Tensor:
    """The scale with the least squared error of rounding the nonzeros."""
    values = w[w != 0].float()
    if not values.numel():
        return torch.ones((), device=w.device, dtype=w.dtype)
    values = values[:: -(-values.numel() // _SAMPLE)]
    top = values.abs().max() / largest
    scales = top * torch.linspace(0.3, 1.2, _CANDIDATES, device=w.device)
    errors = [_error(values, s, largest) for s in scales]
    return scales[torch.stack(errors).argmin()].to(w.dtype)


def _common_scale(parameters: Sequence[Tensor], largest: Mapping[str, int]) -> Tensor:
    """The scale with the least squared error, relative to each parameter's own mean square.

    So a parameter counts by its nonzeros: a few biases that would fit a finer scale do not change
    the scale of many weights.
    """
    present = [
        (p.detach(), k) for p, k in zip(parameters, largest.values(), strict=True) if p.any()
    ]
    if not present:
        return torch.ones((), device=parameters[0].device)
    own = torch.stack([_best_scale(p, k) for p, k in present])
    scales = torch.logspace(
        float(own.min().log2()), float(own.max().log2()), _CANDIDATES, base=2, device=own.device
    )
    units = [int(p.count_nonzero()) / p.square().sum() for p, _ in present]
    errors = [
        sum(_error(p, s, k) * unit for (p, k), unit in zip(present, units, strict=True))
        for s in scales
    ]
    return scales[int(np.argmin([float(error) for error in errors]))].to(own.dtype)


def _error(w: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Squared error of rounding to levels."""
    return (_rounded(w, scale, largest) - w).square().sum()


def _rounded(w: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The nearest values on levels; no -0."""
    return (_nearest_levels(w, scale, largest) + 0.0) * scale


def _nearest_levels(w: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The nearest levels, as whole numbers."""
    return (w / scale).round().clamp(-largest, largest)


def put_on_levels(
    model: nn.Module,
    largest: Mapping[str, int],
    *,
    common: bool = False,
    norms: Mapping[str, Norm] | None = None,
) -> nn.Module:
    """Puts parameters on levels with learned scales, in place; zeros stay zeros.

    Make the optimizer after this call.

    Args:
        model: a module with plain parameters (bake it first).
        largest: parameter name -> largest level k, 1 to 127: values are -k s, ..., k s.
        common: whether all parameters share one scale s, which saves one multiplication each in
            the file.
        norms: name of a weight -> the BatchNorm that will be folded into it; its product with that
            one's factor is on levels.

    Returns:
        The same model.

    Raises:
        Prune2OnnxError: no such parameter, a largest level out of range, a value that is not
            finite, or a DistributedDataParallel; the model is left as it was.
    """
    wrapper = model
    refuse_distributed(wrapper, "put on levels")
    model = unwrapped(wrapper)
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, count in largest.items():
        if name not in known:
            raise Prune2OnnxError(
                f"{name}: not a parameter of this {type(model).__name__}; bake it first, and give "
                "names as in its state_dict"
            )
        if not 1 <= count <= MOST_LEVELS:
            raise Prune2OnnxError(f"{name}: largest level {count}, expected 1 to {MOST_LEVELS}")
        if not torch.isfinite(model.get_parameter(name)).all():
            raise Prune2OnnxError(f"{name}: NaN or infinite values fit no level")
    scale: nn.Parameter | None = None
    if common and largest:
        scale = nn.Parameter(_common_scale([model.get_parameter(n) for n in largest], largest))
    for name, count in largest.items():
        parameter = model.get_parameter(name)
        norm = (norms or {}).get(name)
        grid = _Levels(name, parameter, count, scale, norm).to(parameter.device)
        holders = [
            (module, attribute)
            for module in model.modules()
            for attribute, value in module.named_parameters(recurse=False, remove_duplicate=False)
            if value is parameter
        ]
        for module, attribute in holders:
            parametrize_own(module, attribute, grid)
    return wrapper


def _grids(model: nn.Module) -> Iterator[tuple[_Levels, nn.Parameter, list[tuple[Any, str]]]]:
    """Each `_Levels` once, with its parameter and the modules and attributes that hold it."""
    found: dict[int, tuple[_Levels, nn.Parameter, list[tuple[Any, str]]]] = {}
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in cast(Any, module).parametrizations.items():
            if isinstance(chain[0], _Levels):
                entry = found.setdefault(id(chain.original), (chain[0], chain.original, []))
                entry[2].append((module, attribute))
    yield from found.values()


def scales_of(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales, each once, for an optimizer group of their own."""
    return list({id(grid.scale): grid.scale for grid, _, _ in _grids(model)}.values())


def refine(model: nn.Module, factor: float) -> None:
    """Multiplies each scale by a factor up to 1, with as many more levels, in place.

    Values keep their range, and fewer of them are rounded to zero.
    """
    with torch.no_grad():
        for scale in scales_of(model):
            scale.mul_(factor)
        for grid, _, _ in _grids(model):
            grid.largest = min(MOST_LEVELS, math.ceil(grid.largest / factor))


def bake_levels(model: nn.Module) -> dict[str, Tensor]:
    """Leaves plain parameters with values level * scale, rounded once, in place.

    Returns:
        Name of the parameter -> its scale, in the order of the modules.

    Raises:
        Prune2OnnxError: the model is in a DistributedDataParallel.
    """
    refuse_distributed(model, "baked")
    grids = list(_grids(model))
    for grid, original, holders in grids:
        with torch.no_grad():
            original.copy_(grid.value(original))
        for module, attribute in holders:
            unparametrize_own(module, attribute)
    return {grid.name: grid.step().detach().clone() for grid, _, _ in grids}


def round_to_levels(model: nn.Module, name: str, scale: Tensor) -> None:
    """Rounds a plain parameter to multiples of a scale, in place."""
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter.copy_(_rounded(parameter, scale, MOST_LEVELS))


def saliency(weights: Mapping[str, Tensor], sensitivity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saliency of each survivor: how much the loss grows if it is removed, per bit it takes.

    The loss is taken to second order with the diagonal of the empirical Fisher information, as
    Optimal Brain Damage does with the Hessian's (LeCun et al., 1990).

    Args:
        weights: name -> values.
        sensitivity: name -> mean squared gradient, of the weight's shape.

    Returns:
        Name -> float, of the weight's shape; infinite where it is zero already.
    """
    found = {}
    for name, values in weights.items():
        gain = sensitivity[name] * values.square() / survivor_bits(values != 0)
        found[name] = torch.where(values != 0, gain, torch.inf)
    return found


def remove_below(model: nn.Module, saliencies: Mapping[str, Tensor], least: float) -> None:
    """Zeroes survivors of less saliency than `least`; those on levels stay zero."""
    with torch.no_grad():
        grids = {grid.name: grid for grid, _, _ in _grids(model)}
        for name, values in saliencies.items():
            if name in grids:
                grids[name].alive &= values >= least
            else:
                parameter = model.get_parameter(name)
                parameter.copy_(torch.where(values >= least, parameter, 0.0))


def coarsen(
    model: nn.Module,
    names: Iterable[str],
    largest: int,
    error: Callable[[], float],
    *,
    allowed: float,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Stores small parameters, mostly biases, as coarsely as the error allows.

    Tries levels first, then float16, else leaves the parameter; takes the first with which the
    error stays within `allowed`. Choices for earlier parameters are in place for the later ones.

    Args:
        model: its parameters take the coarser values that are chosen.
        names: the parameters to try, in this order.
        largest: the largest level to try.
        error: measures the model as it is.
        allowed: the largest error to accept.

    Returns:
        Parameter name -> largest level, for `put_on_levels`; and the names of those rounded to
        float16.
    """
    levels: dict[str, int] = {}
    halves: list[str] = []
    for name in names:
        parameter = model.get_parameter(name)
        before = parameter.detach().clone()
        if not before.any():  # nothing to store
            continue
        with torch.no_grad():
            scale = _best_scale(before, largest)
            parameter.copy_(_rounded(before, scale, largest))
            if error() <= allowed:
                levels[name] = largest
                continue
            half = before.half().to(before.dtype)
            parameter.copy_(half)
            if torch.isfinite(half).all() and error() <= allowed:
                halves.append(name)
                continue
            parameter.copy_(before)
    return levels, tuple(halves)
