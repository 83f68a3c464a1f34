"""Convolution, strided or transposed, with its epilogue: an implicit matrix product on tensor cores.

Rows are output pixels, columns are output channels, and the sum runs over taps and input channels. In a transposed
convolution, output pixels with the same (pixel + padding) mod stride (an output phase) use the same taps: each phase is
a separate product, so nothing is multiplied by the zeros between the pixels of the input. A strided convolution has one
phase.

The kernel adds the bias. Then it either normalizes with given statistics and activates, or stores partial statistics of
the batch, one part per tile, from the float32 sums, and leaves the rest to kernels/_epilogue.py. A product of few tiles
and a long sum is split along the sum (split-K) into float32 tensors, which the epilogue adds in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastgen.kernels import _tiles
from fastgen.kernels._activations import activate
from fastgen.kernels._epilogue import Epilogue, normalize, per_channel
from fastgen.kernels._geometry import Geometry, mirror, phase
from fastgen.kernels._launch import INTERPRETED, launch, multiprocessors, new_pair, program_id, strides, wide
from fastgen.kernels._layout import in_order, is_channels_last
from fastgen.kernels._statistics import Parts, statistics
from torch import Tensor


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

    channels, out_channels: per group. TH, TW: the distance between taps of a phase. FLAT: taps and channels are one
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

    # The input pixel advances by one (transposed) or by the stride per output pixel of a phase, and by a fixed step per
    # tap.
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
            tap_offset = tl.reshape((tap_h + a * TH) * wh + (tap_w + b * TW) * ww, (DEPTH, 1))
        else:
            tap_offset = (tap_h + a * TH) * wh + (tap_w + b * TW) * ww
        h = y[:, None] + a * STEP_H
        w = z[:, None] + b * STEP_W
        if REFLECT:
            h = mirror(h, height)
            w = mirror(w, width)
        in_image = valid[:, None] & inside[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixels = tl.load(from_x[:, None] + h * xh + w * xw + (channel * xc)[None, :], in_image, 0.0)
        taps = tl.load(
            from_weight[None, :] + (channel * wi)[:, None] + tap_offset, inside[:, None] & in_columns[None, :], 0.0
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
    if means is not None:  # partial statistics of the stored values
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


class Division(NamedTuple):
    """How the product is divided among programs."""

    tile: _tiles.Tile
    flat: bool
    row_tiles: int
    column_tiles: int
    steps: int  # of the sum
    splits: int


def divide(
    x: Tensor, weight: Tensor, out: Tensor, geometry: Geometry, channels_last: bool, fused: bool, measured: str
) -> Division:
    """fused: norm and activation are computed by the same kernel. measured: the str() of the fastest tile, if known."""
    channels, out_channels = x.shape[1] // geometry.groups, out.shape[1] // geometry.groups
    rows, products = out.shape[0] * geometry.per_phase(out.shape[2:]), geometry.phases * geometry.groups
    kind, chip = _tiles.kind_of(x, channels_last, channels), multiprocessors(x)
    tile = _tiles.choose_tile(kind, rows, out_channels, products, chip, measured)
    if tile.columns == 128 and fused:
        tile = _tiles.TILES[kind][1]  # 128 columns leave too few registers for the epilogue (sm_100)
    flat = _tiles.is_gathered(channels_last, channels) and channels < tile.depth
    row_tiles, column_tiles = triton.cdiv(rows, tile.rows), triton.cdiv(out_channels, tile.columns)
    taps = geometry.per_phase(weight.shape[2:])
    steps = triton.cdiv(taps * channels, tile.depth) if flat else taps * triton.cdiv(channels, tile.depth)
    splits = _tiles.splits_of(row_tiles * column_tiles * products, steps, chip)
    return Division(tile, flat, row_tiles, column_tiles, steps, splits)


def multiply(
    x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue, geometry: Geometry, division: Division,
    parts: Parts | None,
) -> Tensor:  # fmt: skip
    """Launches the product into `out` or, if it is split, into float32 tensors; returns the tensor written. parts:
    receives the partial statistics."""
    tile, flat, row_tiles, column_tiles, steps, splits = division
    target = out if splits == 1 else x.new_empty((splits, out.numel()), dtype=torch.float32)
    (_, _, height, width), (samples, _, out_height, out_width) = x.shape, out.shape
    tap_step_h, tap_step_w = geometry.tap_steps()
    launch(
        convolve, (row_tiles * column_tiles, geometry.phases * geometry.groups, splits), x, warps=tile.warps,
        stages=tile.stages, maxnreg=255,  # else ptxas may spill to keep two programs on a multiprocessor
        x=x, weight=weight, out=target, bias=epilogue.bias if splits == 1 else None, **epilogue.arguments(),
        **(parts._asdict() if parts else dict.fromkeys(Parts._fields)), samples=samples,
        channels=x.shape[1] // geometry.groups, out_channels=out.shape[1] // geometry.groups, height=height,
        width=width, out_height=out_height, out_width=out_width, **strides("x", x),
        **strides("w", weight, "iohw" if geometry.transposed else "oihw"), **strides("o", out), row_tiles=row_tiles,
        split_steps=triton.cdiv(steps, splits), split_size=out.numel(), **geometry.arguments(weight), TH=tap_step_h,
        TW=tap_step_w, GROUPS=geometry.groups, TRANSPOSED=geometry.transposed, FLAT=flat,
        NORM=epilogue.norm != "none", SPLIT=splits > 1,
        PRECISION="tf32" if _tiles.precision_of(x) == "tf32" else "ieee", INTERPRETED=INTERPRETED,
        WIDE=wide(x, weight, out, target), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
    )  # fmt: skip
    return target


def forward(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: Geometry, save: bool, tile: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the convolution before the epilogue if `save`, and mean and var of batch statistics; a result that is
    not needed is an empty tensor. tile: the str() of the fastest tile, if known."""
    channels_last = is_channels_last(x) or is_channels_last(weight)
    x, weight = in_order(x, channels_last), in_order(weight, True)  # the weight is read with its channels contiguous
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(geometry.output_shape(x, weight), dtype=x.dtype, device=x.device, memory_format=layout)
    unused = x.new_empty(0)
    if out.numel() == 0:
        return out, torch.empty_like(out) if save else unused, *epilogue.empty_stats(out)
    epilogue = epilogue.residual_like(out)
    fused = not save and not epilogue.batch_stats and epilogue.residual is None  # fusing more takes too many registers
    division = divide(x, weight, out, geometry, channels_last, fused, tile)
    if fused and division.splits == 1:
        multiply(x, weight, out, epilogue, geometry, division, None)
        return out, unused, *new_pair(x, 0)

    pre, parts = out, None
    if division.splits == 1 and epilogue.norm == "batch" and epilogue.batch_stats:
        parts = Parts.empty(x, geometry.phases * division.row_tiles, out.shape[1])
    bias = Epilogue(bias=epilogue.bias)
    target = multiply(x, weight, out, bias, geometry, division, parts)
    summands = target if division.splits > 1 else None
    if summands is not None and (save or epilogue.batch_stats):
        pre, summands = normalize(out, bias, summands=summands)[0], None
    if epilogue.batch_stats and parts is None:
        parts = statistics(pre, epilogue.stats_shape(pre))
    if epilogue.norm == "none" and epilogue.activation == "identity" and epilogue.residual is None and summands is None:
        return pre, pre.clone() if save else unused, *new_pair(x, 0)
    y, mean, var = normalize(pre, epilogue, parts, summands)
    return y, pre if save else unused, mean, var
