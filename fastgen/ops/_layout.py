"""Memory formats, accumulation dtypes, and the properties of a tensor that decide which kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# csrc/ops has the same rules.


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, H, W) is channels_last in memory; a tensor that is in both formats counts as contiguous."""
    if (
        x.dim() != 4 or x.stride(1) != 1
    ):  # a branch, since in a compiled graph the strides may be symbolic but the answer must not be
        return False
    return not x.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are computed and its statistics are returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class TensorSpec(NamedTuple):
    """The properties of a tensor that decide which kernel runs."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool


def spec_of(x: Tensor) -> TensorSpec:
    return TensorSpec(x.shape, x.dtype, x.device, is_channels_last(x))


SIZE_OF_ANY = 32


def static_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that kernels are chosen for. In a graph compiled or exported with dynamic sizes, 32 replaces each
    dynamic size: the choice then holds for all sizes and adds no guard."""
    if not torch.compiler.is_compiling():
        return tuple(shape)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import, and compilation has it

    return tuple(specialize(size) if has_static_value(size) else SIZE_OF_ANY for size in shape)


def specialize(value: int) -> int:
    """An integer as a constant of the graph being compiled. Dynamo keeps int(n) symbolic, but not the length of a
    range."""
    return len(range(value))
