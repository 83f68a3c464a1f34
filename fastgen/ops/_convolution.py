"""What the two fused convolutions share: checks, default kernel, fake kernel and gradients, strided or transposed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgen import _build
from fastgen.ops import _autograd, _check, _dispatch
from fastgen.ops import norm_act as tails
from fastgen.ops._layout import is_channels_last, memory_format

_weight_grads = True  # unset by without_weight_grads


@contextlib.contextmanager
def without_weight_grads() -> Iterator[None]:
    """Within the context a backward pass of the fused convolutions leaves out the gradients of weight and bias.

    For a backward pass that asks only for the input's gradient of a network whose weights require theirs (R1, WGAN-GP): an
    operator in Python is not told what is asked for. With create_graph=True the second backward is complete.
    """
    global _weight_grads
    before, _weight_grads = _weight_grads, False
    try:
        yield
    finally:
        _weight_grads = before


@dataclass(frozen=True)
class Geometry:
    """stride, padding and dilation are [height, width]; output_padding is None unless transposed."""

    stride: list[int]
    padding: list[int]
    output_padding: list[int] | None
    groups: int
    dilation: list[int]
    reflect: bool = False

    @staticmethod
    def of(stride, padding, output_padding, groups, dilation, reflect) -> Geometry:
        """From arguments of ops that serve both kinds: an empty output_padding stands for None."""
        return Geometry(stride, padding, list(output_padding) or None, groups, dilation, reflect)

    def arguments(self) -> tuple:
        return self.stride, self.padding, self.output_padding or [], self.groups, self.dilation, self.reflect

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """(input channels, output channels) that a weight stands for."""
        first, second = weight.shape[0], weight.shape[1] * self.groups
        return (first, second) if self.transposed else (second, first)

    def sizes(self, x: Sequence[int], weight: Tensor) -> list[int]:
        """The output's shape, from x's."""
        return [x[0], self.channels(weight)[1], self._size(x, weight, 0), self._size(x, weight, 1)]

    def _size(self, x: Sequence[int], weight: Tensor, axis: int) -> int:
        reach = self.dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        if self.output_padding is None:
            return (x[2 + axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
        return (x[2 + axis] - 1) * self.stride[axis] - 2 * self.padding[axis] + reach + self.output_padding[axis]

    def wins(self, x: Sequence[int], weight: Tensor, batch_stats: bool = False) -> bool:
        """Whether fastgen's own kernel is faster than PyTorch's on the CPU, as measured (benchmarks/NOTES.md), for x's shape.

        It is where Winograd's algorithm pays, in transposed convolutions with four 2x2 phases, for images of one pixel, and to
        few output channels without statistics. In bfloat16 and float16, in which oneDNN multiplies, the last two alone; and in
        bfloat16 for strides of 2 between many channels, where the processor multiplies pairs.
        """
        if weight.is_cuda:
            return self._wins_on_gpu(weight)
        channels, out_channels = self.channels(weight)
        wide = min(channels, out_channels) >= 16 * self.groups
        exact = weight.dtype in (torch.float32, torch.float64)
        if self._one_pixel(x, weight):
            return (is_channels_last(weight) or (wide and exact)) and (self.transposed or x[0] >= 32)
        if out_channels <= 4 and channels >= 16:
            return not batch_stats and self.groups == 1 and (exact or min(weight.shape[2:]) >= 4)
        if weight.dtype == torch.bfloat16 and self.stride == [2, 2]:
            fewer, more = sorted((channels // self.groups, out_channels // self.groups))
            return fewer >= 128 and more >= 256 and _multiplies_bf16()
        four_by_two = tuple(weight.shape[2:]) == (4, 4) and self.stride == [2, 2]
        return exact and wide and (self._winograd(x, weight, 256) or (self.transposed and four_by_two))

    def wins_weight_grad(self, x: Sequence[int], weight: Tensor) -> bool:
        """The same of the weight's gradient: for Winograd's algorithm and for images of one pixel, in all dtypes; to few output
        channels with a stride of 1, and in float32 and float64 for 4x4 kernels from or to few channels."""
        fewer, more = sorted(self.channels(weight))
        if weight.is_cuda or more < 16 * self.groups:
            return False
        if fewer <= 4:
            four_by_four = tuple(weight.shape[2:]) == (4, 4) and weight.dtype in (torch.float32, torch.float64)
            to_few = not self.transposed and weight.shape[0] == fewer and self.stride == [1, 1]
            return self.groups == 1 and (four_by_four or to_few)
        if fewer < 16 * self.groups:
            return False
        return self._winograd(x, weight, 1024) or (self._one_pixel(x, weight) and x[0] >= 32)

    def wins_input_grad(self, x: Sequence[int], weight: Tensor) -> bool:
        """The same of x's gradient: where the opposite convolution does."""
        grad, opposite = self.sizes(x, weight), self.opposite(x, weight)
        # An output_padding of a stride or more gives other sizes.
        return opposite.wins(grad, weight) and opposite.sizes(grad, weight)[2:] == list(x[2:])

    def _wins_on_gpu(self, weight: Tensor) -> bool:
        """A guess, nothing is measured yet: cuDNN for strided convolutions, weight gradients and true float32; transposed
        convolutions, the input gradients of strided ones among them, by output phase on tensor cores."""
        return self.transposed and weight.dtype in (torch.bfloat16, torch.float16)

    def _one_pixel(self, x: Sequence[int], weight: Tensor) -> bool:
        """Whether the images have one pixel: x's when transposed, else the output's."""
        return list(x[2:] if self.transposed else self.sizes(x, weight)[2:]) == [1, 1]

    def _winograd(self, x: Sequence[int], weight: Tensor, least: int) -> bool:
        """Whether Winograd's algorithm can run, on images of 8x8 and larger, with at least so many pixels in the output."""
        kernel, (n, _, height, width) = tuple(weight.shape[2:]), self.sizes(x, weight)
        if self.groups != 1 or self.dilation != [1, 1]:
            return False
        if kernel == (4, 4) and self.stride == [2, 2]:
            return n * height * width >= 1024
        return kernel == (3, 3) and self.stride == [1, 1] and height >= 8 and n * height * width >= least

    def opposite(self, x: Sequence[int], weight: Tensor) -> Geometry:
        """The convolution of the output's gradient that gives the gradient of x, of this shape and without reflection."""
        output_padding = None
        if not self.transposed:  # rows and columns of x that no output reads
            reach = [spread * (size - 1) + 1 for spread, size in zip(self.dilation, weight.shape[2:], strict=True)]
            output_padding = [(x[2 + i] + 2 * self.padding[i] - reach[i]) % self.stride[i] for i in range(2)]
        return Geometry(self.stride, self.padding, output_padding, self.groups, self.dilation, self.reflect)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution in PyTorch."""
        if self.output_padding is not None:
            return F.conv_transpose2d(
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        if self.reflect:
            return F.conv2d(self.mirrored(x), weight, bias, self.stride, 0, self.dilation, self.groups)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def mirrored(self, x: Tensor) -> Tensor:
        height, width = self.padding
        return (
            F.pad(x, [width, width, height, height], mode="reflect")
            if x.shape[0]
            else F.pad(x, [width, width, height, height])
        )

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution alone, by the kernel that wins; differentiable."""
        if not _has_kernels(x) or not self.wins(x.shape, weight):
            return self.convolve(x, weight, None)
        tail = (None, None, None, None, None, "none", 0, 0.0, "identity", 0.0)
        op = torch.ops.fastgen.conv_transpose2d_norm_act if self.transposed else torch.ops.fastgen.conv2d_norm_act
        third = self.output_padding if self.transposed else self.reflect
        return op(x, weight, None, *tail, self.stride, self.padding, third, self.groups, self.dilation, False)[0]

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """x's gradient, differentiable: the opposite convolution of grad."""
        if self.reflect:
            height, width = self.padding
            inner = self.mirrored(x)
            grad_x = dataclasses.replace(self, padding=[0, 0], reflect=False).input_grad(grad, inner, weight)
            grad_x = grad_x.contiguous(memory_format=memory_format(is_channels_last(x)))  # the op takes it to be in x's
            return torch.ops.aten.reflection_pad2d_backward(grad_x, x, [width, width, height, height])
        if _has_kernels(grad) and self.wins_input_grad(x.shape, weight):
            return self.opposite(x.shape, weight).plain(grad, weight)
        return self._aten_grads(grad, x, weight, [True, False])[0]

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """weight's gradient, differentiable."""
        if _has_kernels(x) and self.wins_weight_grad(x.shape, weight):
            return torch.ops.fastgen.convolution_weight_grad(grad, x, weight, *self.arguments())
        return self._aten_weight_grad(grad, x, weight)

    def composed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """PyTorch's convolution, with fastgen's gradients where one of them wins."""
        own = (x.requires_grad and self.wins_input_grad(x.shape, weight)) or (
            weight.requires_grad and self.wins_weight_grad(x.shape, weight)
        )
        if not (own and torch.is_grad_enabled()):
            return self.convolve(x, weight, bias)
        return torch.ops.fastgen.convolution(x, weight, bias, *self.arguments())

    def grads(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]):
        """Gradients of x, weight and bias, those that are wanted, by ops that are themselves differentiable."""
        of_x, of_weight, of_bias = wanted
        return (
            self.input_grad(grad, x, weight) if of_x else None,
            self.weight_grad(grad, x, weight) if of_weight and _weight_grads else None,
            grad.sum((0, 2, 3)) if of_bias and _weight_grads else None,
        )

    def _aten_weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.reflect:
            return dataclasses.replace(self, padding=[0, 0], reflect=False)._aten_weight_grad(
                grad, self.mirrored(x), weight
            )
        return self._aten_grads(grad, x, weight, [False, True])[1]

    def _aten_grads(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding or [0, 0], self.groups, [*wanted, False],
        )  # fmt: skip


