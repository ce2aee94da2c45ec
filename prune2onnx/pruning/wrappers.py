"""What torch puts around a whole network: several devices, a compiler, an average of weights.

The verbs work on the network inside, so names are those of the plain network whatever is around it.
"""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

from prune2onnx.errors import Prune2OnnxError

_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_COMPILED = "_orig_mod"  # where torch.compile keeps the network


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile."""
    while True:
        if isinstance(model, _AROUND):
            model = model.module
        elif isinstance(inner := getattr(model, _COMPILED, None), nn.Module):
            model = inner
        else:
            return model


def refuse_distributed(model: nn.Module, verb: str) -> None:
    """Checks that no part of a model is in a DistributedDataParallel.

    That wrapper keeps a list of the parameters whose gradients it averages: it never learns of new
    ones, and still waits for those that were replaced.

    Args:
        model: the network, or a wrapper.
        verb: what is to be done to it, such as "pruned".

    Raises:
        Prune2OnnxError: there is one.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise Prune2OnnxError(
                f"a {type(module).__name__} cannot be {verb}: it knows only the parameters that it "
                "was made with; take the module inside (its .module), then wrap that anew"
            )
