"""A convolution's gradients: which implementation computes each, and the registered ops for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _autograd, _dispatch, _policy
from fastgen.ops._epilogue import KernelEpilogue
from fastgen.ops._geometry import HW, Geometry
from fastgen.ops._layout import is_channels_last, memory_format, spec_of
from fastgen.ops._question import Choice
from fastgen.ops._requested import requested_impl
from fastgen.ops._settings import Setting
from fastgen.ops._tiers import GPU_TIERS

_weight_grads = Setting("weight_grads", True)


@contextlib.contextmanager
def without_weight_grads() -> Iterator[None]:
    """A context in which the backward passes that this thread starts skip the gradients of the fused convolutions'
    weights and biases. With create_graph=True, a second backward pass outside the context is complete.

    torch.autograd.grad(inputs=), as in gradient penalties, computes only the requested gradients even without it.
    """
    with _weight_grads.set_to(False):
        yield


def convolve(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution in PyTorch."""
    stride, padding, output_padding, groups, dilation, reflect = geometry
    if output_padding is not None:
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    if reflect:
        return F.conv2d(_reflected(x, padding), weight, bias, stride, 0, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _reflected(x: Tensor, padding: HW) -> Tensor:
    sides = [padding[1], padding[1], padding[0], padding[0]]
    return F.pad(x, sides, mode="reflect") if x.shape[0] else F.pad(x, sides)


def convolution(
    geometry: Geometry, x: Tensor, weight: Tensor, sigma: Tensor | None = None, choice: Choice | None = None
) -> Tensor:
    """The convolution alone, differentiable, by the given choice or the policy's. sigma: see _spectral_convolution."""
    if choice is None:
        choice = _choice(x, _policy.fastest_forward, geometry, x.shape, spec_of(weight))
    if choice is None:
        return convolve(geometry, x, divided(weight, sigma), None)
    if sigma is not None:
        options = ("identity", 0.0, *geometry.arguments())
        return _dispatch.call("spectral_convolution", choice, x, weight, sigma, None, *options)
    op, arguments = geometry.fused()
    return _dispatch.call(op, choice, x, weight, None, *KernelEpilogue(), *arguments, False)[0]


def _choice(x: Tensor, fastest: Any, *question: Any) -> Choice | None:
    """Which of fastgen's kernels computes a result from x: the requested one, else the policy's choice; None stands
    for PyTorch's kernel."""
    if not _dispatch.has_kernels(x):
        return None
    requested = requested_impl()
    if requested in GPU_TIERS:
        return _dispatch.ANY
    choice = fastest(*question)
    if choice.implementation == "torch":
        return None
    return choice if requested == "auto" else _dispatch.ANY


def gradients(
    geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], sigma: Tensor | None = None
):
    """The gradients of x and weight, each if it is `needed`, by ops that are themselves differentiable.

    The gradient of x is the adjoint convolution of grad. Gradients that PyTorch's kernels compute faster take one call.
    """
    needs_x, needs_weight = needed
    weight_spec = spec_of(weight)
    more_channels = x if x.shape[1] > grad.shape[1] else grad
    x_choice = weight_choice = grad_x = grad_weight = None
    if needs_x:
        x_choice = _choice(x, _policy.fastest_input_grad, geometry, x.shape, weight_spec)
    if needs_weight:
        last = is_channels_last(more_channels)
        weight_choice = _choice(x, _policy.fastest_weight_grad, geometry, x.shape, weight_spec, last)
    if weight_choice is not None:
        grad_weight = _dispatch.call("convolution_weight_grad", weight_choice, grad, x, weight, *geometry.arguments())
    if x_choice is not None:
        grad_x = input_gradient(geometry, grad, x, weight, sigma, x_choice)
    rest = (needs_x and x_choice is None, needs_weight and weight_choice is None)
    if any(rest):
        grads = aten_gradients(geometry, grad, x, divided(weight, sigma) if rest[0] else weight, rest)
        grad_x, grad_weight = (grads[0] if rest[0] else grad_x), (grads[1] if rest[1] else grad_weight)
    return grad_x, grad_weight


