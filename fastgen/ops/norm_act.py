"""y = activation(normalize(x)): the normalisation and activation pass alone, and the tail of the fused convolutions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _autograd, _check, _dispatch
from fastgen.ops._layout import accumulation_dtype, is_channels_last, memory_format

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What every op's schema ends with: the norm and the activation.
OPTIONS = "str norm, int num_groups, float eps, str activation, float negative_slope"

# mean and var: running statistics, or None for those of x, which are returned: (c), or (n, sets) if samples have their
# own.
torch.library.define(
    "fastgen::norm_act",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? residual, {OPTIONS}) "
    "-> (Tensor out, Tensor mean, Tensor var)",
)
torch.library.define(
    "fastgen::norm_act_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? residual, bool "
    "batch_stats, "
    f"{OPTIONS}) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
)
_dispatch.register("norm_act", "reference", "cpp", "cuda", "triton")


def norm_act(
    x: Tensor,
    *,
    norm: str | None = "batch",
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    num_groups: int | None = None,
    residual: Tensor | None = None,
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    inplace: bool = False,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """y = activation((x - mean) / sqrt(var + eps) * norm_weight + norm_bias + residual).

    Args:
        x: (N, C, *), float32, float64, bfloat16 or float16; any strides. A 4-d channels_last x gives a channels_last y.
        norm: "batch" (mean and biased var over N and *), "instance" (over *, each sample for itself), "group" (over *
            and the channels of a group, each sample for itself), "none" or None.
        running_mean, running_var: (C,), x's dtype or float32, for "batch" and "instance". Used when training is False;
            updated in place with the batch's mean and unbiased var when it is True ("instance": their averages over the
            samples). "instance" without them always uses the input's statistics.
        norm_weight, norm_bias: (C,), x's dtype or float32; None stands for 1 and 0.
        momentum: weight of the new statistics in the running ones.
        num_groups: groups of channels, for "group" alone.
        residual: x's shape and dtype, or None.
        activation: "identity", "relu", "leaky_relu" (slope negative_slope below 0), "tanh", "sigmoid" or "silu".
        inplace: as of torch.nn's activations: y must not be changed before the backward pass, which may then use y and
            keep nothing else. Without a norm "leaky_relu" does; "relu" always does, as PyTorch's. No input is written
            to.
        process_group: for "batch" in training: the statistics are those of all its ranks' x, which may differ in N, as
            in nn.SyncBatchNorm. Every rank must make the call, and its backward pass. First derivatives alone.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        y, of x's shape and dtype. Sums run in float32 (float64 for float64).

    Gradients to x, norm_weight, norm_bias and residual, of any order (reverse mode); none to the running statistics.

    Raises ValueError or TypeError for an argument that does not fit, naming it; RuntimeError if the implementation
    asked for cannot run.

    Ioffe and Szegedy, Batch Normalization, 2015; Ulyanov et al., Instance Normalization, 2016; Wu and He, Group
    Normalization, 2018.
    """
    _check.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions (N, C, *), got shape {tuple(x.shape)}")
    tail = Tail(
        norm or "none", running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, num_groups,
        residual, activation, negative_slope, inplace, process_group,
    )  # fmt: skip
    batch_stats = _check.tail(x, x.shape, *tail)
    chosen = _dispatch.choose("norm_act", impl, x)
    if batch_stats and process_group is not None:
        from fastgen.ops import _synchronized

        return _synchronized.norm_act(x, tail, chosen)
    if chosen == "reference":
        return reference(x, tail)
    out, mean, var = _dispatch.call("norm_act", chosen, x, *tail.tensors(batch_stats), *tail.options())
    if batch_stats:
        tail.update_running(mean, var, x.numel() // max(1, mean.numel()))
    return out


class Tail(NamedTuple):
    """The arguments that the fused convolutions share with norm_act, under the public names."""

    norm: str
    running_mean: Tensor | None
    running_var: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    num_groups: int | None
    residual: Tensor | None
    activation: str
    negative_slope: float
    inplace: bool
    process_group: ProcessGroup | None = None

    def tensors(self, batch_stats: bool) -> tuple[Tensor | None, ...]:
        """weight, bias, mean, var and residual of the schemas."""
        given = (None, None) if batch_stats else (self.running_mean, self.running_var)
        return self.norm_weight, self.norm_bias, *given, self.residual

    def options(self) -> tuple[str, int, float, str, float]:
        """OPTIONS of the schemas; there "leaky_relu_" is the activation whose output stays as it is."""
        activation = self.activation
        if activation == "leaky_relu" and self.inplace and self.negative_slope >= 0:
            activation = "leaky_relu_"
        return self.norm, self.num_groups or 0, float(self.eps), activation, float(self.negative_slope)

    def update_running(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        """Moves the running statistics, if any, towards mean and biased var, (C,) or (N, C), of `count` values each."""
        if self.running_mean is None or self.running_var is None or (isinstance(count, int) and count == 0):
            return
        with torch.no_grad():
            unbiased = var * (count / ((count - 1).clamp(min=1) if isinstance(count, Tensor) else max(1, count - 1)))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                new = new.mean(0) if new.dim() == 2 else new
                if running.dtype == new.dtype:
                    running.lerp_(new, self.momentum)
                else:
                    running.copy_(torch.lerp(running.to(new.dtype), new, self.momentum))


def needs_output_alone(options) -> bool:
    """Whether the gradient follows from the output, given OPTIONS: from its sign."""
    return options[0] == "none" and options[3] in ("relu", "leaky_relu_")


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation by its name."""
    match activation:
        case "relu":
            return F.relu(z)
        case "leaky_relu" | "leaky_relu_":
            return F.leaky_relu(z, negative_slope)
        case "tanh":
            return torch.tanh(z)
        case "sigmoid":
            return torch.sigmoid(z)
        case "silu":
            return F.silu(z)
        case _:
            return z


