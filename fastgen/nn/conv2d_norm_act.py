from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from fastgen.nn import _layers
from fastgen.nn.sequential import Sequential


class Conv2dNormAct(Sequential):
    """Convolution, norm and activation in one op: an nn.Sequential of the three layers, with its state_dict.

    Its children are the PyTorch layers themselves (0: Conv2d, then the norm and the activation, if any), so that
    initialisation, conversion, hooks, parametrizations and checkpoints of the nn.Sequential work unchanged.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in nn.Conv2d.
        norm: "batch", "instance", "group" (with num_groups) or None.
        activation: "relu" or another of fastgen.ops.norm_act, or None.
        affine, track_running_stats: None selects the norm layer's own default.
        memory_efficient: recompute the convolution in the backward pass instead of keeping its output.

    The other arguments are those of BatchNorm2d, InstanceNorm2d, GroupNorm and LeakyReLU. Shapes, dtypes and gradients:
    see fastgen.ops.conv2d_norm_act.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        norm: str | None = "batch",
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.01,
        num_groups: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool | None = None,
        track_running_stats: bool | None = None,
        memory_efficient: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        options = _layers.norm_options(affine, track_running_stats)
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                device=device, dtype=dtype,
            ),
            *_layers.norm_module(norm, out_channels, momentum, num_groups, eps=eps, device=device, dtype=dtype,
            **options), *_layers.activation_module(activation, negative_slope),
        )  # fmt: skip
        self[0].__dict__["memory_efficient"] = memory_efficient
