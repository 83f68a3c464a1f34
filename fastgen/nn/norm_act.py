from __future__ import annotations

import torch

from fastgen.nn import _layers
from fastgen.nn.sequential import Sequential


class NormAct(Sequential):
    """A norm layer and its activation in one op: nn.Sequential(norm, activation), with its state_dict.

    Args:
        num_features: channels C of the input (N, C, H, W).
        norm: "batch", "instance" or "group" (with num_groups).
        activation: "relu" or another of fastgen.ops.norm_act, or None.
        affine, track_running_stats: None selects the norm layer's own default.

    The other arguments are those of BatchNorm2d, InstanceNorm2d, GroupNorm and LeakyReLU. See fastgen.ops.norm_act.
    """

    def __init__(
        self,
        num_features: int,
        *,
        norm: str = "batch",
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.01,
        num_groups: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool | None = None,
        track_running_stats: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        options = _layers.norm_options(affine, track_running_stats)
        super().__init__(
            *_layers.norm_module(
                norm, num_features, momentum, num_groups, eps=eps, device=device, dtype=dtype, **options
            ),
            *_layers.activation_module(activation, negative_slope),
        )
