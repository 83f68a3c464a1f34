"""Convolutions with weight / sigma that divide their sums instead of the weight, so that no quotient of the weight's
size is written.

Their weight argument stands for the quotient: the gradient it gets is that of weight / sigma, and
fastgen.nn.spectral_norm passes it on through the division and sigma. For the kernels the division is a norm with given
statistics and the gain 1 / sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.ops import _autograd, _convolution, _dispatch, _policy
from fastgen.ops._convolution_grad import ARGUMENTS, gradients, needed_gradients
from fastgen.ops._epilogue import Epilogue, KernelEpilogue, Options
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import is_channels_last, memory_format, spec_of
from fastgen.ops._norm_act import norm_act_grads

torch.library.define(
    "fastgen::spectral_convolution",
    "(Tensor x, Tensor weight, Tensor sigma, Tensor? bias, str activation, float negative_slope, "
    f"{ARGUMENTS}) -> Tensor",
)


def can_compute(x: Tensor, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> bool:
    """Whether one of fastgen's kernels would run, and the epilogue's gradient follows from its output."""
    options = epilogue.options()
    if x.dim() != 4 or epilogue.residual is not None or not (options.is_identity() or options.needs_output_alone()):
        return False
    if _convolution.autocasts(x) or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    fastest = _policy.fastest_forward(geometry, x.shape, spec_of(weight))
    chosen = _dispatch.choose(geometry.fused()[0], "auto", x, fastest, counted=False)
    return chosen.implementation not in ("reference", "unfused")


def convolution(
    x: Tensor, weight: Tensor, sigma: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue
) -> Tensor:
    """activation(convolution with weight / sigma + bias), for arguments that `can_compute` accepts. sigma: a scalar in
    the accumulation dtype."""
    _convolution.check_tensors(x, weight, bias, geometry)
    fastest = _policy.fastest_forward(geometry, x.shape, spec_of(weight))
    chosen = _dispatch.choose(geometry.fused()[0], "auto", x, fastest)
    activation = epilogue.options()[3:]
    return _dispatch.call("spectral_convolution", chosen, x, weight, sigma, bias, *activation, *geometry.arguments())


@torch.library.impl("fastgen::spectral_convolution", "CompositeExplicitAutograd")
def _forward(x, weight, sigma, bias, activation, negative_slope, *geometry):
    op, arguments = Geometry.of(*geometry).fused()
    gain = sigma.reciprocal().expand(Geometry.of(*geometry).channels(weight.shape)[1])
    statistics = {"mean": torch.zeros_like(gain), "var": torch.ones_like(gain)}
    epilogue = KernelEpilogue(
        gain, bias, **statistics, norm="batch", activation=activation, negative_slope=negative_slope
    )
    return getattr(torch.ops.fastgen, op).default(x, weight, None, *epilogue, *arguments, False)[0]


@torch.library.register_fake("fastgen::spectral_convolution")
def _fake(x, weight, sigma, bias, activation, negative_slope, *geometry):
    sizes, last = Geometry.of(*geometry).sizes(x.shape, weight.shape), is_channels_last(x) or is_channels_last(weight)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(last))


def _setup(ctx, inputs, output):
    x, weight, sigma, _, activation, slope, *geometry = inputs
    ctx.options, ctx.geometry = Options("none", 0, 0.0, activation, slope), Geometry.of(*geometry)
    ctx.save_for_backward(x, weight, sigma, None if activation == "identity" else output)


def _backward(ctx, grad):
    x, weight, sigma, out = ctx.saved_tensors
    if out is not None:
        grad = norm_act_grads(grad, out, None, None, None, None, None, False, *ctx.options)[0]
    needed, needs_bias = needed_gradients(ctx, bias=3)
    grads = gradients(ctx.geometry, grad, x, weight, needed, sigma)
    return *grads, None, grad.sum((0, 2, 3)) if needs_bias else None, *(None,) * 8


_autograd.register("fastgen::spectral_convolution", _backward, _setup)
