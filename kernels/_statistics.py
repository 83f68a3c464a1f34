"""Mean and variance of lines, from partial statistics that are merged in a fixed order.

They are float32: each lane of a tile keeps its own mean and squared deviations (Welford), then tiles and splits are
merged (Chan, Golub and LeVeque, 1983), so that results do not depend on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from fastgen.kernels._launch import launch, multiprocessors, new_pair, program_id, wide
from fastgen.kernels._layout import Lines, channel_lines, is_channels_last, line_base, line_step
from torch import Tensor

MAX_SPLITS = 64  # per line; every program of the second pass merges them all


@triton.jit
def merge_moments(means, m2s, counts, line, valid, lines, splits, SPLITS: tl.constexpr):
    """mean and biased variance of lines, from partial statistics (splits, lines) of counts (splits) values each."""
    part = tl.arange(0, SPLITS)
    inside = (part < splits)[:, None] & valid[None, :]
    at = part[:, None] * lines + line[None, :]
    count = tl.load(counts + part, part < splits, 0.0)
    total = tl.sum(count, 0)
    mean = tl.load(means + at, inside, 0.0)
    merged = tl.sum(mean * (count / total)[:, None], 0)
    deviation = mean - merged[None, :]
    m2 = tl.load(m2s + at, inside, 0.0) + deviation * deviation * count[:, None]
    return merged, tl.sum(m2, 0) / total


@triton.jit
def part_of(lines, length, chunk, splits, WIDE: tl.constexpr, LINES: tl.constexpr):
    """The program's part of its lines: the part's index, the lines, the mask of existing lines, the first value and the
    end."""
    program = program_id(WIDE)
    part = program % splits
    line = program // splits * LINES + tl.arange(0, LINES)
    return part, line, line < lines, part * chunk, tl.minimum(part * chunk + chunk, length)


@triton.jit
def moments(
    x, means, m2s, counts, lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, chunk,
    splits, WHOLE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Partial statistics (splits, lines): means and sums of squared deviations."""
    part, line, valid, start, stop = part_of(lines, length, chunk, splits, WIDE, LINES)
    base = x + line_base(line, per_sample, outer_line, inner_line)[:, None]
    count = tl.zeros((1, VALUES), tl.float32)
    mean = tl.zeros((LINES, VALUES), tl.float32)
    m2 = tl.zeros((LINES, VALUES), tl.float32)
    for first in range(start, stop, VALUES):
        k = first + tl.arange(0, VALUES)[None, :]
        inside = k < stop
        step = line_step(k, inner, outer_step, inner_step, WHOLE)
        value = tl.load(base + step, inside & valid[:, None], 0.0).to(tl.float32)
        count += inside.to(tl.float32)
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        m2 += delta * (value - mean)
    total = (stop - start).to(tl.float32)
    merged = tl.sum(mean * (count / total), 1)
    deviation = mean - merged[:, None]
    at = part * lines + line
    tl.store(means + at, merged, valid)
    tl.store(m2s + at, tl.sum(m2 + deviation * deviation * count, 1), valid)
    tl.store(counts + part, total, tl.program_id(0) < splits)


@triton.jit
def merge(
    means, m2s, counts, new_means, new_m2s, new_counts, lines, parts, chunk, splits, LINES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Makes one part of every `chunk` parts. A part may be empty."""
    merged_part, line, valid, start, stop = part_of(lines, parts, chunk, splits, False, LINES)
    count = tl.zeros((PARTS, 1), tl.float32)
    mean = tl.zeros((PARTS, LINES), tl.float32)
    m2 = tl.zeros((PARTS, LINES), tl.float32)
    for first in range(start, stop, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        inside = (part < stop) & valid[None, :]
        n = tl.load(counts + part, part < stop, 0.0)
        at = part * lines + line[None, :]
        delta = tl.load(means + at, inside, 0.0) - mean
        share = n / tl.maximum(count + n, 1.0)
        m2 += tl.load(m2s + at, inside, 0.0) + delta * delta * (count * share)
        mean += delta * share
        count += n
    total = tl.sum(tl.sum(count, 1), 0)
    merged = tl.sum(mean * (count / tl.maximum(total, 1.0)), 0)
    deviation = mean - merged[None, :]
    at = merged_part * lines + line
    tl.store(new_means + at, merged, valid)
    tl.store(new_m2s + at, tl.sum(m2 + deviation * deviation * count, 0), valid)
    tl.store(new_counts + merged_part, total, tl.program_id(0) < splits)


@triton.jit
def merge_sums(parts, line, valid, lines, splits, SPLITS: tl.constexpr):
    """The sums of lines from their parts (splits, lines)."""
    part = tl.arange(0, SPLITS)[:, None]
    return tl.sum(tl.load(parts + part * lines + line[None, :], (part < splits) & valid[None, :], 0.0), 0)


def split(lines: Lines, like: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    """(splits, chunk): the number of programs that share a line so that the chip is full, and the values per
    program."""
    groups = triton.cdiv(lines.lines, tile[0])
    splits = min(MAX_SPLITS, triton.cdiv(4 * multiprocessors(like), groups), triton.cdiv(lines.length, tile[1]))
    chunk = triton.cdiv(triton.cdiv(lines.length, max(1, splits)), tile[1]) * tile[1]
    return triton.cdiv(lines.length, chunk), chunk


class Parts(NamedTuple):
    """Partial statistics (splits, lines), of counts (splits) values each."""

    means: Tensor
    m2s: Tensor
    counts: Tensor

    @staticmethod
    def empty(like: Tensor, splits: int, lines: int) -> Parts:
        return Parts(*new_pair(like, splits, lines), new_pair(like, splits)[0])

    def fewer(self) -> Parts:
        """The same statistics in at most MAX_SPLITS parts."""
        parts, lines = self.means.shape
        if parts <= MAX_SPLITS:
            return self
        chunk = triton.cdiv(parts, MAX_SPLITS)
        merged = Parts.empty(self.means, triton.cdiv(parts, chunk), lines)
        splits = len(merged.counts)
        launch(
            merge, (triton.cdiv(lines, 64) * splits,), self.means, **self._asdict(), new_means=merged.means,
            new_m2s=merged.m2s, new_counts=merged.counts, lines=lines, parts=parts, chunk=chunk, splits=splits,
            LINES=64, PARTS=16,
        )  # fmt: skip
        return merged


def statistics(x: Tensor, shape: Sequence[int]) -> Parts:
    """The partial statistics of x (n, c, *). shape: (c,), or (n, groups) for groups of channels per sample."""
    lines = channel_lines(x, is_channels_last(x), len(shape) == 2, shape[-1])
    tile = lines.tile()
    splits, chunk = split(lines, x, tile)
    parts = Parts.empty(x, splits, lines.lines)
    launch(
        moments, (triton.cdiv(lines.lines, tile[0]) * splits,), x, x=x, **parts._asdict(), **lines.arguments(),
        chunk=chunk, splits=splits, WIDE=wide(x), LINES=tile[0], VALUES=tile[1],
    )  # fmt: skip
    return parts
