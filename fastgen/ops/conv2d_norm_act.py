"""y = activation(normalize(conv2d(x, weight, bias)) + residual) in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastgen.ops import _check, _convolution
from fastgen.ops._geometry import Geometry
from fastgen.ops.norm_act import Tail

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _geometry(stride, padding, reflect, groups, dilation) -> Geometry:
    return Geometry.of(stride, padding, (), groups, dilation, reflect)


_convolution.define(
    "conv2d_norm_act", "int[2] stride, int[2] padding, bool reflect, int groups, int[2] dilation", _geometry
)


def conv2d_norm_act(
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
    num_groups: int | None = None,
    residual: Tensor | None = None,
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    inplace: bool = False,
    process_group: ProcessGroup | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "zeros",
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    memory_efficient: bool = False,
    impl: str = "auto",
) -> Tensor:
    """y = activation(normalize(t) + residual), t = conv2d(x, weight, bias).

    Args:
        x: (N, C_in, H, W), float32, float64, bfloat16 or float16; any strides. (C_in, H, W) too, unless norm is
            "batch".
        weight: (C_out, C_in / groups, kernel height, kernel width), x's dtype.
        bias: (C_out,), x's dtype, or None.
        norm ... process_group: as in norm_act, with C = C_out; residual has the output's shape.
        stride, padding, groups, dilation: as in torch.nn.functional.conv2d; an int or two ints.
        padding_mode: "zeros" or "reflect" (mirrored at the border's pixel; padding must be smaller than H and W).
        memory_efficient: keep x for the backward pass and not t, which is computed again then ("reference" keeps both).
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        y: (N, C_out, (H + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, the same for W), x's dtype,
        channels_last if x or weight is. Sums run in float32 (float64 for float64).

    Under autocast x, weight and bias are converted to its dtype, the norm's parameters are not.
    Gradients to x, weight, bias, norm_weight, norm_bias and residual, of any order (reverse mode).

    Raises ValueError or TypeError for an argument that does not fit, naming it; RuntimeError if the implementation
    asked for cannot run.

    Zhu et al., Unpaired Image-to-Image Translation (CycleGAN), 2017 (instance norm and reflection padding); Dumoulin
    and Visin, A guide to convolution arithmetic for deep learning, 2016 (the arithmetic).
    """
    _check.floating("x", x)
    _check.floating("weight", weight)
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"padding_mode must be 'zeros' or 'reflect', got {padding_mode!r}")
    geometry = Geometry(
        _check.pair("stride", stride, 1), _check.pair("padding", padding, 0), None, groups,
        _check.pair("dilation", dilation, 1), padding_mode == "reflect",
    )  # fmt: skip
    x, weight, bias = _convolution.autocast(x, weight, bias)
    tail = Tail(
        norm or "none", running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, num_groups,
        residual, activation, negative_slope, inplace, process_group,
    )  # fmt: skip
    return _convolution.call(x, weight, bias, geometry, tail, memory_efficient, impl)
