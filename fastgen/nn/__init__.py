"""Layers built on the fused ops. Each replaces a run of PyTorch's layers and has the same state_dict."""

from fastgen.nn.conditional_batch_norm import ConditionalBatchNorm2d
from fastgen.nn.conv2d_norm_act import Conv2dNormAct
from fastgen.nn.conv_transpose2d_norm_act import ConvTranspose2dNormAct
from fastgen.nn.norm_act import NormAct
from fastgen.nn.reparameterize import Reparameterize
from fastgen.nn.sequential import Sequential
from fastgen.nn.spectral_norm import SpectralNorm, SpectralNormGroup, spectral_norm

__all__ = [
    "ConditionalBatchNorm2d",
    "Conv2dNormAct",
    "ConvTranspose2dNormAct",
    "NormAct",
    "Reparameterize",
    "Sequential",
    "SpectralNorm",
    "SpectralNormGroup",
    "spectral_norm",
]
