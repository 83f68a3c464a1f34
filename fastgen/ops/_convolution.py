"""What the two fused convolutions share: checks, default kernel, fake kernel and gradients, strided or transposed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgen.ops import _autograd, _check, _dispatch, _synchronized
from fastgen.ops import norm_act as tails
from fastgen.ops._geometry import Geometry, Pair
from fastgen.ops._layout import is_channels_last, like, memory_format, sizes_to_choose_by
from fastgen.ops._settings import Setting

_weight_grads = Setting("weight_grads", True)


@contextlib.contextmanager
def without_weight_grads() -> Iterator[None]:
    """Within the context the backward passes that this thread asks for leave out the gradients of the fused
    convolutions' weights and biases. With create_graph=True the second backward, outside of it, is complete.

    torch.autograd.grad(inputs=) computes what is asked for alone without it, as gradient penalties do.
    """
    with _weight_grads.set_to(False):
        yield


def convolve(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution in PyTorch."""
    stride, padding, output_padding, groups, dilation, reflect = geometry
    if output_padding is not None:
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    if reflect:
        return F.conv2d(_mirrored(x, padding), weight, bias, stride, 0, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _mirrored(x: Tensor, padding: Pair) -> Tensor:
    sides = [padding[1], padding[1], padding[0], padding[0]]
    return F.pad(x, sides, mode="reflect") if x.shape[0] else F.pad(x, sides)


def _composed(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's convolution, with fastgen's gradients where one of them wins."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        kind, last, sizes = like(weight), is_channels_last(x) or is_channels_last(weight), sizes_to_choose_by(x)
        if (x.requires_grad and geometry.wins_input_grad(sizes, kind)) or (
            weight.requires_grad and geometry.wins_weight_grad(sizes, kind, last)
        ):
            return _autograd.call("convolution", x, weight, bias, *geometry.arguments())
    return convolve(geometry, x, weight, bias)


def plain(geometry: Geometry, x: Tensor, weight: Tensor, sigma: Tensor | None = None, own: str | None = None) -> Tensor:
    """The convolution alone, differentiable: by `own`, an implementation of fastgen's, else by the one that wins.

    sigma: see _over_sigma.
    """
    own = own or (_asked() or geometry.wins(x.shape, like(weight)) if _has_kernels(x) else None)
    if own is None:
        return convolve(geometry, x, _divided(weight, sigma), None)
    own = own if _dispatch.asked() == "auto" else "own"
    if sigma is not None:
        options = ("identity", 0.0, *geometry.arguments())
        return _dispatch.call("convolution_over_sigma", own, x, weight, sigma, None, *options)
    op, arguments = geometry.fused()
    return _dispatch.call(op, own, x, weight, None, *_NO_TAIL, *arguments, False)[0]


def _asked() -> str | None:
    """A GPU's own kernels, whatever wins, where one of its implementations is asked for."""
    return "own" if _dispatch.asked() in _dispatch.GPU_TIERS else None


_NO_TAIL = (None, None, None, None, None, "none", 0, 0.0, "identity", 0.0)


def gradients(
    geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], sigma: Tensor | None = None
):
    """Gradients of x and weight, those that are wanted, by ops that are themselves differentiable.

    x's is the opposite convolution of grad. What PyTorch's kernels do better they do in one call.
    """
    of_x, of_weight = wanted
    own, kind = _has_kernels(x), like(weight)
    more = x if x.shape[1] > grad.shape[1] else grad
    own_x = own_weight = grad_x = grad_weight = None
    if own and of_x:
        own_x = _asked() or geometry.wins_input_grad(x.shape, kind)
    if own and of_weight:
        own_weight = _asked() or geometry.wins_weight_grad(x.shape, kind, is_channels_last(more))
    if own_weight is not None:
        grad_weight = _dispatch.call("convolution_weight_grad", own_weight, grad, x, weight, *geometry.arguments())
    if own_x is not None:
        inner, sizes = geometry.inner(x.shape)
        grad_x = plain(inner.opposite(sizes, weight.shape), grad, weight, sigma, own_x)
        if geometry.is_opposite_larger(x.shape, weight.shape):
            last = memory_format(is_channels_last(grad_x))
            grad_x = grad_x[:, :, : x.shape[2], : x.shape[3]].contiguous(memory_format=last)
        grad_x = unmirrored(geometry, grad_x, x)
    rest = (of_x and own_x is None, of_weight and own_weight is None)
    if any(rest):
        found = aten_gradients(geometry, grad, x, _divided(weight, sigma) if rest[0] else weight, rest)
        grad_x, grad_weight = (found[0] if rest[0] else grad_x), (found[1] if rest[1] else grad_weight)
    return grad_x, grad_weight


def unmirrored(geometry: Geometry, grad: Tensor, x: Tensor) -> Tensor:
    """x's gradient, from that of what its convolution reads."""
    if not geometry.reflect:
        return grad
    height, width = geometry.padding
    grad = grad.contiguous(memory_format=memory_format(is_channels_last(x)))  # the op takes it to be in x's
    return torch.ops.aten.reflection_pad2d_backward.default(grad, x, [width, width, height, height])


def aten_gradients(geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]):
    inner, _ = geometry.inner(x.shape)
    stride, padding, output_padding, groups, dilation, _ = inner
    of_x, of_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, _mirrored(x, geometry.padding) if geometry.reflect else x, weight, None, stride, padding, dilation,
        geometry.transposed, output_padding or (0, 0), groups, [*wanted, False],
    )  # fmt: skip
    return unmirrored(geometry, of_x, x) if wanted[0] else None, of_weight


