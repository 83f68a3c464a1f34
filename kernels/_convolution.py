"""Convolution, strided or transposed, with what follows it: an implicit matrix product on tensor cores.

Rows are output pixels, columns output channels, the sum runs over taps and input channels. The pixels of a transposed
convolution that share (pixel + padding) mod stride, an output phase, share their taps: each phase is a product of its
own, and nothing is multiplied by the zeros between the pixels of its input. A strided convolution has one phase.

The epilogue adds the bias and then either normalizes with given statistics and activates, or leaves that to
kernels/norm_act.py and stores parts of the batch's statistics, one a tile, from the float32 sums. Products of few tiles
and long sums are split along the sum (split-K) into float32 tensors that norm_act's second pass adds in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastgen.kernels._common import (
    INTERPRETED,
    activate,
    in_order,
    is_channels_last,
    launch,
    multiprocessors,
    pair,
    program_id,
    wide,
)
from fastgen.kernels.norm_act import Parts, contiguous, empty_moments, name_of, normalize, per_channel, statistics
from torch import Tensor


@triton.jit
def phase(
    q, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    TAP_STEP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Along one dimension: the phase's first output pixel, how many it has of `size`, the input pixel that its first
    tap reads for the first of them, its first tap and how many taps, each TAP_STEP from the last."""
    if not TRANSPOSED:
        return q, size, q - PADDING, q, q + KERNEL
    first = (q + (STRIDE - PADDING % STRIDE) % STRIDE) % STRIDE  # first + PADDING = q mod STRIDE
    tap = q * 0 + KERNEL
    for j in tl.static_range(TAP_STEP):  # a tap t reads input pixels where t * DILATION = q mod STRIDE
        tap = tl.where((q + j * DILATION * (STRIDE - 1)) % STRIDE == 0, tl.minimum(tap, j), tap)
    taps = tl.maximum(KERNEL - tap + TAP_STEP - 1, 0) // TAP_STEP
    return (
        first,
        tl.maximum(size - first + STRIDE - 1, 0) // STRIDE,
        (first + PADDING - tap * DILATION) // STRIDE,
        tap,
        taps,
    )


@triton.jit
def mirror(i, size):
    """The pixel that reflection padding shows at i, less than `size` beyond either border."""
    return size - 1 - tl.abs(size - 1 - tl.abs(i))