# Whether this processor has an instruction for pairs of bfloat16.
torch.library.define("fastgen::multiplies_bf16", "() -> bool")


@torch.compiler.assume_constant_result
def _multiplies_bf16() -> bool:
    return _build.load() is None and torch.ops.fastgen.multiplies_bf16()


def _has_kernels(x: Tensor) -> bool:
    own = _dispatch.own_kernels(str(x.device), x.dtype)
    return own is not None and _dispatch.why_not("conv2d_norm_act", own, str(x.device), x.dtype) is None


_ARGUMENTS = (
    "int[2] stride, int[2] padding, int[] output_padding, int groups, int[2] dilation, bool reflect"  # see Geometry.of
)

# PyTorch's convolution, so that its gradients can be chosen.
torch.library.define("fastgen::convolution", f"(Tensor x, Tensor weight, Tensor? bias, {_ARGUMENTS}) -> Tensor")


@torch.library.impl("fastgen::convolution", "CompositeExplicitAutograd")
def _forward(x, weight, bias, *geometry):
    return Geometry.of(*geometry).convolve(x, weight, bias)


@torch.library.register_fake("fastgen::convolution")
def _forward_fake(x, weight, bias, *geometry):
    return Geometry.of(*geometry).convolve(x, weight, bias)


def _setup_forward(ctx, inputs, output):
    x, weight, _, *geometry = inputs
    ctx.geometry = Geometry.of(*geometry)
    ctx.save_for_backward(x, weight)


