"""The registered ops of norm_act: schema, reference, default and fake kernels, gradients. Fused convolutions use them
for their epilogue too."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _autograd, _dispatch, _tiers
from fastgen.ops._activations import activate, activation_grad
from fastgen.ops._epilogue import SCHEMA, SCHEMA_OPTIONS, SCHEMA_TENSORS, Epilogue, Options
from fastgen.ops._layout import accumulation_dtype, is_channels_last, memory_format

torch.library.define("fastgen::norm_act", f"(Tensor x, {SCHEMA}) -> (Tensor out, Tensor mean, Tensor var)")
torch.library.define(
    "fastgen::norm_act_backward",
    f"(Tensor grad_out, Tensor x, {SCHEMA_TENSORS}, bool batch_stats, {SCHEMA_OPTIONS}) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
)
_tiers.register("norm_act", "reference", "cpp", "cuda", "triton")


def reference(x: Tensor, epilogue: Epilogue) -> Tensor:
    """norm_act in PyTorch's own ops: the oracle, the fallback and the export path."""
    layout = memory_format(is_channels_last(x))  # which group_norm does not keep
    norm, mean, var, weight, bias, training, momentum, eps, num_groups = epilogue[:9]
    if norm == "batch" or (norm == "instance" and not training and mean is not None):
        x = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    elif norm not in (None, "none"):
        if mean is not None and x.numel():
            epilogue.update_running(*moments(x.detach(), "instance", 0), math.prod(x.shape[2:]))
        # Not instance_norm: its gradient is wrong when one sample's incoming gradient is channels_last (PyTorch 2.13,
        # CPU).
        x = F.group_norm(x, num_groups or x.shape[1], weight, bias, eps)
    x = x.contiguous(memory_format=layout)
    x = x if epilogue.residual is None else x + epilogue.residual
    return activate(x, epilogue.activation or "identity", epilogue.negative_slope)


# The registered ops in plain PyTorch: default kernels, fake kernels, gradients.


def _of_channels(value: Tensor, x: Tensor) -> Tensor:
    """(c) or (n, groups) -> broadcastable against x (n, c, *)."""
    if value.dim() == 2:
        return value.repeat_interleave(x.shape[1] // value.shape[1], 1).view(*x.shape[:2], *(1,) * (x.dim() - 2))
    return value.view(1, -1, *(1,) * (x.dim() - 2))


def _in_groups(x: Tensor, norm: str, num_groups: int) -> Tensor:
    """(n, groups of values that share statistics, values)."""
    return x.reshape(x.shape[0], num_groups if norm == "group" else x.shape[1], -1)


def moments(x: Tensor, norm: str, num_groups: int) -> tuple[Tensor, Tensor]:
    """mean and biased var: (c) for batch, else (n, groups)."""
    if norm == "batch":
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    else:
        var, mean = torch.var_mean(_in_groups(x, norm, num_groups), 2, correction=0)
    return mean, var


def _mean_of_groups(x: Tensor, norm: str, num_groups: int) -> Tensor:
    """The mean of each group of values that share statistics, broadcastable against x."""
    if norm == "batch":
        return x.mean([d for d in range(x.dim()) if d != 1], keepdim=True)
    return _of_channels(_in_groups(x, norm, num_groups).mean(2), x)


def _no_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=accumulation_dtype(x)), x.new_empty(0, dtype=accumulation_dtype(x))


@_dispatch.kernel("norm_act", "norm_act.forward")
def forward(x, weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope):
    z = x.to(accumulation_dtype(x))
    batch_stats = norm != "none" and mean is None
    if batch_stats:
        mean, var = moments(z, norm, num_groups)
    if norm != "none":
        z = (z - _of_channels(mean.to(z), z)) * _of_channels((var.to(z) + eps).rsqrt(), z)
        z = z if weight is None else z * _of_channels(weight.to(z), z)
        z = z if bias is None else z + _of_channels(bias.to(z), z)
    z = z if residual is None else z + residual
    out = activate(z, activation, negative_slope).to(x.dtype)
    out = out.contiguous(memory_format=memory_format(is_channels_last(x)))
    return out.clone() if out is x else out, *((mean, var) if batch_stats else _no_moments(x))


@torch.library.register_fake("fastgen::norm_act")
def _forward_fake(x, weight, bias, mean, var, residual, norm, num_groups, *options):
    out = torch.empty_like(x.contiguous(memory_format=memory_format(is_channels_last(x))))
    return out, *fake_moments(x, x.shape, mean, norm, num_groups)


def fake_moments(x, sizes, mean, norm, num_groups) -> tuple[Tensor, Tensor]:
    """The statistics that an op returns, as fake tensors, for an input of these sizes."""
    if norm == "none" or mean is not None:
        return _no_moments(x)
    shape = sizes[1:2] if norm == "batch" else (sizes[0], num_groups if norm == "group" else sizes[1])
    return x.new_empty(shape, dtype=accumulation_dtype(x)), x.new_empty(shape, dtype=accumulation_dtype(x))