def _has_kernels(x: Tensor) -> bool:
    own = _dispatch.own_kernels(str(x.device), x.dtype)
    return own is not None and _dispatch.why_not("conv2d_norm_act", own, str(x.device), x.dtype) is None


ARGUMENTS = (
    "int[2] stride, int[2] padding, int[] output_padding, int groups, int[2] dilation, bool reflect"  # see Geometry.of
)


def wanted(ctx, bias: int) -> tuple[tuple[bool, bool], bool]:
    """Whether gradients of x and weight are, the first two inputs, and of the bias, by its place among them."""
    parameters = _weight_grads.get()
    of_weight, of_bias = (parameters and _autograd.is_wanted(ctx, at) for at in (1, bias))
    return (_autograd.is_wanted(ctx, 0), of_weight), of_bias


# PyTorch's convolution, so that its gradients can be chosen.
torch.library.define("fastgen::convolution", f"(Tensor x, Tensor weight, Tensor? bias, {ARGUMENTS}) -> Tensor")


@torch.library.impl("fastgen::convolution", "CompositeExplicitAutograd")
def _forward(x, weight, bias, *geometry):
    return convolve(Geometry.of(*geometry), x, weight, bias)


@torch.library.register_fake("fastgen::convolution")
def _forward_fake(x, weight, bias, *geometry):
    return convolve(Geometry.of(*geometry), x, weight, bias)


def _setup_forward(ctx, inputs, output):
    x, weight, _, *geometry = inputs
    ctx.geometry = Geometry.of(*geometry)
    ctx.save_for_backward(x, weight)


def _forward_backward(ctx, grad):
    of_both, of_bias = wanted(ctx, bias=2)
    found = gradients(ctx.geometry, grad, *ctx.saved_tensors, of_both)
    return *found, grad.sum((0, 2, 3)) if of_bias else None, *(None,) * 6


_autograd.register("fastgen::convolution", _forward_backward, _setup_forward)

# The weight's gradient; weight gives its sizes and strides.
torch.library.define(
    "fastgen::convolution_weight_grad", f"(Tensor grad, Tensor x, Tensor weight, {ARGUMENTS}) -> Tensor"
)


@_dispatch.kernel("convolution_weight_grad", "convolution_weight_grad.weight_grad", cuda=False)
def _default_weight_grad(grad, x, weight, *geometry):
    found = aten_gradients(Geometry.of(*geometry), grad, x, weight, (False, True))[1]
    return torch.empty_like(weight).copy_(found)


@torch.library.register_fake("fastgen::convolution_weight_grad")
def _weight_grad_fake(grad, x, weight, *geometry):
    return torch.empty_like(weight)


def _setup_weight_grad(ctx, inputs, output):
    grad, x, _, *geometry = inputs
    ctx.geometry = Geometry.of(*geometry)
    ctx.save_for_backward(grad, x)


def _weight_grad_backward(ctx, direction):
    """It is linear in both factors: the convolution with `direction` as its weight, and that one's input gradient."""
    grad, x = ctx.saved_tensors
    of_grad, of_x = (_autograd.is_wanted(ctx, at) for at in (0, 1))
    return (
        plain(ctx.geometry, x, direction) if of_grad else None,
        gradients(ctx.geometry, grad, x, direction, (True, False))[0] if of_x else None,
        *(None,) * 7,
    )


