"""y = activation(normalize(x)): the normalisation and activation pass alone, and the tail of the fused convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _check, _dispatch
from fastgen.ops._layout import accumulation_dtype, is_channels_last, memory_format

# mean and var: running statistics, or None for those of x, which are then returned: (c), or (n, c) for norm="instance".
torch.library.define(
    "fastgen::norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, str norm, float eps, str activation, "
    "float negative_slope) -> (Tensor out, Tensor mean, Tensor var)",
)
torch.library.define(
    "fastgen::norm_act_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, bool batch_stats, str norm, "
    "float eps, str activation, float negative_slope) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)
_dispatch.register("norm_act", "reference", "cpp")


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
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    impl: str = "auto",
) -> Tensor:
    """y = activation((x - mean) / sqrt(var + eps) * norm_weight + norm_bias).

    Args:
        x: (N, C, *), float32, float64, bfloat16 or float16; any strides. A 4-d channels_last x gives a channels_last y.
        norm: "batch" (mean and biased var over N and *), "instance" (over *, each sample for itself), "none" or None.
        running_mean, running_var: (C,), x's dtype or float32. Used when training is False; updated in place with the
            batch's mean and unbiased var when it is True (norm="instance": their averages over the samples).
            norm="instance" without them always uses the input's statistics.
        norm_weight, norm_bias: (C,), x's dtype or float32; None stands for 1 and 0.
        momentum: weight of the new statistics in the running ones.
        activation: "identity", "relu", "leaky_relu" (slope negative_slope below 0), "tanh", "sigmoid" or "silu".
        impl: "auto", "reference" or "cpp".

    Returns:
        y, of x's shape and dtype. Sums run in float32 (float64 for float64).

    Gradients to x, norm_weight and norm_bias, of any order (reverse mode); none to the running statistics.

    Raises ValueError or TypeError for an argument that does not fit, naming it; RuntimeError if the implementation asked for
    cannot run.

    Ioffe and Szegedy, Batch Normalization, 2015; Ulyanov et al., Instance Normalization, 2016.
    """
    norm = norm or "none"
    _check.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions (N, C, *), got shape {tuple(x.shape)}")
    batch_stats = _check.norm_and_activation(
        x, x.shape[1], norm, running_mean, running_var, norm_weight, norm_bias, training, eps, activation
    )
    if batch_stats:
        _check.several_values(norm, x.shape)
    if _dispatch.choose("norm_act", impl, x.device) == "reference":
        return reference(
            x,
            norm,
            running_mean,
            running_var,
            norm_weight,
            norm_bias,
            training,
            momentum,
            eps,
            activation,
            negative_slope,
        )
    given = (None, None) if batch_stats else (running_mean, running_var)
    out, mean, var = torch.ops.fastgen.norm_act(
        x, norm_weight, norm_bias, *given, norm, float(eps), activation, float(negative_slope)
    )
    if batch_stats and running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean, var, x.numel() // max(1, mean.numel()), momentum)
    return out


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation by its name."""
    match activation:
        case "relu":
            return F.relu(z)
        case "leaky_relu":
            return F.leaky_relu(z, negative_slope)
        case "tanh":
            return torch.tanh(z)
        case "sigmoid":
            return torch.sigmoid(z)
        case "silu":
            return F.silu(z)
        case _:
            return z


