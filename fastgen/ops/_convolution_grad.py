"""A convolution's gradients: who computes each of them, and the registered ops that do."""

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
        return F.conv2d(_reflected(x, padding), weight, bias, stride, 0, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _reflected(x: Tensor, padding: HW) -> Tensor:
    sides = [padding[1], padding[1], padding[0], padding[0]]
    return F.pad(x, sides, mode="reflect") if x.shape[0] else F.pad(x, sides)


def convolution(
    geometry: Geometry, x: Tensor, weight: Tensor, sigma: Tensor | None = None, choice: Choice | None = None
) -> Tensor:
    """The convolution alone, differentiable: by a choice, else by who is fastest. sigma: see _spectral_convolution."""
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
    """Which of fastgen's kernels computes something on x: the one that is asked for, else the policy's choice; None:
    PyTorch's."""
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
    geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], sigma: Tensor | None = None
):
    """Gradients of x and weight, those that are wanted, by ops that are themselves differentiable.

    x's is the adjoint convolution of grad. What PyTorch's kernels do better they do in one call.
    """
    wants_x, wants_weight = wanted
    weight_spec = spec_of(weight)
    more_channels = x if x.shape[1] > grad.shape[1] else grad
    of_x = of_weight = grad_x = grad_weight = None
    if wants_x:
        of_x = _choice(x, _policy.fastest_input_grad, geometry, x.shape, weight_spec)
    if wants_weight:
        last = is_channels_last(more_channels)
        of_weight = _choice(x, _policy.fastest_weight_grad, geometry, x.shape, weight_spec, last)
    if of_weight is not None:
        grad_weight = _dispatch.call("convolution_weight_grad", of_weight, grad, x, weight, *geometry.arguments())
    if of_x is not None:
        grad_x = input_gradient(geometry, grad, x, weight, sigma, of_x)
    rest = (wants_x and of_x is None, wants_weight and of_weight is None)
    if any(rest):
        found = aten_gradients(geometry, grad, x, divided(weight, sigma) if rest[0] else weight, rest)
        grad_x, grad_weight = (found[0] if rest[0] else grad_x), (found[1] if rest[1] else grad_weight)
    return grad_x, grad_weight


def input_gradient(
    geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, sigma: Tensor | None, choice: Choice
) -> Tensor:
    """x's gradient by a kernel of fastgen's: the adjoint convolution of grad."""
    plain, read = geometry.without_reflection(x.shape)
    grad_x = convolution(plain.adjoint(read, weight.shape), grad, weight, sigma, choice)
    if geometry.is_adjoint_larger(x.shape, weight.shape):
        layout = memory_format(is_channels_last(grad_x))
        grad_x = grad_x[:, :, : x.shape[2], : x.shape[3]].contiguous(memory_format=layout)
    return _unpad_reflect(geometry, grad_x, x)


def _unpad_reflect(geometry: Geometry, grad: Tensor, x: Tensor) -> Tensor:
    """x's gradient, from that of what its convolution reads."""
    if not geometry.reflect:
        return grad
    height, width = geometry.padding
    grad = grad.contiguous(memory_format=memory_format(is_channels_last(x)))  # the op takes it to be in x's
    return torch.ops.aten.reflection_pad2d_backward.default(grad, x, [width, width, height, height])


def aten_gradients(geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]):
    plain, _ = geometry.without_reflection(x.shape)
    stride, padding, output_padding, groups, dilation, _ = plain
    of_x, of_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, _reflected(x, geometry.padding) if geometry.reflect else x, weight, None, stride, padding, dilation,
        geometry.transposed, output_padding or (0, 0), groups, [*wanted, False],
    )  # fmt: skip
    return _unpad_reflect(geometry, of_x, x) if wanted[0] else None, of_weight


ARGUMENTS = (
    "int[2] stride, int[2] padding, int[] output_padding, int groups, int[2] dilation, bool reflect"  # see Geometry.of
)


def wanted_gradients(ctx, bias: int) -> tuple[tuple[bool, bool], bool]:
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
    wanted, wants_bias = wanted_gradients(ctx, bias=2)
    found = gradients(ctx.geometry, grad, *ctx.saved_tensors, wanted)
    return *found, grad.sum((0, 2, 3)) if wants_bias else None, *(None,) * 6


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
        convolution(ctx.geometry, x, direction) if of_grad else None,
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


def divided(weight: Tensor, sigma: Tensor | None) -> Tensor:
    """weight / sigma for what cannot divide its sums; its gradient is as in _spectral_convolution."""
    return weight if sigma is None else _Divided.apply(weight, sigma)
