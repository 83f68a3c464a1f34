from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# csrc/ops/tensors.h has the same rules.


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


def sizes_to_choose_by(x: Tensor) -> Sequence[int]:
    """x's shape, for a choice between kernels. An exported graph is for all sizes that are not fixed: its choice is
    that for batches of 32, and no bound on them."""
    if not torch.compiler.is_exporting():
        return x.shape
    from torch.fx.experimental.symbolic_shapes import has_static_value  # here: it takes long to import

    return [size if has_static_value(size) else 32 for size in x.shape]


def like(x: Tensor) -> Like:
    return Like(x.shape, x.dtype, x.device, is_channels_last(x))