def reference(
    x: Tensor,
    norm: str,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """norm_act in PyTorch's own ops: the oracle, the fallback and the export path."""
    if norm == "batch":
        x = F.batch_norm(x, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    elif norm == "instance":
        use_input_stats = training or running_mean is None
        layout = memory_format(is_channels_last(x))  # which instance_norm does not keep
        if x.shape[0]:
            x = F.instance_norm(x, running_mean, running_var, norm_weight, norm_bias, use_input_stats, momentum, eps)
        else:  # which it refuses
            x = F.batch_norm(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), norm_weight, norm_bias)
        x = x.contiguous(memory_format=layout)
    return activate(x, activation, negative_slope)


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Moves running statistics towards mean and biased var, (C,) or (N, C), of `count` values each."""
    with torch.no_grad():
        unbiased = var * (count / max(1, count - 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            new = new.mean(0) if new.dim() == 2 else new
            running.copy_(torch.lerp(running.to(new.dtype), new, momentum))


# The registered ops in plain PyTorch: default kernels, fake kernels, gradients.


def _of_channels(value: Tensor, x: Tensor) -> Tensor:
    """(c) or (n, c) -> broadcastable against x (n, c, *)."""
    return value.view(*(value.shape if value.dim() == 2 else (1, -1)), *(1,) * (x.dim() - 2))


def _moments(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """mean and biased var: (c), or (n, c) for instance."""
    over = [d for d in range(x.dim()) if d > 1 or (d == 0 and norm == "batch")]
    if not over:  # (n, c) under instance: each value is its own mean
        return x, torch.zeros_like(x)
    var, mean = torch.var_mean(x, over, correction=0)
    return mean, var


@torch.library.impl("fastgen::norm_act", "CompositeExplicitAutograd")
def _forward(x, weight, bias, mean, var, norm, eps, activation, negative_slope):
    wide = x.to(accumulation_dtype(x))
    batch_stats = norm != "none" and mean is None
    if batch_stats:
        mean, var = _moments(wide, norm)
    z = wide
    if norm != "none":
        z = (wide - _of_channels(mean.to(wide), wide)) * _of_channels((var.to(wide) + eps).rsqrt(), wide)
        z = z if weight is None else z * _of_channels(weight.to(wide), wide)
        z = z if bias is None else z + _of_channels(bias.to(wide), wide)
    out = activate(z, activation, negative_slope)
    out = out.to(x.dtype).contiguous(memory_format=memory_format(is_channels_last(x)))
    none = wide.new_empty(0)
    return out.clone() if out is x else out, *((mean, var) if batch_stats else (none, none.clone()))


@torch.library.register_fake("fastgen::norm_act")
def _forward_fake(x, weight, bias, mean, var, norm, eps, activation, negative_slope):
    out = torch.empty_like(x.contiguous(memory_format=memory_format(is_channels_last(x))))
    shape = (
        (0,) if norm == "none" or mean is not None else (x.shape[1],) if norm == "batch" else (x.shape[0], x.shape[1])
    )
    new_mean, new_var = (x.new_empty(shape, dtype=accumulation_dtype(x)) for _ in range(2))
    return out, new_mean, new_var


def _backward_formula(grad_out, x, weight, bias, mean, var, batch_stats, norm, eps, activation, negative_slope):
    """The gradients of norm_act in differentiable PyTorch."""
    dtype = accumulation_dtype(x)
    wide, grad = x.to(dtype), grad_out.to(dtype)
    if norm == "none":
        return (
            _activation_grad(grad, wide, activation, negative_slope).to(x.dtype),
            wide.new_zeros(0),
            wide.new_zeros(0),
        )
    rstd = _of_channels((var.to(dtype) + eps).rsqrt(), wide)
    normalized = (wide - _of_channels(mean.to(dtype), wide)) * rstd
    gain = wide.new_ones(1) if weight is None else _of_channels(weight.to(dtype), wide)
    z = normalized * gain
    z = z if bias is None else z + _of_channels(bias.to(dtype), wide)
    grad = _activation_grad(grad, z, activation, negative_slope)
    over = [d for d in range(x.dim()) if d != 1]
    grad_weight, grad_bias = (grad * normalized).sum(over), grad.sum(over)
    if batch_stats:
        over = [d for d in over if d or norm == "batch"]
        if over:
            grad = grad - grad.mean(over, keepdim=True) - normalized * (grad * normalized).mean(over, keepdim=True)
        else:
            grad = grad * 0
    return (grad * gain * rstd).to(x.dtype), grad_weight, grad_bias


def _activation_grad(grad, z, activation, negative_slope):
    match activation:
        case "relu":
            return grad * (z > 0)
        case "leaky_relu":
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


@torch.library.impl("fastgen::norm_act_backward", "CompositeExplicitAutograd")
def _backward(grad_out, x, *arguments):
    grad_x, grad_weight, grad_bias = _backward_formula(grad_out, x, *arguments)
    return grad_x.contiguous(memory_format=memory_format(is_channels_last(x))), grad_weight, grad_bias


@torch.library.register_fake("fastgen::norm_act_backward")
def _backward_fake(grad_out, x, weight, bias, mean, var, batch_stats, norm, *arguments):
    grad_x = torch.empty_like(x.contiguous(memory_format=memory_format(is_channels_last(x))))
    channels = 0 if norm == "none" else x.shape[1]
    grad_weight, grad_bias = (x.new_empty(channels, dtype=accumulation_dtype(x)) for _ in range(2))
    return grad_x, grad_weight, grad_bias


def _setup_forward(ctx, inputs, output):
    x, weight, bias, mean, var, *ctx.options = inputs
    ctx.batch_stats = ctx.options[0] != "none" and mean is None
    if ctx.batch_stats:
        mean, var = output[1:]
    ctx.save_for_backward(x, weight, bias, mean, var)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, grad_out, grad_mean, grad_var):
    if grad_out is None:
        return (None,) * 9
    return *norm_act_grads(grad_out, *ctx.saved_tensors, ctx.batch_stats, *ctx.options), *(None,) * 6


def norm_act_grads(grad_out, x, weight, bias, mean, var, batch_stats, norm, eps, activation, negative_slope):
    """grad_x, grad_weight, grad_bias by the registered backward op; None where there is no parameter."""
    grad_x, grad_weight, grad_bias = torch.ops.fastgen.norm_act_backward(
        grad_out, x, weight, bias, mean, var, batch_stats, norm, eps, activation, negative_slope
    )
    return (
        grad_x,
        None if weight is None or norm == "none" else grad_weight.to(weight.dtype),
        None if bias is None or norm == "none" else grad_bias.to(bias.dtype),
    )


def _setup_backward(ctx, inputs, output):
    grad_out, x, weight, bias, mean, var, ctx.batch_stats, *ctx.options = inputs
    ctx.save_for_backward(grad_out, x, weight, bias, *((None, None) if ctx.batch_stats else (mean, var)))


def _double_backward(ctx, *grads):
    """Differentiates the formula of the first backward; the statistics of the batch are functions of x in it."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph: only what the formula itself does with its inputs is differentiated here.
        inputs = [t.view_as(t) if t is not None else None for t in ctx.saved_tensors]
        grad_out, x, weight, bias, mean, var = inputs
        if ctx.batch_stats:
            mean, var = _moments(x.to(accumulation_dtype(x)), ctx.options[0])
        outputs = _backward_formula(grad_out, x, weight, bias, mean, var, ctx.batch_stats, *ctx.options)
        wanted = [t for t in inputs[:4] if t is not None and t.requires_grad]
        paths = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad and grad is not None
        ]
        found = iter([None] * len(wanted))
        if paths and wanted:
            reached, incoming = zip(*paths, strict=True)
            found = iter(torch.autograd.grad(reached, wanted, incoming, create_graph=higher, allow_unused=True))
    results = [next(found) if t is not None and t.requires_grad else None for t in inputs[:4]]
    return *results, *(None,) * 7


torch.library.register_autograd("fastgen::norm_act", _forward_backward, setup_context=_setup_forward)
torch.library.register_autograd("fastgen::norm_act_backward", _double_backward, setup_context=_setup_backward)
