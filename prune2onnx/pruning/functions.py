r"""Pruning functions: the value that a weight w has in training, given a threshold t.

Every function here is odd in w, differentiable (almost everywhere) in w and in t, close to w where
|w| >> t and close to 0 where |w| << t, so a threshold can be learned by back-propagation beside
the weight it prunes. A function returns its value and both partial derivatives: the closed forms
take half the memory traffic of a graph of elementary operations, and stand beside their equation.

Notation: sigma is the logistic function, beta (1 / units of w) the sharpness, t > 0 broadcasts
against w. No layer, threshold parameter or mask lives here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# value, d value / d w, d value / d t; each of w's shape
Partials = tuple[Tensor, Tensor, Tensor]


def threshold_linear(w: Tensor, t: Tensor, beta: float | Tensor) -> Partials:
    r"""Threshold-linear function of Manessi et al. (arXiv 1712.01721).

    v(w, t) = ReLU(w - t) + t sigma(beta (w - t)) - ReLU(-w - t) - t sigma(beta (-w - t))

    v -> w for |w| >> t; the hard threshold w * [|w| > t] as beta -> infinity.
    """
    sign, gap = w.sign(), w.abs().sub_(t)  # comparisons and booleans are slower than these
    above = torch.mul(gap, beta).sigmoid_()
    below = torch.add(gap, 2 * t).mul_(-beta).sigmoid_()  # sigma(-beta (|w| + t))
    beyond = gap.sign().clamp_min_(0)
    passed = above - below
    value = gap.clamp_min_(0).addcmul_(passed, t).mul_(sign)
    above.addcmul_(above, above, value=-1)  # sigma' = sigma (1 - sigma)
    below.addcmul_(below, below, value=-1)
    slope = t * beta
    d_t = passed.sub_(beyond).addcmul_(torch.sub(below, above), slope).mul_(sign)
    d_w = above.add_(below).mul_(slope).add_(beyond)
    return value, d_w, d_t


def soft_threshold(w: Tensor, t: Tensor, beta: float | Tensor) -> Partials:
    """Soft threshold of STR, Kusupati et al. (arXiv 2002.03231).

    v(w, t) = sign(w) ReLU(|w| - t)

    Exactly zero within the threshold; survivors are shrunk by t. beta is not used: the function
    has no smooth edge.
    """
    sign, gap = w.sign(), w.abs().sub_(t)
    beyond = gap.sign().clamp_min_(0)
    return gap.clamp_min_(0).mul_(sign), beyond, sign.mul_(beyond).neg_()


def sigmoid_gate(w: Tensor, t: Tensor, beta: float | Tensor) -> Partials:
    """Sigmoid gate: the survivor count's own gate, applied to the weight (this project's choice).

    v(w, t) = w sigma(beta (|w| - t))

    At |w| = t it passes half of w; what it passes below the threshold vanishes with w.
    """
    gate, gate_w, gate_t = survivor_gate(w, t, beta)
    return w * gate, gate_w.mul_(w).add_(gate), gate_t.mul_(w)


def survivor_gate(w: Tensor, t: Tensor, beta: float | Tensor) -> Partials:
    """Differentiable count of survivors: sigma(beta (|w| - t)), about 1 above t and 0 below.

    Its sum over a weight is the regulariser. The paper's own regulariser is not used: this one is
    the project's choice.
    """
    gate = w.abs().sub_(t).mul_(beta).sigmoid_()
    d_t = torch.addcmul(gate, gate, gate, value=-1).mul_(-beta)
    return gate, torch.mul(d_t, w.sign()).neg_(), d_t


class _WithPartials(torch.autograd.Function):
    """Makes a function with its partial derivatives an autograd function (first order only)."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, t: Tensor, beta: float | Tensor, function: Callable[..., Partials]
    ) -> Tensor:
        value, d_w, d_t = function(w, t, beta)
        ctx.save_for_backward(d_w, d_t)
        ctx.t_shape = t.shape
        return laid_out_as(w, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        d_w, d_t = ctx.saved_tensors
        return d_w.mul(grad), d_t.mul(grad).sum_to_size(ctx.t_shape), None, None


def laid_out_as(w: Tensor, value: Tensor) -> Tensor:
    """A tensor computed from w, with w's strides where they differ on axes of one element alone.

    There strides mean nothing, but a convolution of images with one channel goes by them: whether
    it computes with channels last, as all that follows then does, up to five times as fast.
    """
    pairs = zip(w.shape, w.stride(), value.stride(), strict=True)
    if value.stride() != w.stride() and all(n == 1 or a == b for n, a, b in pairs):
        return value.as_strided(w.shape, w.stride())
    return value


def differentiable(
    function: Callable[..., Partials], w: Tensor, t: Tensor, beta: float | Tensor
) -> Tensor:
    """Evaluates one of the functions above as a node of the autograd graph.

    Args:
        function: a function of this module.
        w: weight or group norm, any shape, floating.
        t: threshold, positive, broadcastable to w.
        beta: sharpness, in 1 / units of w.

    Returns:
        The value, of w's shape and dtype; its gradients reach w and t.
    """
    result: Tensor = _WithPartials.apply(w, t, beta, function)  # type: ignore[no-untyped-call]
    return result


FUNCTIONS: dict[str, Callable[..., Partials]] = {
    "threshold-linear": threshold_linear,
    "soft-threshold": soft_threshold,
    "sigmoid-gate": sigmoid_gate,
}
