"""What the strided and the transposed fused convolution share: checks, default kernel, fake kernel and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgen.ops import _autograd, _check, _dispatch, _norm_act, _policy, _synchronized, _tiers
from fastgen.ops._activations import activate_in_place
from fastgen.ops._convolution_grad import convolve, gradients, needed_gradients
from fastgen.ops._epilogue import SCHEMA, Epilogue, KernelEpilogue
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import is_channels_last, memory_format, spec_of


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    memory_efficient: bool,
    impl: str,
) -> Tensor:
    """Computes a public fused convolution, once the geometry has been checked."""
    if epilogue.residual is not None and autocasts(x):
        epilogue = epilogue._replace(residual=epilogue.residual.to(x.dtype))
    if x.dim() == 3 and epilogue.norm != "batch":
        residual = None if epilogue.residual is None else epilogue.residual.unsqueeze(0)
        epilogue = epilogue._replace(residual=residual)
        return call(x.unsqueeze(0), weight, bias, geometry, epilogue, memory_efficient, impl).squeeze(0)
    check_tensors(x, weight, bias, geometry)
    sizes = geometry.sizes(x.shape, weight.shape)
    if min(sizes[2:]) < 1:
        raise ValueError(
            f"padding {list(geometry.padding)} leaves an output of height {sizes[2]} and width {sizes[3]} from input "
            f"of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}; both must be at least 1"
        )
    batch_stats = epilogue.check(x, sizes)
    if batch_stats and epilogue.process_group is not None:
        pre = call(x, weight, bias, geometry, Epilogue(), memory_efficient, impl)
        return _synchronized.norm_act(pre, epilogue, _dispatch.choose("norm_act", impl, pre))
    op, arguments = geometry.fused()
    fastest = _policy.fastest_forward(geometry, x.shape, spec_of(weight), batch_stats)
    chosen = _dispatch.choose(op, impl, x, fastest)
    if chosen.implementation == "reference":
        return _norm_act.reference(convolve(geometry, x, weight, bias), epilogue)
    options = epilogue.options()

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Any, Any]:
        if chosen.implementation == "unfused":
            return _unfused(geometry, x, weight, bias, KernelEpilogue.of(tensors, options))
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, weight, bias, *tensors)
        )
        save = needs_grad and not (options.is_identity() or options.needs_output_alone())
        out, _, mean, var = _dispatch.call(op, chosen, x, weight, bias, *tensors, *options, *arguments, save)
        return out, mean, var

    inputs: tuple[Any, ...] = (x, weight, bias, *epilogue.tensors(batch_stats))
    if memory_efficient and torch.is_grad_enabled():
        out, mean, var = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        out, mean, var = run(*inputs)
    if batch_stats:  # not in run, which checkpointing calls twice
        epilogue.update_running(mean, var, out.numel() // max(1, mean.numel()))
    return out


def _unfused(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: KernelEpilogue
) -> tuple[Tensor, Any, Any]:
    """PyTorch's convolution, with fastgen's gradients where one of them is faster; then fastgen's norm_act."""
    pre = None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        spec, last = spec_of(weight), is_channels_last(x) or is_channels_last(weight)
        choices = [_policy.fastest_input_grad(geometry, x.shape, spec)] if x.requires_grad else []
        if weight.requires_grad:
            choices.append(_policy.fastest_weight_grad(geometry, x.shape, spec, last))
        if any(choice.implementation != "torch" for choice in choices):
            pre = _autograd.call("convolution", x, weight, bias, *geometry.arguments())
    pre = convolve(geometry, x, weight, bias) if pre is None else pre
    return unfused_epilogue(pre, epilogue)


def unfused_epilogue(pre: Tensor, epilogue: KernelEpilogue) -> tuple[Tensor, Any, Any]:
    """The epilogue, applied to the output of PyTorch's convolution, which nothing else refers to."""
    if epilogue.norm == "none" and epilogue.residual is None:
        return activate_in_place(pre, epilogue.activation, epilogue.negative_slope), None, None
    return _autograd.call("norm_act", pre, *epilogue)


def autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(
        kind
    )  # "meta" has no autocast


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three tensors in autocast's dtype if it is on, as for PyTorch's convolutions: all dtypes but float64."""
    if not autocasts(x) or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    if x.dim() != 4:
        raise ValueError(f"input must have 4 dimensions (N, C_in, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 4:
        layout = "(C_in, C_out / groups, KH, KW)" if geometry.transposed else "(C_out, C_in / groups, KH, KW)"
        raise ValueError(f"weight must have 4 dimensions {layout}, got shape {tuple(weight.shape)}")
    if min(weight.shape) < 1 or min(x.shape[1:]) < 1:
        raise ValueError(
            f"only N may be 0, got input of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}"
        )
    _check.same_kind("weight", weight, x)
    if geometry.groups < 1 or x.shape[1] % geometry.groups or weight.shape[0] % geometry.groups:
        raise ValueError(
            f"groups must divide the {x.shape[1]} channels of input and the {weight.shape[0]} of weight's first "
            f"dimension, got {geometry.groups}"
        )
    channels, out_channels = geometry.channels(weight.shape)
    if x.shape[1] != channels:
        raise ValueError(f"input has {x.shape[1]} channels, weight of shape {tuple(weight.shape)} needs {channels}")
    if bias is not None:
        _check.per_channel("bias", bias, out_channels, x)
        _check.same_kind("bias", bias, x)
    extra = list(geometry.output_padding or ())
    for i, size in enumerate(extra):
        if size >= max(geometry.stride[i], geometry.dilation[i]):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got output_padding {extra}, stride "
                f"{list(geometry.stride)} and dilation {list(geometry.dilation)}"
            )
    if geometry.reflect and any(pad >= size for pad, size in zip(geometry.padding, x.shape[2:], strict=True)):
        raise ValueError(
            f"padding must be smaller than the input when it reflects, got {list(geometry.padding)} for input of shape "
            f"{tuple(x.shape)}"
        )


def define(op: str, geometry_schema: str, geometry_of: Callable[..., Geometry]) -> None:
    """Registers an op with its kernels and gradients; geometry_of(*arguments of the schema) returns its Geometry.

    save (in the schema): also return pre, the convolution's output before the norm, which the backward pass needs.
    mean, var: as in norm_act.
    """
    name = f"fastgen::{op}"
    torch.library.define(
        name,
        f"(Tensor x, Tensor weight, Tensor? bias, {SCHEMA}, {geometry_schema}, bool save) "
        "-> (Tensor out, Tensor pre, Tensor mean, Tensor var)",
    )
    _tiers.register(op, "reference", "cpp", "cuda", "triton")

    def layout(x, weight):
        return memory_format(is_channels_last(x) or is_channels_last(weight))

    def split(rest):
        """(epilogue, geometry, save) from the arguments after the bias."""
        epilogue, arguments = KernelEpilogue(*rest[:10]), rest[10:-1]
        return epilogue, geometry_of(*arguments), rest[-1]

    def forward(x, weight, bias, *rest):
        epilogue, geometry, save = split(rest)
        pre = convolve(geometry, x, weight, bias).contiguous(memory_format=layout(x, weight))
        out, mean, var = torch.ops.fastgen.norm_act(pre, *epilogue)
        return out, pre if save else pre.new_empty(0), mean, var

    def fake(x, weight, bias, *rest):
        epilogue, geometry, save = split(rest)
        sizes = geometry.sizes(x.shape, weight.shape)
        out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout(x, weight))
        pre = torch.empty_like(out) if save else x.new_empty(0)
        return out, pre, *_norm_act.fake_moments(x, sizes, epilogue.mean, epilogue.norm, epilogue.num_groups)

    def setup(ctx, inputs, output):
        x, weight, bias, *rest = inputs
        epilogue, ctx.geometry, ctx.save = split(rest)
        norm_weight, norm_bias, mean, var, residual = epilogue.tensors
        options = ctx.options = epilogue.options
        needs_output = options.needs_output_alone()
        ctx.adds, pre = residual is not None, output[1]
        ctx.lacks_pre = not (ctx.save or options.is_identity() or needs_output)
        if needs_output and not ctx.save:
            pre, residual = output[0], None
        ctx.batch_stats = options.norm != "none" and mean is None
        if ctx.batch_stats:
            mean, var = output[2:]
        ctx.save_for_backward(
            x, weight, bias if ctx.lacks_pre else None, norm_weight, norm_bias, mean, var, residual, pre
        )
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_out, grad_pre, grad_mean, grad_var):
        """Both steps are differentiable ops; a second backward pass contributes grad_pre, the gradient of `pre`."""
        x, weight, bias, *tensors, pre = ctx.saved_tensors
        is_identity = ctx.options.is_identity()
        if ctx.lacks_pre:  # the forward did not know that it is needed, as with torch.compile within torch.func.grad
            pre = convolve(ctx.geometry, x, weight, bias).contiguous(memory_format=layout(x, weight))
        grad, norm_grads, grad_residual = grad_out, (None, None), None
        if grad_out is not None and not is_identity:
            grad, *norm_grads, grad_residual = _norm_act.norm_act_grads(
                grad_out, pre, *tensors, ctx.batch_stats, *ctx.options
            )
        if ctx.adds and grad_residual is None:
            grad_residual = grad_out if is_identity else grad
        if grad_pre is not None and ctx.save:
            grad = grad_pre if grad is None else grad + grad_pre
        count = len(ctx.needs_input_grad)
        if grad is None:
            return (None,) * count
        needed, needs_bias = needed_gradients(ctx, bias=2)
        grads = gradients(ctx.geometry, grad, x, weight, needed)
        grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
        return *grads, grad_bias, *norm_grads, None, None, grad_residual, *(None,) * (count - 8)

    _dispatch.kernel(op, f"{op}.forward")(forward)
    torch.library.register_fake(name)(fake)
    _autograd.register(name, backward, setup)
