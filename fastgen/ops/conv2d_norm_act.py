"""y = activation(normalize(conv2d(x, weight, bias)) + residual) in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _check, _convolution
from fastgen.ops._epilogue import Epilogue
from fastgen.ops._geometry import HW, Geometry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _geometry(stride, padding, reflect, groups, dilation) -> Geometry:
    return Geometry.of(stride, padding, (), groups, dilation, reflect)


_convolution.define(
    "conv2d_norm_act", "int[2] stride, int[2] padding, bool reflect, int groups, int[2] dilation", _geometry
)


def conv2d_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    norm: str | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    num_groups: int | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    inplace: bool = False,
    process_group: ProcessGroup | None = None,
    memory_efficient: bool = False,
    impl: str = "auto",
) -> Tensor:
    """y = activation(normalize(t) + residual), t = conv2d(input, weight, bias).

    With the defaults it equals torch.nn.functional.conv2d: no norm, no activation.

    Args:
        input: (N, C_in, H, W), or (C_in, H, W) unless norm is "batch"; float32, float64, bfloat16 or float16; any
            strides.
        weight: (C_out, C_in / groups, kernel height, kernel width), input's dtype.
        bias: (C_out,), input's dtype, or None.
        norm, running_mean, ..., process_group: as in norm_act, with C = C_out; residual has the output's shape.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d; padding may be "same" or "valid".
        padding_mode: "zeros" or "reflect" (mirrored at the border's pixel; padding must be smaller than H and W).
        memory_efficient: save only input for the backward pass, which then recomputes t ("reference" saves both).
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        y: (N, C_out, (H + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, the same for W), input's dtype,
        channels_last if input or weight is. Sums run in float32 (float64 for float64).

    Under autocast, input, weight and bias are converted to its dtype; the norm's parameters are not.
    Gradients of any order (reverse mode) flow to input, weight, bias, norm_weight, norm_bias and residual.

    Raises ValueError or TypeError that names an invalid argument; RuntimeError if the requested implementation cannot
    run.

    Zhu et al., Unpaired Image-to-Image Translation (CycleGAN), 2017 (instance norm and reflection padding); Dumoulin
    and Visin, A guide to convolution arithmetic for deep learning, 2016 (the arithmetic).
    """
    _check.floating("input", input)
    _check.floating("weight", weight)
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"padding_mode must be 'zeros' or 'reflect', got {padding_mode!r}")
    stride, dilation = _check.to_2d("stride", stride, 1), _check.to_2d("dilation", dilation, 1)
    if isinstance(padding, str):
        input, padding = _pad(input, weight, padding, padding_mode, stride, dilation)
    padding = _check.to_2d("padding", padding, 0)
    geometry = Geometry(stride, padding, None, groups, dilation, padding_mode == "reflect")
    x, weight, bias = _convolution.autocast(input, weight, bias)
    epilogue = Epilogue(
        norm, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, num_groups, residual,
        activation, negative_slope, inplace, process_group,
    )  # fmt: skip
    return _convolution.call(x, weight, bias, geometry, epilogue, memory_efficient, impl)


def _pad(x: Tensor, weight: Tensor, padding: str, mode: str, stride: HW, dilation: HW) -> tuple[Tensor, HW]:
    """(x, padding) for padding="same" or "valid". Padding that differs between the sides is applied to x."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid', an int or two ints, got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs a stride of 1, got {list(stride)}")
    if weight.dim() != 4 or x.dim() not in (3, 4):
        return x, (0, 0)  # a later check raises the error
    height, width = (spread * (size - 1) for spread, size in zip(dilation, weight.shape[2:], strict=True))
    if height % 2 == width % 2 == 0:
        return x, (height // 2, width // 2)
    sides = [width // 2, width - width // 2, height // 2, height - height // 2]
    return F.pad(x, sides, mode="constant" if mode == "zeros" else mode), (0, 0)
