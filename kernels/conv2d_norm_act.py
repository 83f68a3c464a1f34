"""The convolution with its norm and activation: kernels/_convolution.py, with reflection as an index."""

from fastgen.kernels import _convolution


def forward(x, weight, bias, norm_weight, norm_bias, mean, var, residual, *rest, tile=""):
    """The op fastgen::conv2d_norm_act."""
    *options, stride, padding, reflect, groups, dilation, save = rest
    geometry = (stride, padding, None, groups, dilation, reflect)
    tail = (norm_weight, norm_bias, mean, var, residual)
    return _convolution.forward(x, weight, bias, *tail, *options, *geometry, save, tile)
