from typing import NamedTuple

import torch
from torch import Tensor

# csrc/ops/common.h has the same rules.


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, H, W) lies in channels_last order; a tensor that fits both orders counts as contiguous."""
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x run, and in which its statistics are returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Like(NamedTuple):
    """What a choice between kernels asks of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    channels_last: bool


def like(x: Tensor) -> Like:
    return Like(x.shape, x.dtype, x.device, is_channels_last(x))
