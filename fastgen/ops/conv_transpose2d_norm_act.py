"""y = activation(normalize(conv_transpose2d(x, weight, bias))) in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastgen.ops import _check, _convolution
from fastgen.ops._epilogue import Epilogue
from fastgen.ops._geometry import Geometry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_convolution.define(
    "conv_transpose2d_norm_act",
    "int[2] stride, int[2] padding, int[2] output_padding, int groups, int[2] dilation",
    Geometry.of,
)


def conv_transpose2d_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
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
    """y = activation(normalize(t) + residual), t = conv_transpose2d(input, weight, bias).

    With the defaults it equals torch.nn.functional.conv_transpose2d: no norm, no activation.

    Args:
        input: (N, C_in, H, W), or (C_in, H, W) unless norm is "batch"; float32, float64, bfloat16 or float16; any
            strides.
        weight: (C_in, C_out / groups, kernel height, kernel width), input's dtype.
        bias: (C_out,), input's dtype, or None.
        norm, running_mean, ..., process_group: as in norm_act, with C = C_out; residual has the output's shape.
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d.
        memory_efficient: save only input for the backward pass, which then recomputes t ("reference" saves both).
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        y: (N, C_out, (H - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1, the same for W),
        input's dtype, channels_last if input or weight is. Sums run in float32 (float64 for float64).

    Under autocast, input, weight and bias are converted to its dtype; the norm's parameters are not.
    Gradients of any order (reverse mode) flow to input, weight, bias, norm_weight, norm_bias and residual; with
    output_padding they have the first two orders, as in PyTorch.

    Raises ValueError or TypeError that names an invalid argument; RuntimeError if the requested implementation cannot
    run.

    Radford et al., Unsupervised Representation Learning with DCGANs, 2015 (the layer); Dumoulin and Visin, A guide to
    convolution arithmetic for deep learning, 2016 (the arithmetic).
    """
    _check.floating("input", input)
    _check.floating("weight", weight)
    stride, padding = _check.to_2d("stride", stride, 1), _check.to_2d("padding", padding, 0)
    output_padding = _check.to_2d("output_padding", output_padding, 0)
    geometry = Geometry(stride, padding, output_padding, groups, _check.to_2d("dilation", dilation, 1))
    x, weight, bias = _convolution.autocast(input, weight, bias)
    epilogue = Epilogue(
        norm, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, num_groups, residual,
        activation, negative_slope, inplace, process_group,
    )  # fmt: skip
    return _convolution.call(x, weight, bias, geometry, epilogue, memory_efficient, impl)