@triton.jit
def convolve(
    x, weight, out, bias, norm_weight, norm_bias, mean, var, means, m2s, counts, eps, slope, samples, channels,
    out_channels, height, width, out_height, out_width, xn, xc, xh, xw, wi, wo, wh, ww, on, oc, oh, ow, row_tiles,
    split_steps, split_size, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, GROUPS: tl.constexpr,
    TRANSPOSED: tl.constexpr, REFLECT: tl.constexpr, FLAT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of one phase and group: ROWS output pixels by COLUMNS output channels, DEPTH of the sum at a time.

    channels, out_channels: of a group. TH, TW: from one tap of a phase to the next. FLAT: taps and channels are one
    dimension, for few channels.
    """
    column_tiles = tl.cdiv(out_channels, COLUMNS)
    row_tile = program_id(WIDE) // column_tiles
    column = program_id(WIDE) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1) % GROUPS
    q = tl.program_id(1) // GROUPS
    group = group.to(tl.int64) if WIDE else group
    first_h, rows, origin_h, tap_h, taps_h = phase(q // SW, out_height, KH, SH, PH, DH, TH, TRANSPOSED)
    first_w, columns, origin_w, tap_w, taps_w = phase(q % SW, out_width, KW, SW, PW, DW, TW, TRANSPOSED)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    sample = row // tl.maximum(rows * columns, 1)
    pixel = row % tl.maximum(rows * columns, 1)
    i = pixel // tl.maximum(columns, 1)
    j = pixel % tl.maximum(columns, 1)
    valid = (sample < samples) & (rows * columns > 0)
    in_columns = column < out_channels

    # Input pixels: one further for each output pixel of a phase, or a stride; and a fixed step from tap to tap.
    y = origin_h + (i if TRANSPOSED else i * SH)
    z = origin_w + (j if TRANSPOSED else j * SW)
    STEP_H: tl.constexpr = -(TH * DH // SH) if TRANSPOSED else DH
    STEP_W: tl.constexpr = -(TW * DW // SW) if TRANSPOSED else DW
    from_x = x + sample * xn + group * channels * xc
    from_weight = weight + group * (channels * wi if TRANSPOSED else out_channels * wo) + column * wo

    blocks = tl.cdiv(channels, DEPTH)
    steps = tl.cdiv(taps_h * taps_w * channels, DEPTH) if FLAT else taps_h * taps_w * blocks
    start = 0
    if SPLIT:
        start = tl.program_id(2) * split_steps
        steps = tl.minimum(steps, start + split_steps)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(start, steps):
        if FLAT:
            k = step * DEPTH + tl.arange(0, DEPTH)
            channel = k % channels
            tap = (k // channels)[None, :]
            inside = k < taps_h * taps_w * channels
        else:
            channel = step % blocks * DEPTH + tl.arange(0, DEPTH)
            tap = step // blocks
            inside = channel < channels
        channel = channel.to(tl.int64) if WIDE else channel
        a = tap // taps_w
        b = tap % taps_w
        if FLAT:
            of_tap = tl.reshape((tap_h + a * TH) * wh + (tap_w + b * TW) * ww, (DEPTH, 1))
        else:
            of_tap = (tap_h + a * TH) * wh + (tap_w + b * TW) * ww
        h = y[:, None] + a * STEP_H
        w = z[:, None] + b * STEP_W
        if REFLECT:
            h = mirror(h, height)
            w = mirror(w, width)
        seen = valid[:, None] & inside[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixels = tl.load(from_x[:, None] + h * xh + w * xw + (channel * xc)[None, :], seen, 0.0)
        taps = tl.load(
            from_weight[None, :] + (channel * wi)[:, None] + of_tap, inside[:, None] & in_columns[None, :], 0.0
        )
        if INTERPRETED:  # the interpreter multiplies the bits of bfloat16
            pixels = pixels.to(tl.float32)
            taps = taps.to(tl.float32)
        total = tl.dot(pixels, taps, total, input_precision=PRECISION)

    to_h = first_h + (i * SH if TRANSPOSED else i)
    to_w = first_w + (j * SW if TRANSPOSED else j)
    at = (sample * on + to_h * oh + to_w * ow)[:, None] + ((group * out_channels + column) * oc)[None, :]
    inside = valid[:, None] & in_columns[None, :]
    channel = group * out_channels + column
    if SPLIT:
        out += tl.program_id(2).to(tl.int64) * split_size
    elif not NORM:
        total += per_channel(bias, channel, in_columns, 0.0)[None, :]
    if means is not None:  # parts of the statistics of what is stored
        count = tl.sum(valid.to(tl.float32), 0)
        center = tl.sum(tl.where(inside, total, 0.0), 0) / tl.maximum(count, 1.0)
        deviation = tl.where(inside, total - center[None, :], 0.0)
        part = q * row_tiles + row_tile
        tl.store(means + part * out_channels * GROUPS + channel, center, in_columns)
        tl.store(m2s + part * out_channels * GROUPS + channel, tl.sum(deviation * deviation, 0), in_columns)
        tl.store(counts + part, count, (group == 0) & (tl.program_id(0) % column_tiles == 0))
    if NORM:
        rstd = 1 / tl.sqrt(per_channel(var, channel, in_columns, 1.0) + eps)
        gain = per_channel(norm_weight, channel, in_columns, 1.0) * rstd
        center = per_channel(mean, channel, in_columns, 0.0) - per_channel(bias, channel, in_columns, 0.0)
        shift = per_channel(norm_bias, channel, in_columns, 0.0) - center * gain
        total = total * gain[None, :] + shift[None, :]
    tl.store(out + at, activate(total, slope, ACTIVATION).to(out.dtype.element_ty), inside)


class Tile(NamedTuple):
    """A configuration: rows, columns and depth of a program's product, warps, and stages of the loads' pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


# All configurations there are, larger ones first, made for registers and shared memory alone; fastgen.tune measures
# them. "gathered": tensor cores, with loads of one value at a time (channels apart in memory, or no multiple of 16 of
# them).
TILES = {
    "16 bits": (
        Tile(128, 128, 32, 8, 4),
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 32, 64, 4, 3),
        Tile(128, 16, 64, 4, 3),
        Tile(16, 64, 128, 4, 3),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(128, 32, 32, 8, 3),
        Tile(128, 16, 32, 4, 3),
        Tile(16, 64, 64, 4, 3),
    ),
    "gathered": (Tile(64, 64, 32, 8, 3), Tile(64, 16, 32, 4, 3), Tile(16, 64, 32, 4, 3)),
    "ieee": (Tile(64, 64, 16, 8, 2), Tile(64, 16, 16, 4, 2), Tile(16, 64, 16, 4, 2)),
}