def _forward_backward(ctx, grad):
    return *ctx.geometry.grads(grad, *ctx.saved_tensors, ctx.needs_input_grad[:3]), *(None,) * 6


_autograd.register("fastgen::convolution", _forward_backward, _setup_forward)

# The weight's gradient; weight gives its sizes and strides.
torch.library.define(
    "fastgen::convolution_weight_grad", f"(Tensor grad, Tensor x, Tensor weight, {_ARGUMENTS}) -> Tensor"
)


@torch.library.impl("fastgen::convolution_weight_grad", "CompositeExplicitAutograd")
def _weight_grad(grad, x, weight, *geometry):
    return torch.empty_like(weight).copy_(Geometry.of(*geometry)._aten_weight_grad(grad, x, weight))


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
    of_grad, of_x = ctx.needs_input_grad[:2]
    return (
        ctx.geometry.plain(x, direction) if of_grad else None,
        ctx.geometry.input_grad(grad, x, direction) if of_x else None,
        *(None,) * 7,
    )


_autograd.register("fastgen::convolution_weight_grad", _weight_grad_backward, _setup_weight_grad)


def call(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    arguments: tuple[Any, ...],
    tail: tails.Tail,
    memory_efficient: bool,
    impl: str,
) -> Tensor:
    """A public convolution after its own arguments are checked; `arguments` are the geometry as the op's schema has it."""
    if _autocasts(x) and tail.residual is not None:
        tail = dataclasses.replace(tail, residual=tail.residual.to(x.dtype))
    if x.dim() == 3 and tail.norm != "batch":
        tail = dataclasses.replace(tail, residual=None if tail.residual is None else tail.residual.unsqueeze(0))
        return call(op, x.unsqueeze(0), weight, bias, geometry, arguments, tail, memory_efficient, impl).squeeze(0)
    _check_tensors(x, weight, bias, geometry)
    sizes = geometry.sizes(x.shape, weight)
    if min(sizes[2:]) < 1:
        raise ValueError(
            f"padding {geometry.padding} leaves an output of height {sizes[2]} and width {sizes[3]} from x of shape "
            f"{tuple(x.shape)} and weight of shape {tuple(weight.shape)}; both must be at least 1"
        )
    batch_stats = _check.tail(x, sizes, **vars(tail))
    chosen = _dispatch.choose(op, impl, x, geometry.wins(x.shape, weight, batch_stats))
    if chosen == "reference":
        return tails.reference(geometry.convolve(x, weight, bias), tail)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if chosen == "composed":
            return torch.ops.fastgen.norm_act(geometry.composed(x, weight, bias), *given, *options)
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, weight, bias, *given)
        )
        plain = tail.norm == "none" and tail.activation == "identity"
        save = needs_grad and not (plain or tails.needs_output_alone(options))
        out, _, mean, var = _dispatch.call(op, chosen, x, weight, bias, *given, *options, *arguments, save)
        return out, mean, var

    options = tail.options()
    inputs: tuple[Any, ...] = (x, weight, bias, *tail.tensors(batch_stats))
    if memory_efficient and torch.is_grad_enabled():
        out, mean, var = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        out, mean, var = run(*inputs)
    if batch_stats:  # not in run, which a checkpoint calls twice
        tail.update_running(mean, var, out.numel() // max(1, mean.numel()))
    return out


def _autocasts(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(
        x.device.type
    )  # "meta" has none


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's dtype where that is on, as PyTorch's convolutions have it: all but float64."""
    if not _autocasts(x) or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    layout = "(C_in, C_out / groups, KH, KW)" if geometry.transposed else "(C_out, C_in / groups, KH, KW)"
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C_in, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have 4 dimensions {layout}, got shape {tuple(weight.shape)}")
    if min(weight.shape) < 1 or min(x.shape[1:]) < 1:
        raise ValueError(f"only N may be 0, got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}")
    _check.alike("weight", weight, x)
    if geometry.groups < 1 or x.shape[1] % geometry.groups or weight.shape[0] % geometry.groups:
        raise ValueError(
            f"groups must divide the {x.shape[1]} channels of x and the {weight.shape[0]} of weight's first dimension, "
            f"got {geometry.groups}"
        )
    channels, out_channels = geometry.channels(weight)
    if x.shape[1] != channels:
        raise ValueError(f"x has {x.shape[1]} channels, weight of shape {tuple(weight.shape)} needs {channels}")
    if bias is not None:
        _check.per_channel("bias", bias, out_channels, x)
        _check.alike("bias", bias, x)
    for i, size in enumerate(geometry.output_padding or []):
        if size >= max(geometry.stride[i], geometry.dilation[i]):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got output_padding {geometry.output_padding}, stride "
                f"{geometry.stride} and dilation {geometry.dilation}"
            )
    if geometry.reflect and any(pad >= size for pad, size in zip(geometry.padding, x.shape[2:], strict=True)):
        raise ValueError(
            f"padding must be smaller than x when it reflects, got {geometry.padding} for x of shape {tuple(x.shape)}"
        )


def pairs(**values: tuple[int | Sequence[int], int]) -> list[list[int]]:
    """Each argument's (value, least) as [height, width]."""
    return [_check.pair(name, value, least) for name, (value, least) in values.items()]


def define(op: str, geometry_schema: str, geometry_of) -> None:
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
        pre = geometry_of(*arguments).convolve(x, weight, bias).contiguous(memory_format=layout(x, weight))
        out, mean, var = torch.ops.fastgen.norm_act(pre, norm_weight, norm_bias, mean, var, residual, *options)
        return out, pre if save else pre.new_empty(0), mean, var

    def fake(x, weight, bias, norm_weight, norm_bias, mean, var, residual, norm, num_groups, *rest):
        sizes = geometry_of(*rest[3:-1]).sizes(x.shape, weight)
        out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout(x, weight))
        pre = torch.empty_like(out) if rest[-1] else x.new_empty(0)
        return out, pre, *tails.fake_moments(x, sizes, mean, norm, num_groups)

    def setup(ctx, inputs, output):
        x, weight, _, norm_weight, norm_bias, mean, var, residual, *rest = inputs
        ctx.options, ctx.geometry, save = rest[:5], geometry_of(*rest[5:-1]), rest[-1]
        ctx.plain = ctx.options[0] == "none" and ctx.options[3] == "identity"
        ctx.save, ctx.adds, pre = save, residual is not None, output[1]
        if not save and tails.needs_output_alone(ctx.options):
            pre, residual = output[0], None
        elif not (save or ctx.plain):
            raise RuntimeError(f"{name} was called with save=False on a tensor that requires a gradient")
        ctx.batch_stats = ctx.options[0] != "none" and mean is None
        if ctx.batch_stats:
            mean, var = output[2:]
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, mean, var, residual, pre)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_out, grad_pre, grad_mean, grad_var):
        """Both steps are differentiable ops; what a second backward asks of `pre` arrives as grad_pre."""
        x, weight, norm_weight, norm_bias, mean, var, residual, pre = ctx.saved_tensors
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
        grads = ctx.geometry.grads(grad, x, weight, ctx.needs_input_grad[:3])
        *of_norm, grad_residual = of_tail
        return *grads, *of_norm, None, None, grad_residual, *(None,) * (count - 8)

    _dispatch.kernel(op, f"{op}.forward")(forward)
    torch.library.register_fake(name)(fake)
    _autograd.register(name, backward, setup)
