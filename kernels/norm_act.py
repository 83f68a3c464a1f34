"""activation(normalize(x) * weight + bias + residual): the statistics in one pass, the rest in another; backward in
two.

Statistics and sums are float32: each lane of a tile keeps its own mean and squared deviations (Welford), tiles and
splits are merged in a fixed order (Chan, Golub and LeVeque, 1983), so that results do not depend on the order in which
programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastgen.kernels._common import (
    Lines,
    activate,
    activate_grad,
    channel_lines,
    in_order,
    is_channels_last,
    launch,
    line_base,
    line_step,
    multiprocessors,
    one_line,
    pair,
    power_of_2,
    program_id,
    wide,
)
from torch import Tensor

MOST_SPLITS = 64  # of a line's values among programs; every program of the second pass merges them all


@triton.jit
def merge_moments(means, m2s, counts, line, valid, lines, splits, SPLITS: tl.constexpr):
    """mean and biased variance of lines from their parts (splits, lines), of counts (splits) values each."""
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
    """The program's part of its lines: its number, the lines, whether there are such, its first value and its end."""
    program = program_id(WIDE)
    part = program % splits
    line = program // splits * LINES + tl.arange(0, LINES)
    return part, line, line < lines, part * chunk, tl.minimum(part * chunk + chunk, length)