_autograd.register("fastgen::convolution_weight_grad", _weight_grad_backward, _setup_weight_grad)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor) -> Tensor:
        return (weight / sigma).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def _divided(weight: Tensor, sigma: Tensor | None) -> Tensor:
    """weight / sigma for what cannot divide its sums; its gradient is as in _over_sigma."""
    return weight if sigma is None else _Divided.apply(weight, sigma)


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    tail: tails.Tail,
    memory_efficient: bool,
    impl: str,
) -> Tensor:
    """A public convolution after its geometry is checked."""
    if tail.residual is not None and autocasts(x):
        tail = tail._replace(residual=tail.residual.to(x.dtype))
    if x.dim() == 3 and tail.norm != "batch":
        tail = tail._replace(residual=None if tail.residual is None else tail.residual.unsqueeze(0))
        return call(x.unsqueeze(0), weight, bias, geometry, tail, memory_efficient, impl).squeeze(0)
    check_tensors(x, weight, bias, geometry)
    sizes = geometry.sizes(x.shape, weight.shape)
    if min(sizes[2:]) < 1:
        raise ValueError(
            f"padding {list(geometry.padding)} leaves an output of height {sizes[2]} and width {sizes[3]} from x of "
            f"shape "
            f"{tuple(x.shape)} and weight of shape {tuple(weight.shape)}; both must be at least 1"
        )
    batch_stats = _check.tail(x, sizes, *tail)
    if batch_stats and tail.process_group is not None:
        alone = tails.Tail("none", *(None,) * 4, False, 0.0, 0.0, None, None, "identity", 0.0, False)
        pre = call(x, weight, bias, geometry, alone, memory_efficient, impl)
        return _synchronized.norm_act(pre, tail, _dispatch.choose("norm_act", impl, pre))
    op, arguments = geometry.fused()
    chosen = _dispatch.choose(op, impl, x, geometry.wins(sizes_to_choose_by(x), like(weight), batch_stats))
    if chosen == "reference":
        return tails.reference(convolve(geometry, x, weight, bias), tail)
    options = tail.options()

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *given: Tensor | None) -> tuple[Tensor, Any, Any]:
        if chosen == "composed" and tail.norm == "none" and tail.residual is None:
            return tails.activate_in_place(_composed(geometry, x, weight, bias), *options[3:]), None, None
        if chosen == "composed":
            return _autograd.call("norm_act", _composed(geometry, x, weight, bias), *given, *options)
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, weight, bias, *given)
        )
        plain = tail.norm == "none" and tail.activation == "identity"
        save = needs_grad and not (plain or tails.needs_output_alone(options))
        out, _, mean, var = _dispatch.call(op, chosen, x, weight, bias, *given, *options, *arguments, save)
        return out, mean, var

    inputs: tuple[Any, ...] = (x, weight, bias, *tail.tensors(batch_stats))
    if memory_efficient and torch.is_grad_enabled():
        out, mean, var = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        out, mean, var = run(*inputs)
    if batch_stats:  # not in run, which a checkpoint calls twice
        tail.update_running(mean, var, out.numel() // max(1, mean.numel()))
    return out


def autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(
        kind
    )  # "meta" has none


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's dtype where that is on, as PyTorch's convolutions have it: all but float64."""
    if not autocasts(x) or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C_in, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 4:
        layout = "(C_in, C_out / groups, KH, KW)" if geometry.transposed else "(C_out, C_in / groups, KH, KW)"
        raise ValueError(f"weight must have 4 dimensions {layout}, got shape {tuple(weight.shape)}")
    if min(weight.shape) < 1 or min(x.shape[1:]) < 1:
        raise ValueError(f"only N may be 0, got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}")
    _check.alike("weight", weight, x)
    if geometry.groups < 1 or x.shape[1] % geometry.groups or weight.shape[0] % geometry.groups:
        raise ValueError(
            f"groups must divide the {x.shape[1]} channels of x and the {weight.shape[0]} of weight's first dimension, "
            f"got {geometry.groups}"
        )
    channels, out_channels = geometry.channels(weight.shape)
    if x.shape[1] != channels:
        raise ValueError(f"x has {x.shape[1]} channels, weight of shape {tuple(weight.shape)} needs {channels}")
    if bias is not None:
        _check.per_channel("bias", bias, out_channels, x)
        _check.alike("bias", bias, x)
    given = list(geometry.output_padding or ())
    for i, size in enumerate(given):
        if size >= max(geometry.stride[i], geometry.dilation[i]):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got output_padding {given}, stride "
                f"{list(geometry.stride)} and dilation {list(geometry.dilation)}"
            )
    if geometry.reflect and any(pad >= size for pad, size in zip(geometry.padding, x.shape[2:], strict=True)):
        raise ValueError(
            f"padding must be smaller than x when it reflects, got {list(geometry.padding)} for x of shape "
            f"{tuple(x.shape)}"
        )


def define(op: str, geometry_schema: str, geometry_of: Callable[..., Geometry]) -> None:
    """Registers an op and all that PyTorch asks of it; geometry_of(*arguments of the schema) is its Geometry.

    save: also return pre, the convolution before the norm, which the backward needs. mean, var: as in norm_act.
    """
    name = f"fastgen::{op}"
    torch.library.define(
        name,
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, "
        f"Tensor? residual, {tails.OPTIONS}, {geometry_schema}, bool save) "
        "-> (Tensor out, Tensor pre, Tensor mean, Tensor var)",
    )
    _dispatch.register(op, "reference", "cpp", "cuda", "triton")

    def layout(x, weight):
        return memory_format(is_channels_last(x) or is_channels_last(weight))

    def forward(x, weight, bias, norm_weight, norm_bias, mean, var, residual, *rest):
        options, arguments, save = rest[:5], rest[5:-1], rest[-1]
        pre = convolve(geometry_of(*arguments), x, weight, bias).contiguous(memory_format=layout(x, weight))
        out, mean, var = torch.ops.fastgen.norm_act(pre, norm_weight, norm_bias, mean, var, residual, *options)
        return out, pre if save else pre.new_empty(0), mean, var

    def fake(x, weight, bias, norm_weight, norm_bias, mean, var, residual, norm, num_groups, *rest):
        sizes = geometry_of(*rest[3:-1]).sizes(x.shape, weight.shape)
        out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout(x, weight))
        pre = torch.empty_like(out) if rest[-1] else x.new_empty(0)
        return out, pre, *tails.fake_moments(x, sizes, mean, norm, num_groups)

    def setup(ctx, inputs, output):
        x, weight, bias, norm_weight, norm_bias, mean, var, residual, *rest = inputs
        ctx.options, ctx.geometry, save = rest[:5], geometry_of(*rest[5:-1]), rest[-1]
        ctx.plain = ctx.options[0] == "none" and ctx.options[3] == "identity"
        ctx.save, ctx.adds, pre = save, residual is not None, output[1]
        ctx.lacks_pre = not (save or ctx.plain or tails.needs_output_alone(ctx.options))
        if not save and tails.needs_output_alone(ctx.options):
            pre, residual = output[0], None
        ctx.batch_stats = ctx.options[0] != "none" and mean is None
        if ctx.batch_stats:
            mean, var = output[2:]
        ctx.save_for_backward(
            x, weight, bias if ctx.lacks_pre else None, norm_weight, norm_bias, mean, var, residual, pre
        )
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_out, grad_pre, grad_mean, grad_var):
        """Both steps are differentiable ops; what a second backward asks of `pre` arrives as grad_pre."""
        x, weight, bias, norm_weight, norm_bias, mean, var, residual, pre = ctx.saved_tensors
        if ctx.lacks_pre:  # its caller did not know: torch.compile does not within torch.func.grad
            pre = convolve(ctx.geometry, x, weight, bias).contiguous(memory_format=layout(x, weight))
        grad, of_tail = grad_out, (None, None, None)
        if grad_out is not None and not ctx.plain:
            grad, *of_tail = tails.norm_act_grads(
                grad_out, pre, norm_weight, norm_bias, mean, var, residual, ctx.batch_stats, *ctx.options
            )
        if ctx.adds and of_tail[2] is None:
            of_tail = (*of_tail[:2], grad_out if ctx.plain else grad)
        if grad_pre is not None and ctx.save:
            grad = grad_pre if grad is None else grad + grad_pre
        count = len(ctx.needs_input_grad)
        if grad is None:
            return (None,) * count
        of_both, of_bias = wanted(ctx, bias=2)
        grads = gradients(ctx.geometry, grad, x, weight, of_both)
        grad_bias = grad.sum((0, 2, 3)) if of_bias else None
        *of_norm, grad_residual = of_tail
        return *grads, grad_bias, *of_norm, None, None, grad_residual, *(None,) * (count - 8)

    _dispatch.kernel(op, f"{op}.forward")(forward)
    torch.library.register_fake(name)(fake)
    _autograd.register(name, backward, setup)