def input_gradient(
    geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, sigma: Tensor | None, choice: Choice
) -> Tensor:
    """The gradient of x by one of fastgen's kernels: the adjoint convolution of grad."""
    plain, read = geometry.without_reflection(x.shape)
    grad_x = convolution(plain.adjoint(read, weight.shape), grad, weight, sigma, choice)
    if geometry.is_adjoint_larger(x.shape, weight.shape):
        layout = memory_format(is_channels_last(grad_x))
        grad_x = grad_x[:, :, : x.shape[2], : x.shape[3]].contiguous(memory_format=layout)
    return _unpad_reflect(geometry, grad_x, x)


def _unpad_reflect(geometry: Geometry, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from the gradient of the padded x that the convolution reads."""
    if not geometry.reflect:
        return grad
    height, width = geometry.padding
    grad = grad.contiguous(memory_format=memory_format(is_channels_last(x)))  # the op takes it to be in x's
    return torch.ops.aten.reflection_pad2d_backward.default(grad, x, [width, width, height, height])


def aten_gradients(geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]):
    plain, _ = geometry.without_reflection(x.shape)
    stride, padding, output_padding, groups, dilation, _ = plain
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, _reflected(x, geometry.padding) if geometry.reflect else x, weight, None, stride, padding, dilation,
        geometry.transposed, output_padding or (0, 0), groups, [*needed, False],
    )  # fmt: skip
    return _unpad_reflect(geometry, grad_x, x) if needed[0] else None, grad_weight


ARGUMENTS = (
    "int[2] stride, int[2] padding, int[] output_padding, int groups, int[2] dilation, bool reflect"  # see Geometry.of
)


def needed_gradients(ctx, bias: int) -> tuple[tuple[bool, bool], bool]:
    """Whether the gradients of x and weight (inputs 0 and 1) are needed, and that of the input at position `bias`."""
    parameters = _weight_grads.get()
    needs_weight, needs_bias = (parameters and _autograd.needs_gradient(ctx, at) for at in (1, bias))
    return (_autograd.needs_gradient(ctx, 0), needs_weight), needs_bias


# PyTorch's convolution as a registered op, so that an implementation can be chosen for each of its gradients.
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
    needed, needs_bias = needed_gradients(ctx, bias=2)
    grads = gradients(ctx.geometry, grad, *ctx.saved_tensors, needed)
    return *grads, grad.sum((0, 2, 3)) if needs_bias else None, *(None,) * 6


_autograd.register("fastgen::convolution", _forward_backward, _setup_forward)

# The gradient of the weight; the argument weight only gives its sizes and strides.
torch.library.define(
    "fastgen::convolution_weight_grad", f"(Tensor grad, Tensor x, Tensor weight, {ARGUMENTS}) -> Tensor"
)


@_dispatch.kernel("convolution_weight_grad", "convolution_weight_grad.weight_grad", cuda=False)
def _default_weight_grad(grad, x, weight, *geometry):
    grad_weight = aten_gradients(Geometry.of(*geometry), grad, x, weight, (False, True))[1]
    return torch.empty_like(weight).copy_(grad_weight)


@torch.library.register_fake("fastgen::convolution_weight_grad")
def _weight_grad_fake(grad, x, weight, *geometry):
    return torch.empty_like(weight)


def _setup_weight_grad(ctx, inputs, output):
    grad, x, _, *geometry = inputs
    ctx.geometry = Geometry.of(*geometry)
    ctx.save_for_backward(grad, x)


def _weight_grad_backward(ctx, direction):
    """The op is linear in grad and x: their gradients are the convolution with `direction` as its weight, and the input
    gradient of that convolution."""
    grad, x = ctx.saved_tensors
    needs_grad, needs_x = (_autograd.needs_gradient(ctx, at) for at in (0, 1))
    return (
        convolution(ctx.geometry, x, direction) if needs_grad else None,
        gradients(ctx.geometry, grad, x, direction, (True, False))[0] if needs_x else None,
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


def divided(weight: Tensor, sigma: Tensor | None) -> Tensor:
    """weight / sigma, for kernels that cannot divide their sums; its gradient is as in _spectral_convolution."""
    return weight if sigma is None else _Divided.apply(weight, sigma)