def precision_of(x: Tensor) -> str:
    """float32 is multiplied as torch.backends.cudnn has it for convolutions."""
    if x.dtype != torch.float32:
        return "16 bits"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def kind_of(x: Tensor, channels_last: bool, channels: int) -> str:
    """Which of TILES an input can have, of so many channels in a group."""
    precision = precision_of(x)
    return "gathered" if precision != "ieee" and _is_gathered(channels_last, channels) else precision


def _is_gathered(channels_last: bool, channels: int) -> bool:
    return not channels_last or channels % 16 != 0


def choose_tile(kind: str, rows: int, columns: int, products: int, programs: int, measured: str = "") -> Tile:
    """For `products` products of this size on a chip that runs so many programs at a time: the tile that was measured
    fastest, by its str(), if it is of this kind, else the largest that fills the chip."""
    tiles = TILES[kind]
    for tile in tiles:
        if str(tile) == measured:
            return tile
    width = min(
        (tile.columns for tile in tiles if tile.columns >= columns), default=max(tile.columns for tile in tiles)
    )
    fitting = [tile for tile in tiles if tile.rows > 16 and (tile.columns == width or 64 <= tile.columns < width)]
    if rows <= 32:
        return tiles[-1]
    for tile in fitting:
        if products * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= programs:
            return tile
    return fitting[-1]


