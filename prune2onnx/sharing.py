"""Weight sharing on a module: parameters replaced by codes and trainable centroids, and back.

The torch side of `quantize`: `share` puts a codebook on a parameter, training then moves the
centroids, each by the gradient summed over its members (Deep Compression, arXiv 1510.00149,
section 3), and `bake_codebooks` leaves plain parameters again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.quantize import Quantized, share_values, to_half


class _Lookup(torch.autograd.Function):
    """Spreads centroids over their members; the gradient of a centroid is its members' sum."""

    @staticmethod
    def forward(ctx: Any, centroids: Tensor, members: Tensor, codes: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(members, codes)
        ctx.levels = centroids.numel()
        flat = centroids.new_zeros(size)
        return flat.index_copy_(0, members, centroids[codes])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        members, codes = ctx.saved_tensors
        summed = grad.new_zeros(ctx.levels).index_add_(0, codes, grad[members])
        return summed, None, None, None


class _Codebook(nn.Module):
    """The parametrization of one parameter: centroids -> weight."""

    members: Tensor
    codes: Tensor

    def __init__(self, quantized: Quantized, device: torch.device) -> None:
        super().__init__()
        flat = torch.from_numpy(quantized.codes.reshape(-1)).to(device)
        self.shape = quantized.codes.shape
        self.register_buffer("members", flat.nonzero().flatten(), persistent=False)
        self.register_buffer("codes", flat[self.members] - 1, persistent=False)
        self.centroids = torch.from_numpy(quantized.codebook).to(device)

    def forward(self, centroids: Tensor) -> Tensor:
        size = int(torch.Size(self.shape).numel())
        flat: Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            centroids, self.members, self.codes, size
        )
        return flat.view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.centroids


def _holders(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every module and attribute that holds the parameter of this name (tied ones included)."""
    parameter = model.get_parameter(name)
    return [
        (module, attribute)
        for module in model.modules()
        for attribute, value in module.named_parameters(recurse=False, remove_duplicate=False)
        if value is parameter
    ]


def share(model: nn.Module, levels: dict[str, int], *, pruned: Iterable[str] = ()) -> nn.Module:
    """Replaces parameters by codes and trainable centroids, in place.

    Make the optimiser after this call. Deterministic: the same parameters give the same codes.

    Args:
        model: a module with plain parameters (bake it first).
        levels: parameter name -> number of shared values, 1 to 256.
        pruned: names among them whose zeros stay zero and take no level.

    Returns:
        The same model.
    """
    pruned = set(pruned)
    for name, count in levels.items():
        parameter = model.get_parameter(name)
        values = parameter.detach().cpu().numpy()
        try:
            quantized = share_values(values, count, zero_is_pruned=name in pruned)
        except Prune2OnnxError as error:
            raise Prune2OnnxError(f"{name}: {error}") from error
        codebook = _Codebook(quantized, parameter.device)
        original: nn.Parameter | None = None
        for module, attribute in _holders(model, name):
            # unsafe: the parameter is stored in another shape, as its centroids
            parametrize.register_parametrization(module, attribute, codebook, unsafe=True)
            chain = cast(Any, module).parametrizations[attribute]
            if original is None:
                original = nn.Parameter(codebook.centroids.clone(), parameter.requires_grad)
            chain.original = original
    return model


def coarsen(
    model: nn.Module,
    names: Iterable[str],
    levels: int,
    error: Callable[[], float],
    *,
    allowed: float,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Chooses how small parameters, biases above all, are stored: as coarsely as accuracy allows.

    In order of bytes: a codebook, half precision, as they are; the first with which the error
    stays within what is allowed, each judged with those chosen before it in place.

    Args:
        model: its parameters take the coarser values that were chosen.
        names: the parameters to try, in this order.
        levels: of a codebook; not tried where it would take more than it saves.
        error: measures the model as it stands.
        allowed: the largest error to accept.

    Returns:
        Parameter name -> levels, for `share`; and the names of those rounded to float16.
    """
    codebooks: dict[str, int] = {}
    halves: list[str] = []
    for name in names:
        parameter = model.get_parameter(name)
        values = parameter.detach().cpu().numpy().copy()
        trials: list[tuple[NDArray[Any], Callable[[str], object]]] = []
        if values.size > 2 * levels:
            shared = share_values(values, levels, zero_is_pruned=False).dense()
            trials.append((shared, lambda chosen: codebooks.update({chosen: levels})))
        half = to_half(values)
        if half is not None:
            trials.append((half, halves.append))
        for trial, accept in trials:
            _assign(parameter, trial)
            if error() <= allowed:
                accept(name)
                break
        else:
            _assign(parameter, values)
    return codebooks, tuple(halves)


def _assign(parameter: nn.Parameter, values: NDArray[Any]) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values))


def bake_codebooks(model: nn.Module) -> tuple[str, ...]:
    """Turns codebooks back into plain parameters with the shared values, in place.

    Returns:
        The names of the parameters, in the order of the modules.
    """
    names: list[str] = []
    baked: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in list(cast(Any, module).parametrizations.items()):
            if not isinstance(chain[0], _Codebook):
                continue
            key = id(chain.original)
            if key not in baked:
                with torch.no_grad():
                    values = getattr(module, attribute).detach().clone()
                    baked[key] = nn.Parameter(values, chain.original.requires_grad)
                names.append(f"{prefix}.{attribute}" if prefix else attribute)
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            setattr(module, attribute, baked[key])
    return tuple(names)
