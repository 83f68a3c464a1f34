"""The transposed convolution with its norm and activation: kernels/_convolution.py by output phases."""

from fastgen.kernels import _convolution


def forward(x, weight, bias, norm_weight, norm_bias, mean, var, residual, *rest):
    """The op fastgen::conv_transpose2d_norm_act."""
    *options, stride, padding, output_padding, groups, dilation, save = rest
    geometry = (stride, padding, output_padding, groups, dilation, False)
    return _convolution.forward(x, weight, bias, norm_weight, norm_bias, mean, var, residual, *options, *geometry, save)
