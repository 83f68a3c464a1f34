"""Memory order: a tensor's two layouts, and its values as lines that are reduced together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import power_of_2
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    """x in one of the two memory orders; x itself if it already is."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class Lines(NamedTuple):
    """`lines` lines of `length` values each in a dense tensor. Value k of line i is at

    i // per_sample * outer_line + i % per_sample * inner_line + k // inner * outer_step + k % inner * inner_step.
    """

    lines: int
    per_sample: int
    outer_line: int
    inner_line: int
    length: int
    inner: int
    outer_step: int
    inner_step: int

    def arguments(self) -> dict[str, int | bool]:
        return {**self._asdict(), "WHOLE": self.inner == self.length}

    def tile(self, values: int = 2048) -> tuple[int, int]:
        """(lines, values per line) of a tile of this many values, with the long side along contiguous memory."""
        if self.inner_line == 1 and self.inner_step != 1:
            along = min(power_of_2(self.lines), 64)
            return along, min(power_of_2(self.length), values // along)
        along = min(power_of_2(self.length), values)
        return min(power_of_2(self.lines), values // along), along


def one_line(x: Tensor) -> Lines:
    """All of x as one line, for elementwise kernels."""
    return Lines(1, 1, 0, 0, x.numel(), x.numel(), 0, 1)


def channel_lines(x: Tensor, channels_last: bool, per_sample: bool, groups: int | None = None) -> Lines:
    """The lines of x (n, c, *): the values of a channel, or of one of `groups` groups of adjacent channels; per sample
    or over all samples."""
    n, c = x.shape[:2]
    s = x.numel() // max(1, n * c)
    groups = c if groups is None else groups
    width = c // groups
    if not per_sample:
        if channels_last or s == 1:
            return Lines(c, c, 0, 1, n * s, n * s, 0, c)
        return Lines(c, c, 0, s, n * s, s, c * s, 1)
    if not channels_last:
        return Lines(n * groups, groups, c * s, width * s, width * s, width * s, 0, 1)
    if width == 1:
        return Lines(n * c, c, c * s, 1, s, s, 0, c)
    return Lines(n * groups, groups, c * s, width, width * s, width, c, 1)


@triton.jit
def line_base(line, per_sample, outer_line, inner_line):
    """The position of each line's first value."""
    return line // per_sample * outer_line + line % per_sample * inner_line


@triton.jit
def line_step(k, inner, outer_step, inner_step, WHOLE: tl.constexpr):
    """The distance of each value of a line from the line's first one."""
    if WHOLE:
        return k * inner_step
    return k // inner * outer_step + k % inner * inner_step
