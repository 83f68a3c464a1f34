"""activation(normalize(x) * weight + bias + residual): one pass for the statistics, one for the rest; backward in two
passes. Sums are float32, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastgen.kernels._activations import activate_grad
from fastgen.kernels._epilogue import Epilogue, normalize, per_channel, tile_of
from fastgen.kernels._launch import launch, new_pair, power_of_2, wide
from fastgen.kernels._layout import channel_lines, in_order, is_channels_last, line_base, line_step, one_line
from fastgen.kernels._statistics import merge_sums, part_of, split, statistics
from torch import Tensor


@triton.jit
def backward_z(
    grad_out, x, residual, at, inside, center, rstd, gain, shift, slope, NORM: tl.constexpr, ACTIVATION: tl.constexpr
):
    """The gradient of the activation's input, and the normalized x."""
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
    grad_out, x, residual, norm_weight, norm_bias, mean, var, sums, dots, eps, slope, channels, group, lines,
    per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, chunk, splits, PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Partial sums (splits, lines) of g and of g * normalized x, where g is the gradient of the activation's input."""
    part, line, valid, start, stop = part_of(lines, length, chunk, splits, WIDE, LINES)
    channel = line % channels
    stats = line // group if PER_SAMPLE else channel
    center = tl.load(mean + stats, valid, 0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.load(var + stats, valid, 1.0).to(tl.float32) + eps)
    gain = per_channel(norm_weight, channel, valid, 1.0)
    shift = per_channel(norm_bias, channel, valid, 0.0)
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
def backward_apply(
    grad_out, x, residual, norm_weight, norm_bias, mean, var, sums, dots, grad_x, grad_residual, grad_weight, grad_bias,
    eps, slope, channels, group, lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step,
    splits, NORM: tl.constexpr, PER_SAMPLE: tl.constexpr, BATCH_STATS: tl.constexpr, GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, VALUES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The second pass. GROUPED: sums and dots are means of gain * g over the values that share statistics; else they
    are partial sums of g over each line."""
    line, valid, at, inside, is_first = tile_of(
        lines, per_sample, outer_line, inner_line, length, inner, outer_step, inner_step, WHOLE, WIDE, LINES, VALUES
    )
    channel = line % channels
    center = tl.zeros((LINES,), tl.float32)
    rstd = center
    gain = center
    shift = center
    if NORM:
        stats = line // group if PER_SAMPLE else channel
        center = tl.load(mean + stats, valid, 0.0).to(tl.float32)
        rstd = 1 / tl.sqrt(tl.load(var + stats, valid, 1.0).to(tl.float32) + eps)
        gain = per_channel(norm_weight, channel, valid, 1.0)
        shift = per_channel(norm_bias, channel, valid, 0.0)
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


def forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The op fastgen::norm_act."""
    x = in_order(x, is_channels_last(x))
    epilogue = Epilogue.of(*arguments).residual_like(x)
    if x.numel() == 0:
        return torch.empty_like(x), *epilogue.empty_stats(x)
    return normalize(x, epilogue, statistics(x, epilogue.stats_shape(x)) if epilogue.batch_stats else None)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    residual: Tensor | None, batch_stats: bool, *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op fastgen::norm_act_backward."""
    channels_last = is_channels_last(x)
    x, grad_out = in_order(x, channels_last), in_order(grad_out, channels_last)
    epilogue = Epilogue.of(weight, bias, mean, var, residual, *options).residual_like(x)
    grad_x = torch.empty_like(x)
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(x)
    normalizes, c = epilogue.norm != "none", x.shape[1]
    if x.numel() == 0:
        return grad_x, *(t.zero_() for t in new_pair(x, c if normalizes else 0)), grad_residual
    per_sample = normalizes and batch_stats and epilogue.norm != "batch"
    group = c // epilogue.num_groups if per_sample and epilogue.norm == "group" else 1
    lines = channel_lines(x, channels_last, per_sample) if normalizes else one_line(x)
    tile = lines.tile()
    shared = dict(
        grad_out=grad_out, x=x, residual=epilogue.residual, **epilogue.arguments(), channels=c, group=group,
        **lines.arguments(), PER_SAMPLE=per_sample, WIDE=wide(x), LINES=tile[0], VALUES=tile[1],
    )  # fmt: skip
    sums = dots = None
    grad_weight, grad_bias = new_pair(x, lines.lines if normalizes else 0)
    splits = 1
    if normalizes:
        splits, chunk = split(lines, x, tile)
        sums, dots = new_pair(x, splits, lines.lines)
        grid = (triton.cdiv(lines.lines, tile[0]) * splits,)
        launch(backward_sums, grid, x, sums=sums, dots=dots, chunk=chunk, splits=splits, **shared)
        if group > 1:  # small tensors: sums over the channels of a group, or over the samples
            grad_bias, grad_weight = sums.sum(0), dots.sum(0)
            gain = 1.0 if weight is None else weight.float()
            sums, dots = (
                (t.view(-1, c) * gain).view(-1, group).sum(1) / (group * lines.length) for t in (grad_bias, grad_weight)
            )
    launch(
        backward_apply, (triton.cdiv(lines.lines, tile[0]) * triton.cdiv(lines.length, tile[1]),), x, sums=sums,
        dots=dots, grad_x=grad_x, grad_residual=None if residual is None else grad_residual, grad_weight=grad_weight,
        grad_bias=grad_bias, splits=splits, NORM=normalizes, BATCH_STATS=batch_stats, GROUPED=group > 1,
        SPLITS=power_of_2(splits), **shared,
    )  # fmt: skip
    if per_sample:
        grad_weight, grad_bias = (t.view(-1, c).sum(0) for t in (grad_weight, grad_bias))
    return grad_x, grad_weight, grad_bias, grad_residual
