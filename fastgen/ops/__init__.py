"""The fused ops: one public function per op. `info` lists the implementations of each."""

from fastgen.ops._convolution_grad import without_weight_grads
from fastgen.ops._info import implementations_used, info
from fastgen.ops._requested import IMPLEMENTATIONS, use_impl
from fastgen.ops.conv2d_norm_act import conv2d_norm_act
from fastgen.ops.conv_transpose2d_norm_act import conv_transpose2d_norm_act
from fastgen.ops.norm_act import norm_act
from fastgen.ops.reparameterize import reparameterize, reparameterize_kl
from fastgen.ops.spectral_norm import spectral_norm, spectral_norm_group

__all__ = [
    "IMPLEMENTATIONS",
    "conv2d_norm_act",
    "conv_transpose2d_norm_act",
    "implementations_used",
    "info",
    "norm_act",
    "reparameterize",
    "reparameterize_kl",
    "spectral_norm",
    "spectral_norm_group",
    "use_impl",
    "without_weight_grads",
]