@triton.jit
def tile_of(
    lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The program's tile: its lines, whether there are such, where its values lie, whether there are such; is it the
    first?"""
    program = program_id(WIDE)
    tiles = tl.cdiv(length, VALUES)
    line = program // tiles * LINES + tl.arange(0, LINES)
    k = program % tiles * VALUES + tl.arange(0, VALUES)[None, :]
    step = line_step(k, inner, outer_step, inner_step, WHOLE)
    at = line_base(line, per_sample, outer_line, inner_line)[:, None] + step
    return line, line < lines, at, (line < lines)[:, None] & (k < length), program % tiles == 0


@triton.jit
def moments(
    x, means, m2s, counts, lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, chunk,
    splits, WHOLE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Parts (splits, lines) of the lines' means and sums of squared deviations."""
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
    means,
    m2s,
    counts,
    new_means,
    new_m2s,
    new_counts,
    lines,
    parts,
    chunk,
    splits,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Fewer parts of the same statistics: `chunk` parts become one. A part may count no values."""
    split_, line, valid, start, stop = part_of(lines, parts, chunk, splits, False, LINES)
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
    at = split_ * lines + line
    tl.store(new_means + at, merged, valid)
    tl.store(new_m2s + at, tl.sum(m2 + deviation * deviation * count, 0), valid)
    tl.store(new_counts + split_, total, tl.program_id(0) < splits)


@triton.jit
def per_channel(pointer, channel, valid, default: tl.constexpr):
    """A vector's values for channels; the default where there is no vector."""
    if pointer is None:
        values = tl.full(channel.shape, default, tl.float32)
    else:
        values = tl.load(pointer + channel, valid, 0.0).to(tl.float32)
    return values


@triton.jit
def apply(
    x, summands, summand_step, x_bias, out, residual, weight, bias, mean, var, means, m2s, counts, new_mean, new_var,
    eps, slope, channels, group, lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step,
    stat_lines, splits, SUM: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The second pass. With parts of statistics (means, m2s) their merge is stored in new_mean and new_var.

    SUM: x is the sum of `summands` tensors, each `summand_step` from the last, and of a bias for each channel.
    """
    line, valid, at, inside, is_first = tile_of(
        lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, WHOLE, WIDE, LINES, VALUES
    )
    source = x + at
    z = tl.load(source, inside, 0.0).to(tl.float32)
    channel = line % channels
    if SUM:
        for _ in range(1, summands):
            source += summand_step
            z += tl.load(source, inside, 0.0)
        z += per_channel(x_bias, channel, valid, 0.0)[:, None]
    if NORM:
        if means is not None:
            set_ = line // group  # the line's set of statistics: group channels share one
            center, variance = merge_moments(means, m2s, counts, set_, valid, stat_lines, splits, SPLITS)
            first = valid & is_first & (line % group == 0)
            tl.store(new_mean + set_, center, first)
            tl.store(new_var + set_, variance, first)
        else:
            center = per_channel(mean, channel, valid, 0.0)
            variance = per_channel(var, channel, valid, 1.0)
        rstd = 1 / tl.sqrt(variance + eps)
        gain = per_channel(weight, channel, valid, 1.0)
        shift = per_channel(bias, channel, valid, 0.0)
        z = (z - center[:, None]) * rstd[:, None] * gain[:, None] + shift[:, None]
    if residual is not None:
        z += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, activate(z, slope, ACTIVATION).to(out.dtype.element_ty), inside)


@triton.jit
def backward_z(
    grad_out, x, residual, at, inside, center, rstd, gain, shift, slope, NORM: tl.constexpr, ACTIVATION: tl.constexpr
):
    """The gradient before the activation, and the normalized x."""
    grad = tl.load(grad_out + at, inside, 0.0).to(tl.float32)
    normalized = tl.load(x + at, inside, 0.0).to(tl.float32)
    z = normalized
    if NORM:
        normalized = tl.where(inside, (normalized - center[:, None]) * rstd[:, None], 0.0)
        z = normalized * gain[:, None] + shift[:, None]
    if residual is not None:
        z += tl.load(residual + at, inside, 0.0).to(tl.float32)
    return activate_grad(grad, z, slope, ACTIVATION), normalized


@triton.jit
def backward_sums(
    grad_out, x, residual, weight, bias, mean, var, sums, dots, eps, slope, channels, group, lines, per_sample,
    outer_line, inner_line, length, inner, outer_step, inner_step, chunk, splits, PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Parts (splits, lines) of the sums of g and of g * normalized x, g the gradient before the activation."""
    part, line, valid, start, stop = part_of(lines, length, chunk, splits, WIDE, LINES)
    channel = line % channels
    set_ = line // group if PER_SAMPLE else channel
    center = tl.load(mean + set_, valid, 0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.load(var + set_, valid, 1.0).to(tl.float32) + eps)
    gain = per_channel(weight, channel, valid, 1.0)
    shift = per_channel(bias, channel, valid, 0.0)
    base = line_base(line, per_sample, outer_line, inner_line)[:, None]
    sum_ = tl.zeros((LINES, VALUES), tl.float32)
    dot = tl.zeros((LINES, VALUES), tl.float32)
    for first in range(start, stop, VALUES):
        k = first + tl.arange(0, VALUES)[None, :]
        at = base + line_step(k, inner, outer_step, inner_step, WHOLE)
        inside = valid[:, None] & (k < stop)
        g, normalized = backward_z(
            grad_out, x, residual, at, inside, center, rstd, gain, shift, slope, True, ACTIVATION
        )
        sum_ += g
        dot += g * normalized
    to = part * lines + line
    tl.store(sums + to, tl.sum(sum_, 1), valid)
    tl.store(dots + to, tl.sum(dot, 1), valid)


@triton.jit
def merge_sums(parts, line, valid, lines, splits, SPLITS: tl.constexpr):
    part = tl.arange(0, SPLITS)[:, None]
    return tl.sum(tl.load(parts + part * lines + line[None, :], (part < splits) & valid[None, :], 0.0), 0)


@triton.jit
def backward_apply(
    grad_out, x, residual, weight, bias, mean, var, sums, dots, grad_x, grad_residual, grad_weight, grad_bias, eps,
    slope, channels, group, lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, splits,
    NORM: tl.constexpr, PER_SAMPLE: tl.constexpr, BATCH_STATS: tl.constexpr, GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The second pass. GROUPED: sums and dots are those of gain * g over the values that share statistics, divided by
    their count; else they are parts of those of g over the line."""
    line, valid, at, inside, is_first = tile_of(
        lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, WHOLE, WIDE, LINES, VALUES
    )
    channel = line % channels
    center = tl.zeros((LINES,), tl.float32)
    rstd = center
    gain = center
    shift = center
    if NORM:
        set_ = line // group if PER_SAMPLE else channel
        center = tl.load(mean + set_, valid, 0.0).to(tl.float32)
        rstd = 1 / tl.sqrt(tl.load(var + set_, valid, 1.0).to(tl.float32) + eps)
        gain = per_channel(weight, channel, valid, 1.0)
        shift = per_channel(bias, channel, valid, 0.0)
    g, normalized = backward_z(grad_out, x, residual, at, inside, center, rstd, gain, shift, slope, NORM, ACTIVATION)
    if grad_residual is not None:
        tl.store(grad_residual + at, g.to(grad_residual.dtype.element_ty), inside)
    if NORM:
        if GROUPED:
            sum_ = tl.load(sums + line // group, valid, 0.0)
            dot = tl.load(dots + line // group, valid, 0.0)
        else:
            sum_ = merge_sums(sums, line, valid, lines, splits, SPLITS)
            dot = merge_sums(dots, line, valid, lines, splits, SPLITS)
            first = valid & is_first
            tl.store(grad_bias + line, sum_, first)
            tl.store(grad_weight + line, dot, first)
            sum_ *= gain / length
            dot *= gain / length
        g *= gain[:, None]
        if BATCH_STATS:
            g -= sum_[:, None] + normalized * dot[:, None]
        g *= rstd[:, None]
    tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), inside)


def split(lines: Lines, like: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    """(splits, chunk): into how many programs a line's values go, and how many values each of them takes, to fill the
    chip."""
    groups = triton.cdiv(lines.lines, tile[0])
    wanted = min(MOST_SPLITS, triton.cdiv(4 * multiprocessors(like), groups), triton.cdiv(lines.length, tile[1]))
    chunk = triton.cdiv(triton.cdiv(lines.length, max(1, wanted)), tile[1]) * tile[1]
    return triton.cdiv(lines.length, chunk), chunk


def name_of(activation: str) -> str:
    return "leaky_relu" if activation == "leaky_relu_" else activation


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class Parts(NamedTuple):
    """Parts (splits, lines) of statistics that `apply` merges, of counts (splits) values each."""

    means: Tensor
    m2s: Tensor
    counts: Tensor

    @staticmethod
    def empty(like: Tensor, splits: int, lines: int) -> Parts:
        return Parts(*pair(like, splits, lines), pair(like, splits)[0])

    def fewer(self) -> Parts:
        """At most MOST_SPLITS of them."""
        parts, lines = self.means.shape
        if parts <= MOST_SPLITS:
            return self
        chunk = triton.cdiv(parts, MOST_SPLITS)
        merged = Parts.empty(self.means, triton.cdiv(parts, chunk), lines)
        splits = len(merged.counts)
        launch(
            merge, (triton.cdiv(lines, 64) * splits,), self.means, **self._asdict(), new_means=merged.means,
            new_m2s=merged.m2s, new_counts=merged.counts, lines=lines, parts=parts, chunk=chunk, splits=splits,
            LINES=64, PARTS=16,
        )  # fmt: skip
        return merged


def statistics(x: Tensor, channels_last: bool, norm: str, num_groups: int) -> Parts:
    """Those of x (n, c, *), in that memory order."""
    per_sample = norm != "batch"
    stat = channel_lines(x, channels_last, per_sample, num_groups if norm == "group" else None)
    tile = stat.tile()
    splits, chunk = split(stat, x, tile)
    parts = Parts.empty(x, splits, stat.lines)
    launch(
        moments, (triton.cdiv(stat.lines, tile[0]) * splits,), x, x=x, **parts._asdict(), **stat.arguments(),
        chunk=chunk, splits=splits, WIDE=wide(x), LINES=tile[0], VALUES=tile[1],
    )  # fmt: skip
    return parts


def normalize(
    x, weight, bias, mean, var, residual, parts: Parts | None, norm, num_groups, eps, activation, slope, summed=None,
    x_bias=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The second pass over x; `parts` are of its statistics, unless mean and var are given.

    summed: tensors (summands, *) of x's memory order, whose sum with x_bias takes x's place.
    """
    out = torch.empty_like(x)
    per_sample = parts is not None and norm != "batch"
    c = x.shape[1]
    group = c // num_groups if norm == "group" else 1
    plain = norm == "none" and summed is None
    lines = one_line(x) if plain else channel_lines(x, is_channels_last(x), per_sample)
    sets = () if parts is None else (c,) if norm == "batch" else (x.shape[0], c // group)
    new_mean, new_var = pair(x, *(sets or (0,)))
    means, m2s, counts = (None, None, None) if parts is None else parts.fewer()
    tile = lines.tile()
    launch(
        apply, (triton.cdiv(lines.lines, tile[0]) * triton.cdiv(lines.length, tile[1]),), x,
        x=x if summed is None else summed, summands=1 if summed is None else len(summed), summand_step=x.numel(),
        x_bias=contiguous(x_bias), out=out, residual=residual, weight=contiguous(weight), bias=contiguous(bias),
        mean=contiguous(mean), var=contiguous(var), means=means, m2s=m2s, counts=counts, new_mean=new_mean,
        new_var=new_var, eps=eps, slope=slope, channels=c, group=group, **lines.arguments(),
        stat_lines=1 if means is None else means.shape[1], splits=1 if means is None else len(means),
        SUM=summed is not None, NORM=norm != "none", ACTIVATION=name_of(activation), WIDE=wide(x), LINES=tile[0],
        VALUES=tile[1], SPLITS=1 if means is None else power_of_2(len(means)),
    )  # fmt: skip
    return out, new_mean, new_var


def empty_moments(x: Tensor, norm: str, num_groups: int) -> tuple[Tensor, Tensor]:
    """The statistics of no values, as PyTorch has them: NaN."""
    shape = x.shape[1:2] if norm == "batch" else (x.shape[0], num_groups if norm == "group" else x.shape[1])
    nan = x.new_full(shape, float("nan"), dtype=torch.float32)
    return nan, nan.clone()


def forward(x, weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope):
    """The op fastgen::norm_act."""
    channels_last = is_channels_last(x)
    x = in_order(x, channels_last)
    batch_stats = norm != "none" and mean is None
    if x.numel() == 0:
        return torch.empty_like(x), *(empty_moments(x, norm, num_groups) if batch_stats else pair(x, 0))
    residual = None if residual is None else in_order(residual, channels_last)
    parts = statistics(x, channels_last, norm, num_groups) if batch_stats else None
    return normalize(x, weight, bias, mean, var, residual, parts, norm, num_groups, eps, activation, negative_slope)


def backward(
    grad_out, x, weight, bias, mean, var, residual, batch_stats, norm, num_groups, eps, activation, negative_slope
):
    """The op fastgen::norm_act_backward."""
    channels_last = is_channels_last(x)
    x, grad_out = in_order(x, channels_last), in_order(grad_out, channels_last)
    residual = None if residual is None else in_order(residual, channels_last)
    grad_x = torch.empty_like(x)
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(x)
    normalizes, c = norm != "none", x.shape[1]
    if x.numel() == 0:
        return grad_x, *(t.zero_() for t in pair(x, c if normalizes else 0)), grad_residual
    per_sample = normalizes and batch_stats and norm != "batch"
    group = c // num_groups if per_sample and norm == "group" else 1
    lines = channel_lines(x, channels_last, per_sample) if norm != "none" else one_line(x)
    tile = lines.tile()
    shared = dict(
        grad_out=grad_out, x=x, residual=residual, weight=contiguous(weight), bias=contiguous(bias),
        mean=contiguous(mean), var=contiguous(var), eps=eps, slope=negative_slope, channels=c, group=group,
        **lines.arguments(), PER_SAMPLE=per_sample, ACTIVATION=name_of(activation), WIDE=wide(x), LINES=tile[0],
        VALUES=tile[1],
    )  # fmt: skip
    sums = dots = None
    of_weight, of_bias = pair(x, lines.lines if normalizes else 0)
    splits, grouped = 1, False
    if normalizes:
        splits, chunk = split(lines, x, tile)
        sums, dots = pair(x, splits, lines.lines)
        grid = (triton.cdiv(lines.lines, tile[0]) * splits,)
        launch(backward_sums, grid, x, sums=sums, dots=dots, chunk=chunk, splits=splits, **shared)
        grouped = group > 1
        if grouped:  # small tensors: the sums over a group's channels, and over the samples
            of_bias, of_weight = sums.sum(0), dots.sum(0)
            gain = 1.0 if weight is None else weight.float()
            sums, dots = (
                (of.view(-1, c) * gain).view(-1, group).sum(1) / (group * lines.length) for of in (of_bias, of_weight)
            )
    launch(
        backward_apply, (triton.cdiv(lines.lines, tile[0]) * triton.cdiv(lines.length, tile[1]),), x, sums=sums,
        dots=dots, grad_x=grad_x, grad_residual=None if residual is None else grad_residual, grad_weight=of_weight,
        grad_bias=of_bias, splits=splits, NORM=normalizes, BATCH_STATS=batch_stats, GROUPED=grouped,
        SPLITS=power_of_2(splits), **shared,
    )  # fmt: skip
    if per_sample:
        of_weight, of_bias = (of.view(-1, c).sum(0) for of in (of_weight, of_bias))
    return grad_x, of_weight, of_bias, grad_residual