def splits_of(programs: int, steps: int, wanted: int, most: int = 32) -> int:
    """Into how many parts the sum goes: as many as fill the chip, of at least 4 steps each."""
    return max(1, min(wanted // max(1, programs), steps // 4, most))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    mean: Tensor | None, var: Tensor | None, residual: Tensor | None, norm: str, num_groups: int, eps: float,
    activation: str, slope: float, stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int] | None,
    groups: int, dilation: Sequence[int], reflect: bool, save: bool, measured: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The ops fastgen::conv_transpose2d_norm_act (with output_padding) and fastgen::conv2d_norm_act.

    measured: the fastest tile's str(), if it is known.
    """
    transposed = output_padding is not None
    channels_last = is_channels_last(x) or is_channels_last(weight)
    x, weight = in_order(x, channels_last), in_order(weight, True)  # contiguous weights are packed: channels together
    n, channels, height, width = x.shape
    kernel = weight.shape[2:]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if output_padding is not None:
        out_channels = weight.shape[1] * groups
        sizes = [(x.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach[i] + output_padding[i] for i in (0, 1)]
    else:
        out_channels = weight.shape[0]
        sizes = [(x.shape[2 + i] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((n, out_channels, *sizes), dtype=x.dtype, device=x.device, memory_format=layout)
    batch_stats = norm != "none" and mean is None
    nothing = x.new_empty(0)
    if out.numel() == 0:
        moments = empty_moments(out, norm, num_groups) if batch_stats else pair(x, 0)
        return out, torch.empty_like(out) if save else nothing, *moments
    residual = None if residual is None else in_order(residual, is_channels_last(out))

    phases = stride[0] * stride[1] if transposed else 1
    in_group, out_group = channels // groups, out_channels // groups
    rows = n * math.prod(
        triton.cdiv(size, step) if transposed else size for size, step in zip(sizes, stride, strict=True)
    )
    precision = precision_of(x)
    chip = multiprocessors(x)
    kind = kind_of(x, channels_last, in_group)
    tile = choose_tile(kind, rows, out_group, phases * groups, chip, measured)
    if tile.columns == 128 and not (save or batch_stats) and residual is None:
        tile = TILES[kind][1]  # the epilogue's own values do not fit into the registers beside 128 columns (sm_100)
    flat = _is_gathered(channels_last, in_group) and in_group < tile.depth
    row_tiles, column_tiles = triton.cdiv(rows, tile.rows), triton.cdiv(out_group, tile.columns)
    taps = math.prod(triton.cdiv(k, s) if transposed else k for k, s in zip(kernel, stride, strict=True))
    steps = triton.cdiv(taps * in_group, tile.depth) if flat else taps * triton.cdiv(in_group, tile.depth)
    splits = splits_of(row_tiles * column_tiles * phases * groups, steps, chip)

    in_epilogue = splits == 1 and not save and not batch_stats and residual is None  # for that, registers are short
    parts = (
        Parts.empty(x, phases * row_tiles, out_channels) if norm == "batch" and batch_stats and splits == 1 else None
    )
    target = out if splits == 1 else x.new_empty((splits, out.numel()), dtype=torch.float32)
    tap_step = [s // math.gcd(s, d) if transposed else 1 for s, d in zip(stride, dilation, strict=True)]
    (i_axis, o_axis) = (0, 1) if transposed else (1, 0)
    launch(
        convolve, (row_tiles * column_tiles, phases * groups, splits), x, warps=tile.warps, stages=tile.stages,
        maxnreg=255,  # else ptxas may spill to keep two programs on a multiprocessor
        x=x,
        weight=weight, out=target, bias=contiguous(bias) if splits == 1 else None,
        norm_weight=contiguous(norm_weight) if in_epilogue else None,
        norm_bias=contiguous(norm_bias) if in_epilogue else None, mean=contiguous(mean) if in_epilogue else None,
        var=contiguous(var) if in_epilogue else None,
        **(parts._asdict() if parts else dict.fromkeys(Parts._fields)), eps=eps, slope=slope, samples=n,
        channels=in_group, out_channels=out_group, height=height, width=width, out_height=sizes[0], out_width=sizes[1],
        **dict(zip(("xn", "xc", "xh", "xw"), x.stride(), strict=True)), wi=weight.stride(i_axis),
        wo=weight.stride(o_axis), wh=weight.stride(2), ww=weight.stride(3), **dict(zip(("on", "oc", "oh", "ow"),
        out.stride(), strict=True)), row_tiles=row_tiles, split_steps=triton.cdiv(steps, splits),
        split_size=out.numel(), KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1],
        DH=dilation[0], DW=dilation[1], TH=tap_step[0], TW=tap_step[1], GROUPS=groups, TRANSPOSED=transposed,
        REFLECT=reflect, FLAT=flat, NORM=in_epilogue and norm != "none",
        ACTIVATION=name_of(activation) if in_epilogue else "identity", SPLIT=splits > 1,
        PRECISION="tf32" if precision == "tf32" else "ieee", INTERPRETED=INTERPRETED, WIDE=wide(x, weight, out, target),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
    )  # fmt: skip
    if in_epilogue:
        return out, nothing, *pair(x, 0)
    tail = (norm_weight, norm_bias, mean, var, residual)
    if splits == 1:
        pre, summed, of_sum = out, None, None
    else:
        pre, summed, of_sum = out, target, bias
        if save or batch_stats:
            pre = normalize(out, *(None,) * 6, "none", 0, 0.0, "identity", 0.0, target, bias)[0]
            summed = of_sum = None
    if batch_stats and parts is None:
        parts = statistics(pre, is_channels_last(pre), norm, num_groups)
    if norm == "none" and activation == "identity" and residual is None and summed is None:
        return pre, pre.clone() if save else nothing, *pair(x, 0)
    y, new_mean, new_var = normalize(pre, *tail, parts, norm, num_groups, eps, activation, slope, summed, of_sum)
    return y, pre if save else nothing, new_mean, new_var