def _backward_formula(
    grad_out, x, weight, bias, mean, var, residual, batch_stats, norm, num_groups, eps, activation, negative_slope
):
    """The gradients of norm_act in differentiable PyTorch."""
    dtype = accumulation_dtype(x)
    z, grad = x.to(dtype), grad_out.to(dtype)
    if norm == "none":
        grad = activation_grad(grad, z if residual is None else z + residual, activation, negative_slope).to(x.dtype)
        return grad, z.new_zeros(0), z.new_zeros(0), x.new_zeros(0) if residual is None else grad * 1
    rstd = _of_channels((var.to(dtype) + eps).rsqrt(), z)
    normalized = (z - _of_channels(mean.to(dtype), z)) * rstd
    gain = z.new_ones(1) if weight is None else _of_channels(weight.to(dtype), z)
    z = normalized * gain
    z = z if bias is None else z + _of_channels(bias.to(dtype), z)
    z = z if residual is None else z + residual
    grad = activation_grad(grad, z, activation, negative_slope)
    grad_residual = x.new_zeros(0) if residual is None else grad.to(x.dtype)
    over = [d for d in range(x.dim()) if d != 1]
    grad_weight, grad_bias = (grad * normalized).sum(over), grad.sum(over)
    grad = grad * gain
    if batch_stats:
        along = _mean_of_groups(grad * normalized, norm, num_groups)
        grad = grad - _mean_of_groups(grad, norm, num_groups) - normalized * along
    return (grad * rstd).to(x.dtype), grad_weight, grad_bias, grad_residual


@_dispatch.kernel("norm_act_backward", "norm_act.backward", leading=1)
def backward(grad_out, x, weight, bias, mean, var, residual, *options):
    grad_x, *parameter_grads, grad_residual = _backward_formula(
        grad_out, x, weight, bias, mean, var, residual, *options
    )
    layout = memory_format(is_channels_last(x))
    grad_residual = grad_residual if residual is None else grad_residual.contiguous(memory_format=layout)
    return grad_x.contiguous(memory_format=layout), *parameter_grads, grad_residual


@torch.library.register_fake("fastgen::norm_act_backward")
def _backward_fake(grad_out, x, weight, bias, mean, var, residual, batch_stats, norm, *options):
    grad_x = torch.empty_like(x.contiguous(memory_format=memory_format(is_channels_last(x))))
    channels = 0 if norm == "none" else x.shape[1]
    grad_weight, grad_bias = (x.new_empty(channels, dtype=accumulation_dtype(x)) for _ in range(2))
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if residual is None else torch.empty_like(grad_x)


def _setup_forward(ctx, inputs, output):
    x, weight, bias, mean, var, residual, *options = inputs
    ctx.options = Options(*options)
    ctx.batch_stats, ctx.adds = ctx.options[0] != "none" and mean is None, residual is not None
    if ctx.batch_stats:
        mean, var = output[1:]
    if ctx.options.needs_output_alone():
        x, residual = output[0], None
    ctx.save_for_backward(x, weight, bias, mean, var, residual)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, grad_out, grad_mean, grad_var):
    if grad_out is None:
        return (None,) * 11
    grad_x, grad_weight, grad_bias, grad_residual = norm_act_grads(
        grad_out, *ctx.saved_tensors, ctx.batch_stats, *ctx.options
    )
    if ctx.adds and grad_residual is None:
        grad_residual = grad_x
    return grad_x, grad_weight, grad_bias, None, None, grad_residual, *(None,) * 5


def norm_act_grads(grad_out, x, weight, bias, mean, var, residual, batch_stats, *options):
    """Gradients of x, weight, bias and residual by the registered backward op; None for an input that is None."""
    grad_x, grad_weight, grad_bias, grad_residual = _autograd.call(
        "norm_act_backward", grad_out, x, weight, bias, mean, var, residual, batch_stats, *options
    )
    normalizes = options[0] != "none"
    return (
        grad_x,
        grad_weight.to(weight.dtype) if normalizes and weight is not None else None,
        grad_bias.to(bias.dtype) if normalizes and bias is not None else None,
        None if residual is None else grad_residual,
    )


def _setup_backward(ctx, inputs, output):
    grad_out, x, weight, bias, mean, var, residual, ctx.batch_stats, *options = inputs
    ctx.options = Options(*options)
    statistics = (None, None) if ctx.batch_stats else (mean, var)
    ctx.save_for_backward(grad_out, x, weight, bias, residual, *statistics)


def _double_backward(ctx, *grads):
    """Differentiates the formula of the first backward pass, in which batch statistics are functions of x."""

    def formula(grad_out, x, weight, bias, residual, mean, var):
        if ctx.batch_stats:
            mean, var = moments(x.to(accumulation_dtype(x)), *ctx.options[:2])
        return _backward_formula(grad_out, x, weight, bias, mean, var, residual, ctx.batch_stats, *ctx.options)

    *differentiated, mean, var = ctx.saved_tensors
    input_grads = _autograd.differentiate(lambda *inputs: formula(*inputs, mean, var), differentiated, grads)
    return *input_grads[:4], None, None, input_grads[4], *(None,) * 6


_autograd.register("fastgen::norm_act", _forward_backward, _setup_forward)
_autograd.register("fastgen::norm_act_backward", _double_backward, _setup_backward)
