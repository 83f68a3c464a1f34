"""The transposed convolution with its norm and activation: kernels/_convolution.py by output phases."""

from fastgen.kernels import _convolution


def forward(x, weight, bias, norm_weight, norm_bias, mean, var, residual, *rest, tile=""):
    """The op fastgen::conv_transpose2d_norm_act."""
    *options, stride, padding, output_padding, groups, dilation, save = rest
    geometry = (stride, padding, output_padding, groups, dilation, False)
    tail = (norm_weight, norm_bias, mean, var, residual)
    return _convolution.forward(x, weight, bias, *tail, *options, *geometry, save, tile)
