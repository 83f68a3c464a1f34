"""y = activation(normalize(conv_transpose2d(x, weight, bias))) in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _check, _dispatch
from fastgen.ops import norm_act as tail
from fastgen.ops._layout import accumulation_dtype, is_channels_last, memory_format

NAME = "conv_transpose2d_norm_act"

# save: also return pre, the convolution before the norm, which the backward needs. mean, var: as in norm_act.
torch.library.define(
    f"fastgen::{NAME}",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, str norm, "
    "float eps, str activation, float negative_slope, int[2] stride, int[2] padding, int[2] output_padding, int groups, "
    "int[2] dilation, bool save) -> (Tensor out, Tensor pre, Tensor mean, Tensor var)",
)
_dispatch.register(NAME, "reference", "cpp")


def conv_transpose2d_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
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
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    impl: str = "auto",
) -> Tensor:
    """y = activation((t - mean) / sqrt(var + eps) * norm_weight + norm_bias), t = conv_transpose2d(x, weight, bias).

    Args:
        x: (N, C_in, H, W), float32, float64, bfloat16 or float16; any strides. (C_in, H, W) too, unless norm is "batch".
        weight: (C_in, C_out / groups, kernel height, kernel width), x's dtype.
        bias: (C_out,) or None.
        norm, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, activation, negative_slope: as in
            norm_act, with C = C_out.
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d; an int or two ints.
        impl: "auto", "reference" or "cpp".

    Returns:
        y: (N, C_out, (H - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1, the same for W), x's
        dtype, channels_last if x or weight is. Sums run in float32 (float64 for float64).

    Under autocast x, weight and bias are converted to its dtype, the norm's parameters are not.
    Gradients to x, weight, bias, norm_weight and norm_bias, of any order (reverse mode); with output_padding of the first two,
    as in PyTorch.

    Raises ValueError or TypeError for an argument that does not fit, naming it; RuntimeError if the implementation asked for
    cannot run.

    Radford et al., Unsupervised Representation Learning with DCGANs, 2015 (the layer); Dumoulin and Visin, A guide to
    convolution arithmetic for deep learning, 2016 (the arithmetic).
    """
    norm = norm or "none"
    _check.floating("x", x)
    _check.floating("weight", weight)
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if x.dim() == 3 and norm != "batch":
        return conv_transpose2d_norm_act(
            x.unsqueeze(0), weight, bias, norm=norm, running_mean=running_mean, running_var=running_var,
            norm_weight=norm_weight, norm_bias=norm_bias, training=training, momentum=momentum, eps=eps, activation=activation,
            negative_slope=negative_slope, stride=stride, padding=padding, output_padding=output_padding, groups=groups,
            dilation=dilation, impl=impl,
        ).squeeze(0)  # fmt: skip
    stride, padding = _check.pair("stride", stride, 1), _check.pair("padding", padding, 0)
    output_padding, dilation = _check.pair("output_padding", output_padding, 0), _check.pair("dilation", dilation, 1)
    _check_shapes(x, weight, bias, stride, output_padding, groups, dilation)
    sizes = _output_size(x, weight, stride, padding, output_padding, groups, dilation)
    if min(sizes[2:]) < 1:
        raise ValueError(
            f"padding {padding} leaves an output of height {sizes[2]} and width {sizes[3]} from x of shape {tuple(x.shape)} "
            f"and weight of shape {tuple(weight.shape)}; both must be at least 1"
        )
    batch_stats = _check.norm_and_activation(
        x, sizes[1], norm, running_mean, running_var, norm_weight, norm_bias, training, eps, activation
    )
    if batch_stats:
        _check.several_values(norm, sizes)

    if _dispatch.choose(NAME, impl, x.device) == "reference":
        t = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
        return tail.reference(
            t,
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
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, norm_weight, norm_bias)
    )
    save = needs_grad and (norm != "none" or activation != "identity")
    out, _, mean, var = torch.ops.fastgen.conv_transpose2d_norm_act(
        x, weight, bias, norm_weight, norm_bias, *given, norm, float(eps), activation, float(negative_slope), stride, padding,
        output_padding, groups, dilation, save,
    )  # fmt: skip
    if batch_stats and running_mean is not None and running_var is not None:
        tail.update_running(running_mean, running_var, mean, var, out.numel() // max(1, mean.numel()), momentum)
    return out


def _check_shapes(x, weight, bias, stride, output_padding, groups, dilation) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C_in, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(
            f"weight must have 4 dimensions (C_in, C_out / groups, KH, KW), got shape {tuple(weight.shape)}"
        )
    if min(weight.shape) < 1 or min(x.shape[1:]) < 1:
        raise ValueError(f"only N may be 0, got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}")
    _check.alike("weight", weight, x)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"x has {x.shape[1]} channels, weight of shape {tuple(weight.shape)} needs {weight.shape[0]}")
    if bias is not None:
        _check.per_channel("bias", bias, weight.shape[1] * groups, x)
        _check.alike("bias", bias, x)
    for size, step, spread in zip(output_padding, stride, dilation, strict=True):
        if size >= max(step, spread):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got output_padding {output_padding}, stride {stride} "
                f"and dilation {dilation}"
            )


def _output_size(x, weight, stride, padding, output_padding, groups, dilation) -> list[int]:
    return [x.shape[0], weight.shape[1] * groups] + [
        (x.shape[2 + i] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (weight.shape[2 + i] - 1)
        + output_padding[i]
        + 1
        for i in range(2)
    ]


@torch.library.impl(f"fastgen::{NAME}", "CompositeExplicitAutograd")
def _forward(
    x, weight, bias, norm_weight, norm_bias, mean, var, norm, eps, activation, negative_slope, stride, padding, output_padding,
    groups, dilation, save,
):  # fmt: skip
    pre = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    pre = pre.contiguous(memory_format=memory_format(is_channels_last(x) or is_channels_last(weight)))
    out, mean, var = torch.ops.fastgen.norm_act(
        pre, norm_weight, norm_bias, mean, var, norm, eps, activation, negative_slope
    )
    return out, pre if save else pre.new_empty(0), mean, var


@torch.library.register_fake(f"fastgen::{NAME}")
def _forward_fake(
    x, weight, bias, norm_weight, norm_bias, mean, var, norm, eps, activation, negative_slope, stride, padding, output_padding,
    groups, dilation, save,
):  # fmt: skip
    sizes = _output_size(x, weight, stride, padding, output_padding, groups, dilation)
    layout = memory_format(is_channels_last(x) or is_channels_last(weight))
    out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)
    shape = (0,) if norm == "none" or mean is not None else sizes[1:2] if norm == "batch" else sizes[:2]
    new_mean, new_var = (x.new_empty(shape, dtype=accumulation_dtype(x)) for _ in range(2))
    return out, torch.empty_like(out) if save else x.new_empty(0), new_mean, new_var


def _setup(ctx, inputs, output):
    x, weight, bias, norm_weight, norm_bias, mean, var, *options = inputs
    ctx.tail, ctx.convolution, save = options[:4], options[4:9], options[9]
    norm, _, activation, _ = ctx.tail
    ctx.linear = norm == "none" and activation == "identity"
    if not (save or ctx.linear):
        raise RuntimeError(f"fastgen::{NAME} was called with save=False on a tensor that requires a gradient")
    ctx.batch_stats = norm != "none" and mean is None
    if ctx.batch_stats:
        mean, var = output[2:]
    ctx.bias_sizes = None if bias is None else [bias.shape[0]]
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, mean, var, output[1])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_pre, grad_mean, grad_var):
    """Both steps are differentiable ops; what a second backward asks of `pre` arrives as grad_pre."""
    x, weight, norm_weight, norm_bias, mean, var, pre = ctx.saved_tensors
    grad, grad_norm_weight, grad_norm_bias = grad_out, None, None
    if grad_out is not None and not ctx.linear:
        grad, grad_norm_weight, grad_norm_bias = tail.norm_act_grads(
            grad_out, pre, norm_weight, norm_bias, mean, var, ctx.batch_stats, *ctx.tail
        )
    if grad_pre is not None and not ctx.linear:
        grad = grad_pre if grad is None else grad + grad_pre
    if grad is None:
        return (None,) * 17
    stride, padding, output_padding, groups, dilation = ctx.convolution
    grads = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        ctx.bias_sizes,
        stride,
        padding,
        dilation,
        True,
        output_padding,
        groups,
        list(ctx.needs_input_grad[:3]),
    )
    return *grads, grad_norm_weight, grad_norm_bias, *(None,) * 12


torch.library.register_autograd(f"fastgen::{NAME}", _backward, setup_context=_setup)
