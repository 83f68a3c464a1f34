"""Convolutions by weight / sigma that divide what they sum, so that nothing of the weight's size is written.

The weight that they take stands for the quotient: its gradient is that of weight / sigma, of which sigma is a part
(fastgen.nn.spectral_norm). In the kernels it is a normalization with given statistics, 1 / sigma the gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.ops import _autograd, _convolution, _dispatch
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import is_channels_last, like, memory_format
from fastgen.ops.norm_act import Tail, needs_output_alone, norm_act_grads

torch.library.define(
    "fastgen::convolution_over_sigma",
    "(Tensor x, Tensor weight, Tensor sigma, Tensor? bias, str activation, float negative_slope, "
    f"{_convolution.ARGUMENTS}) -> Tensor",
)


def serves(x: Tensor, weight: Tensor, geometry: Geometry, tail: Tail) -> bool:
    """Whether a kernel of fastgen's runs, and the gradient follows from the output."""
    identity = tail.norm == "none" and tail.activation == "identity"
    if x.dim() != 4 or tail.residual is not None or not (identity or needs_output_alone(tail.options())):
        return False
    if _convolution.autocasts(x) or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    wins = geometry.wins(x.shape, like(weight))
    return _dispatch.choose(geometry.fused()[0], "auto", x, wins, counted=False) not in ("reference", "composed")


def convolution(
    x: Tensor, weight: Tensor, sigma: Tensor, bias: Tensor | None, geometry: Geometry, tail: Tail
) -> Tensor:
    """activation(convolution by weight / sigma + bias), where it `serves`. sigma: a scalar in the accumulation's
    dtype."""
    _convolution.check_tensors(x, weight, bias, geometry)
    chosen = _dispatch.choose(geometry.fused()[0], "auto", x, geometry.wins(x.shape, like(weight)) or "own")
    inputs = (x, weight, sigma, bias, *tail.options()[3:], *geometry.arguments())
    return _dispatch.call("convolution_over_sigma", chosen, *inputs)


@torch.library.impl("fastgen::convolution_over_sigma", "CompositeExplicitAutograd")
def _forward(x, weight, sigma, bias, activation, negative_slope, *geometry):
    op, arguments = Geometry.of(*geometry).fused()
    gain = sigma.reciprocal().expand(Geometry.of(*geometry).channels(weight.shape)[1])
    tail = (gain, bias, torch.zeros_like(gain), torch.ones_like(gain), None, "batch", 0, 0.0)
    inputs = (x, weight, None, *tail, activation, negative_slope, *arguments, False)
    return getattr(torch.ops.fastgen, op).default(*inputs)[0]


@torch.library.register_fake("fastgen::convolution_over_sigma")
def _fake(x, weight, sigma, bias, activation, negative_slope, *geometry):
    sizes, last = Geometry.of(*geometry).sizes(x.shape, weight.shape), is_channels_last(x) or is_channels_last(weight)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(last))


def _setup(ctx, inputs, output):
    x, weight, sigma, _, activation, slope, *geometry = inputs
    ctx.options, ctx.geometry = ("none", 0, 0.0, activation, slope), Geometry.of(*geometry)
    ctx.save_for_backward(x, weight, sigma, None if activation == "identity" else output)


def _backward(ctx, grad):
    x, weight, sigma, out = ctx.saved_tensors
    if out is not None:
        grad = norm_act_grads(grad, out, None, None, None, None, None, False, *ctx.options)[0]
    of_both, of_bias = _convolution.wanted(ctx, bias=3)
    found = _convolution.gradients(ctx.geometry, grad, x, weight, of_both, sigma)
    return *found, None, grad.sum((0, 2, 3)) if of_bias else None, *(None,) * 8


_autograd.register("fastgen::convolution_over_sigma", _backward, _setup)
