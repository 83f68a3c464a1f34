"""The implementations that could answer a Question, as calls that `fastgen.tune` measures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastgen.ops import _dispatch, _tiers
from fastgen.ops._convolution import unfused_epilogue
from fastgen.ops._convolution_grad import aten_gradients, convolve, input_gradient
from fastgen.ops._epilogue import KernelEpilogue
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import is_channels_last, memory_format
from fastgen.ops._question import Choice, Question


def names(question: Question) -> list[str]:
    """The implementations that can run on this machine."""
    tiers = ("cpp", "triton") if question.what == "weight_grad" else ("cpp", "cuda", "triton")
    device, dtype = question.device, question.dtype
    return ["torch", *(tier for tier in tiers if _tiers.unavailable(tier, device, dtype) is None)]


def tiles(question: Question) -> list[str]:
    """The names of the Triton kernel's variants, one per tile."""
    geometry, x, weight, grad = _operands(question)
    kernel = _tiers.triton.kernels("_tiles")
    if question.what == "weight_grad":
        weight_grad = _tiers.triton.kernels("convolution_weight_grad")
        kind = weight_grad.kind_of(*weight_grad.operands(grad, x, geometry.transposed), geometry.groups)
    else:
        if question.what == "input_grad":
            plain, read = geometry.without_reflection(x.shape)
            geometry, x = plain.adjoint(read, weight.shape), grad
        last = is_channels_last(x) or is_channels_last(weight)
        kind = kernel.kind_of(x, last, x.shape[1] // geometry.groups)
    return [f"triton {tile}" for tile in kernel.TILES[kind]]


def calls(question: Question, names: list[str]) -> dict[str, Callable[[], object]]:
    """name -> a call that computes the question's result on random tensors, without recording gradients."""
    geometry, x, weight, grad = _operands(question)
    by_fastgen: Callable[..., object]
    match question.what:
        case "forward":
            epilogue = KernelEpilogue(norm="batch" if question.flag else "none", eps=1e-5, activation="relu")
            by_fastgen = partial(_forward, geometry, x, weight, epilogue)
            by_torch = partial(_unfused, geometry, x, weight, epilogue)
        case "input_grad":
            by_fastgen = partial(input_gradient, geometry, grad, x, weight, None)
            by_torch = partial(aten_gradients, geometry, grad, x, weight, (True, False))
        case _:
            by_fastgen = partial(_weight_grad, geometry, grad, x, weight)
            by_torch = partial(aten_gradients, geometry, grad, x, weight, (False, True))
    return {name: by_torch if name == "torch" else partial(by_fastgen, Choice.parse(name)) for name in names}


def _operands(question: Question) -> tuple[Geometry, Tensor, Tensor, Tensor]:
    """The geometry, and random tensors with the question's shapes and layouts: x, the weight, the output's gradient."""
    geometry = question.geometry
    images_last = question.flag if question.what == "weight_grad" else question.channels_last

    def random(shape: tuple[int, ...], last: bool) -> Tensor:
        values = torch.randn(shape, dtype=torch.float32, device=question.device).to(question.dtype)
        return values.contiguous(memory_format=memory_format(last))

    x, weight = random(question.input, images_last), random(question.weight, question.channels_last)
    return geometry, x, weight, random(geometry.sizes(x.shape, weight.shape), images_last)


def _forward(geometry: Geometry, x: Tensor, weight: Tensor, epilogue: KernelEpilogue, choice: Choice) -> object:
    """The fused op. Batch statistics mean training, which also saves what the backward pass needs."""
    op, arguments = geometry.fused()
    return _dispatch.call(op, choice, x, weight, None, *epilogue, *arguments, epilogue.norm == "batch")


def _unfused(geometry: Geometry, x: Tensor, weight: Tensor, epilogue: KernelEpilogue) -> object:
    return unfused_epilogue(convolve(geometry, x, weight, None), epilogue)


def _weight_grad(geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, choice: Choice) -> object:
    return _dispatch.call("convolution_weight_grad", choice, grad, x, weight, *geometry.arguments())
