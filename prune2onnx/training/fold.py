"""Folds BatchNorm into the convolution or linear layer before it, on a torch module.

Exporters and runtimes fold BatchNorm, too, but then each channel's weights are levels times a
factor of its own, and no longer share a codebook. So it is folded here, before weights are put on
levels. Which layer is before which is read from the traced graph, not guessed from names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from prune2onnx.pruning import with_plain_parameters
from prune2onnx.pruning.wrappers import refuse_distributed, unwrapped
from prune2onnx.tasks.structure import arguments
from prune2onnx.training.exporting.refusals import cannot_trace

# The operators that BatchNorm may follow. A layer's type must be one of `_LAYERS`, too: a
# subclass may use its weight and bias in another way.
_OPERATORS = {
    torch.ops.aten.linear.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.conv3d.padding,
    torch.ops.aten.conv_transpose1d.default,
    torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has a BatchNorm layer of any type."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def fold_batch_norm(
    model: nn.Module, example: Any, pairs: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Folds every BatchNorm whose only input is one Linear or convolution layer, in place.

    The model goes to evaluation mode, in which its output stays the same to rounding; zeros of a
    weight stay zeros. A BatchNorm that follows anything else, or a layer used more than once, is
    left as it is.

    Args:
        model: a module with plain parameters that `torch.export` can trace.
        example: [2, ...], a batch of the model's input on its device; a tuple or dict of such.
        pairs: what this returned for a copy of the same network, which spares the trace.

    Returns:
        Name of each BatchNorm layer that became `Identity` -> name of the layer it went into.

    Raises:
        Prune2OnnxError: torch cannot trace the model, or it is in a DistributedDataParallel.
    """
    refuse_distributed(model, "folded")
    model = unwrapped(model)
    model.eval()
    if not has_batch_norm(model):
        return {}
    if pairs is None:
        pairs = _pairs(model, example)
    folded = {}
    for norm_name, layer_name in pairs.items():
        norm = model.get_submodule(norm_name)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):  # not folded before
            _fold(model.get_submodule(layer_name), norm)
            model.set_submodule(norm_name, nn.Identity())
            folded[norm_name] = layer_name
    return folded


def _pairs(model: nn.Module, example: Any) -> dict[str, str]:
    """Name of each BatchNorm layer that can be folded -> name of the layer it can go into."""
    try:
        program = torch.export.export(with_plain_parameters(model), *arguments(example))
    except Exception as error:  # the tracer raises what the model's code raises, and more
        raise cannot_trace(model, example, error) from error
    names = program.graph_signature.inputs_to_parameters
    pairs = {}
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        before, scale = node.args[0], node.args[1]
        if before.target not in _OPERATORS or len(before.users) != 1 or scale is None:
            continue
        weight = before.args[1]
        if len(weight.users) != 1 or len(scale.users) != 1:
            continue
        if weight.name not in names or scale.name not in names:
            continue
        layer_name, _, attribute = names[weight.name].rpartition(".")
        norm_name = names[scale.name].rpartition(".")[0]
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        if type(layer) not in _LAYERS or attribute != "weight":
            continue
        if not _is_plain(layer) or not _is_plain(norm):
            continue
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        if isinstance(layer, nn.Linear) and before.meta["val"].ndim != 2:
            continue  # after a sequence, BatchNorm's channels are its positions
        pairs[norm_name] = layer_name
    return pairs


def _is_plain(module: nn.Module) -> bool:
    """Whether weight and bias are parameters, not computed by the module."""
    return {"weight", "bias"} <= module._parameters.keys()


def _fold(layer: Any, norm: Any) -> None:
    transposed = isinstance(layer, _TRANSPOSED)
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(layer, nn.Linear):
        weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    elif transposed and layer.groups > 1:
        # [in, out / groups, ...]: the channels of a group lie along axis 1 of its rows
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shape = (layer.groups, 1, -1, *[1] * (layer.weight.ndim - 2))
        rows = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
        weight = (rows * factor.view(shape)).view_as(layer.weight)
        before = 0 if layer.bias is None else layer.bias
        bias = (before - norm.running_mean) * factor + norm.bias
    else:
        weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transposed)
    # + 0.0: a pruned weight times a negative factor is -0.0, which is not the zero that is stored.
    layer.weight = nn.Parameter(weight.detach() + 0.0, layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.detach(), norm.bias.requires_grad)
