"""The ways to compute what a question of `_choices` asks, for `fastgen.tune` to measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastgen.ops import _autograd, _convolution, _dispatch
from fastgen.ops._choices import Question
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import is_channels_last, memory_format

_TAIL = (0, 1e-5, "relu", 0.0)


def names(question: Question) -> list[str]:
    """The implementations that can run here."""
    written = ("reference", "cpp", "triton") if question.what == "weight_grad" else _dispatch.IMPLEMENTATIONS
    device, dtype = question.device, question.dtype
    return [impl for impl in written if _dispatch.why_not("conv2d_norm_act", impl, device, dtype) is None]


def tiles(question: Question) -> list[str]:
    """The names of Triton's kernel with each of its tiles."""
    geometry, x, weight, grad = _operands(question)
    kernel = _dispatch.kernels("_tiles")
    if question.what == "weight_grad":
        of_weight = _dispatch.kernels("convolution_weight_grad")
        kind = of_weight.kind_of(*of_weight.operands(grad, x, geometry.transposed), geometry.groups)
    else:
        if question.what == "input_grad":
            inner, read = geometry.inner(x.shape)
            geometry, x = inner.opposite(read, weight.shape), grad
        last = is_channels_last(x) or is_channels_last(weight)
        kind = kernel.kind_of(x, last, x.shape[1] // geometry.groups)
    return [f"triton {tile}" for tile in kernel.TILES[kind]]


def calls(question: Question, names: list[str]) -> dict[str, Callable[[], object]]:
    """By name, a call that computes it on random tensors, without gradients of its own."""
    geometry, x, weight, grad = _operands(question)
    match question.what:
        case "forward":
            norm = "batch" if question.flag else "none"
            own = partial(_forward, geometry, x, weight, norm)
            theirs = partial(_composed, geometry, x, weight, norm)
        case "input_grad":
            own = partial(_input_grad, geometry, grad, x, weight)
            theirs = partial(_convolution.aten_gradients, geometry, grad, x, weight, (True, False))
        case _:
            own = partial(_weight_grad, geometry, grad, x, weight)
            theirs = partial(_convolution.aten_gradients, geometry, grad, x, weight, (False, True))
    return {name: theirs if name == "reference" else partial(own, name) for name in names}


def _operands(question: Question) -> tuple[Geometry, Tensor, Tensor, Tensor]:
    """The geometry, and tensors that lie as those that were asked about: x, the weight, the output's gradient."""
    geometry = Geometry(*question.geometry)
    images_last = question.flag if question.what == "weight_grad" else question.channels_last

    def random(shape: tuple[int, ...], last: bool) -> Tensor:
        made = torch.randn(shape, dtype=torch.float32, device=question.device).to(question.dtype)
        return made.contiguous(memory_format=memory_format(last))

    x, weight = random(question.x, images_last), random(question.weight, question.channels_last)
    return geometry, x, weight, random(geometry.sizes(x.shape, weight.shape), images_last)


def _forward(geometry: Geometry, x: Tensor, weight: Tensor, norm: str, impl: str) -> object:
    """Statistics of the batch are those of training, which keeps what the backward pass needs."""
    op, arguments = geometry.fused()
    return _dispatch.call(op, impl, x, weight, *(None,) * 6, norm, *_TAIL, *arguments, norm == "batch")


def _composed(geometry: Geometry, x: Tensor, weight: Tensor, norm: str) -> object:
    """As _convolution.call composes it."""
    pre = _convolution.convolve(geometry, x, weight, None)
    if norm == "none":
        return _convolution.tails.activate_in_place(pre, *_TAIL[2:])
    return _autograd.call("norm_act", pre, *(None,) * 5, norm, *_TAIL)


def _input_grad(geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, impl: str) -> object:
    inner, read = geometry.inner(x.shape)
    return _convolution.unmirrored(
        geometry, _convolution.plain(inner.opposite(read, weight.shape), grad, weight, own=impl), x
    )


def _weight_grad(geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, impl: str) -> object:
    return _dispatch.call("convolution_weight_grad", impl, grad, x, weight, *geometry.arguments())
