"""The convolution with its epilogue."""

from fastgen.kernels import _convolution
from fastgen.kernels._epilogue import Epilogue
from fastgen.kernels._geometry import Geometry


def forward(x, weight, bias, *rest, tile=""):
    """The op fastgen::conv2d_norm_act."""
    *epilogue, stride, padding, reflect, groups, dilation, save = rest
    geometry = Geometry(stride, padding, dilation, groups, reflect=reflect)
    return _convolution.forward(x, weight, Epilogue.of(*epilogue, bias=bias), geometry, save, tile)