def activate_in_place(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The same on a value that nobody else has, in its memory where the gradient follows from the output."""
    match activation:
        case "relu":
            return F.relu_(z)
        case "leaky_relu_":
            return F.leaky_relu_(z, negative_slope)
        case "tanh":
            return z.tanh_()
        case "sigmoid":
            return z.sigmoid_()
        case _:
            return activate(z, activation, negative_slope)


def reference(x: Tensor, tail: Tail) -> Tensor:
    """norm_act in PyTorch's own ops: the oracle, the fallback and the export path."""
    layout = memory_format(is_channels_last(x))  # which group_norm does not keep
    running, affine = (tail.running_mean, tail.running_var), (tail.norm_weight, tail.norm_bias)
    if tail.norm == "batch" or (tail.norm == "instance" and not tail.training and tail.running_mean is not None):
        x = F.batch_norm(x, *running, *affine, tail.training, tail.momentum, tail.eps)
    elif tail.norm != "none":
        if tail.running_mean is not None and x.numel():
            tail.update_running(*_moments(x.detach(), "instance", 0), math.prod(x.shape[2:]))
        # Not instance_norm: its gradient is wrong when one sample's incoming gradient is channels_last (PyTorch 2.13,
        # CPU).
        x = F.group_norm(x, tail.num_groups or x.shape[1], *affine, tail.eps)
    x = x.contiguous(memory_format=layout)
    return activate(x if tail.residual is None else x + tail.residual, tail.activation, tail.negative_slope)


# The registered ops in plain PyTorch: default kernels, fake kernels, gradients.


def _of_channels(value: Tensor, x: Tensor) -> Tensor:
    """(c) or (n, sets) -> broadcastable against x (n, c, *)."""
    if value.dim() == 2:
        return value.repeat_interleave(x.shape[1] // value.shape[1], 1).view(*x.shape[:2], *(1,) * (x.dim() - 2))
    return value.view(1, -1, *(1,) * (x.dim() - 2))


def _sets(x: Tensor, norm: str, num_groups: int) -> int:
    return num_groups if norm == "group" else x.shape[1]


def _moments(x: Tensor, norm: str, num_groups: int) -> tuple[Tensor, Tensor]:
    """mean and biased var: (c) for batch, else (n, sets)."""
    if norm == "batch":
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    else:
        var, mean = torch.var_mean(x.reshape(x.shape[0], _sets(x, norm, num_groups), -1), 2, correction=0)
    return mean, var


def _set_mean(x: Tensor, norm: str, num_groups: int) -> Tensor:
    """The mean over each set of values that share statistics, broadcastable against x."""
    if norm == "batch":
        return x.mean([d for d in range(x.dim()) if d != 1], keepdim=True)
    return _of_channels(x.reshape(x.shape[0], _sets(x, norm, num_groups), -1).mean(2), x)


def _no_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=accumulation_dtype(x)), x.new_empty(0, dtype=accumulation_dtype(x))


@_dispatch.kernel("norm_act", "norm_act.forward")
def _forward(x, weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope):
    z = x.to(accumulation_dtype(x))
    batch_stats = norm != "none" and mean is None
    if batch_stats:
        mean, var = _moments(z, norm, num_groups)
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
    """The statistics that an op returns for values of these sizes."""
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
        grad = _activation_grad(grad, z if residual is None else z + residual, activation, negative_slope).to(x.dtype)
        return grad, z.new_zeros(0), z.new_zeros(0), x.new_zeros(0) if residual is None else grad * 1
    rstd = _of_channels((var.to(dtype) + eps).rsqrt(), z)
    normalized = (z - _of_channels(mean.to(dtype), z)) * rstd
    gain = z.new_ones(1) if weight is None else _of_channels(weight.to(dtype), z)
    z = normalized * gain
    z = z if bias is None else z + _of_channels(bias.to(dtype), z)
    z = z if residual is None else z + residual
    grad = _activation_grad(grad, z, activation, negative_slope)
    grad_residual = x.new_zeros(0) if residual is None else grad.to(x.dtype)
    over = [d for d in range(x.dim()) if d != 1]
    grad_weight, grad_bias = (grad * normalized).sum(over), grad.sum(over)
    grad = grad * gain
    if batch_stats:
        along = _set_mean(grad * normalized, norm, num_groups)
        grad = grad - _set_mean(grad, norm, num_groups) - normalized * along
    return (grad * rstd).to(x.dtype), grad_weight, grad_bias, grad_residual


def _activation_grad(grad, z, activation, negative_slope):
    match activation:
        case "relu":
            return grad * (z > 0)
        case "leaky_relu" | "leaky_relu_":
            return torch.where(z > 0, grad, grad * negative_slope)
        case "tanh":
            return grad * (1 - torch.tanh(z) ** 2)
        case "sigmoid":
            y = torch.sigmoid(z)
            return grad * y * (1 - y)
        case "silu":
            y = torch.sigmoid(z)
            return grad * y * (1 + z * (1 - y))
        case _:
            return grad * 1


@_dispatch.kernel("norm_act_backward", "norm_act.backward", leading=1)
def _backward(grad_out, x, weight, bias, mean, var, residual, *options):
    grad_x, *of_parameters, grad_residual = _backward_formula(grad_out, x, weight, bias, mean, var, residual, *options)
    layout = memory_format(is_channels_last(x))
    grad_residual = grad_residual if residual is None else grad_residual.contiguous(memory_format=layout)
    return grad_x.contiguous(memory_format=layout), *of_parameters, grad_residual


@torch.library.register_fake("fastgen::norm_act_backward")
def _backward_fake(grad_out, x, weight, bias, mean, var, residual, batch_stats, norm, *options):
    grad_x = torch.empty_like(x.contiguous(memory_format=memory_format(is_channels_last(x))))
    channels = 0 if norm == "none" else x.shape[1]
    grad_weight, grad_bias = (x.new_empty(channels, dtype=accumulation_dtype(x)) for _ in range(2))
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if residual is None else torch.empty_like(grad_x)


def _setup_forward(ctx, inputs, output):
    x, weight, bias, mean, var, residual, *ctx.options = inputs
    ctx.batch_stats, ctx.adds = ctx.options[0] != "none" and mean is None, residual is not None
    if ctx.batch_stats:
        mean, var = output[1:]
    if needs_output_alone(ctx.options):
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
    """Gradients of x, weight, bias and residual by the registered backward op; None where there is no such input."""
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
    grad_out, x, weight, bias, mean, var, residual, ctx.batch_stats, *ctx.options = inputs
    statistics = (None, None) if ctx.batch_stats else (mean, var)
    ctx.save_for_backward(grad_out, x, weight, bias, residual, *statistics)


def _double_backward(ctx, *grads):
    """Differentiates the formula of the first backward; the statistics of the batch are functions of x in it."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph: only what the formula itself does with its inputs is differentiated here.
        inputs = [t.view_as(t) if t is not None else None for t in ctx.saved_tensors]
        grad_out, x, weight, bias, residual, mean, var = inputs
        if ctx.batch_stats:
            mean, var = _moments(x.to(accumulation_dtype(x)), *ctx.options[:2])
        outputs = _backward_formula(grad_out, x, weight, bias, mean, var, residual, ctx.batch_stats, *ctx.options)
        wanted = [t for t in inputs[:5] if t is not None and t.requires_grad]
        paths = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad and grad is not None
        ]
        found = iter([None] * len(wanted))
        if paths and wanted:
            reached, incoming = zip(*paths, strict=True)
            found = iter(torch.autograd.grad(reached, wanted, incoming, create_graph=higher, allow_unused=True))
    results = [next(found) if t is not None and t.requires_grad else None for t in inputs[:5]]
    return *results[:4], None, None, results[4], *(None,) * 6


_autograd.register("fastgen::norm_act", _forward_backward, _setup_forward)
_autograd.register("fastgen::norm_act_backward", _double_backward, _setup_backward)
