"""y = activation(normalize(conv_transpose2d(x, weight, bias))) in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastgen.ops import _check, _convolution
from fastgen.ops._geometry import Geometry
from fastgen.ops.norm_act import Tail

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_convolution.define(
    "conv_transpose2d_norm_act",
    "int[2] stride, int[2] padding, int[2] output_padding, int groups, int[2] dilation",
    Geometry.of,
)


def conv_transpose2d_norm_act(
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
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    memory_efficient: bool = False,
    impl: str = "auto",
) -> Tensor:
    """y = activation(normalize(t) + residual), t = conv_transpose2d(x, weight, bias).

    Args:
        x: (N, C_in, H, W), float32, float64, bfloat16 or float16; any strides. (C_in, H, W) too, unless norm is
            "batch".
        weight: (C_in, C_out / groups, kernel height, kernel width), x's dtype.
        bias: (C_out,), x's dtype, or None.
        norm ... process_group: as in norm_act, with C = C_out; residual has the output's shape.
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d; an int or two
            ints.
        memory_efficient: keep x for the backward pass and not t, which is computed again then ("reference" keeps both).
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        y: (N, C_out, (H - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1, the same for W),
        x's dtype, channels_last if x or weight is. Sums run in float32 (float64 for float64).

    Under autocast x, weight and bias are converted to its dtype, the norm's parameters are not.
    Gradients to x, weight, bias, norm_weight, norm_bias and residual, of any order (reverse mode); with output_padding
    of the first two, as in PyTorch.

    Raises ValueError or TypeError for an argument that does not fit, naming it; RuntimeError if the implementation
    asked for cannot run.

    Radford et al., Unsupervised Representation Learning with DCGANs, 2015 (the layer); Dumoulin and Visin, A guide to
    convolution arithmetic for deep learning, 2016 (the arithmetic).
    """
    _check.floating("x", x)
    _check.floating("weight", weight)
    geometry = Geometry(
        _check.pair("stride", stride, 1), _check.pair("padding", padding, 0), _check.pair("output_padding",
        output_padding, 0), groups, _check.pair("dilation", dilation, 1),
    )  # fmt: skip
    x, weight, bias = _convolution.autocast(x, weight, bias)
    tail = Tail(
        norm or "none", running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, num_groups,
        residual, activation, negative_slope, inplace, process_group,
    )  # fmt: skip
    return _convolution.call(x, weight, bias, geometry, tail, memory_efficient, impl)
