"""Memory formats, dtypes of accumulation, and what a choice between kernels asks of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# csrc/ops has the same rules.


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, H, W) lies in channels_last order; a tensor that fits both orders counts as contiguous."""
    if (
        x.dim() != 4 or x.stride(1) != 1
    ):  # a branch, since a compiled graph's strides may be symbolic, and the answer not
        return False
    return not x.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x run, and in which its statistics are returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class TensorSpec(NamedTuple):
    """What a choice between kernels asks of a tensor."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool


def spec_of(x: Tensor) -> TensorSpec:
    return TensorSpec(x.shape, x.dtype, x.device, is_channels_last(x))


SIZE_OF_ANY = 32


def static_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape to choose kernels by. In a graph that is compiled or exported for sizes that vary, 32 stands for each of
    those: the choice holds for all of them, and sets no guard on them."""
    if not torch.compiler.is_compiling():
        return tuple(shape)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import, and compilation has it

    return tuple(specialize(size) if has_static_value(size) else SIZE_OF_ANY for size in shape)


def specialize(value: int) -> int:
    """An integer as a constant of the graph that is compiled. Dynamo keeps int() of one symbolic, the length of a range
    not."""
    return len(range(value))
