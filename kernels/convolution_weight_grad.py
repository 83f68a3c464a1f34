"""The gradient of a convolution's weight, strided or transposed: a matrix product on tensor cores whose sum runs over
pixels.

There are two images: x and the gradient of the output. The inner one (x of a transposed convolution, the gradient of a
strided one) is read at each of its pixels (i, j), the outer one at (i, j) * stride - padding + tap * dilation. Rows are
channels of the inner image, columns are taps and channels of the outer one; both kinds of weight have their dimensions
in this order.

Tiles are few and sums are long, so the sums are split (split-K) into float32 tensors, which are added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastgen.kernels import _tiles
from fastgen.kernels._geometry import Geometry, mirror
from fastgen.kernels._launch import INTERPRETED, launch, multiprocessors, power_of_2, strides, wide
from fastgen.kernels._layout import in_order, is_channels_last
from fastgen.kernels._statistics import merge_sums
from torch import Tensor

MAX_SPLITS = 128
FEW = 64  # fewer channels are flattened with the taps if loads are of single values anyway


@triton.jit
def correlate(
    inner, outer, out, rows, channels, pixels, inner_height, inner_width, height, width, xn, xc, xh, xw, yn, yc, yh, yw,
    wr, wc, wh, ww, chunk, split_size, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, REFLECT: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of one group: ROWS channels of `inner` by COLUMNS of `outer`, over `chunk` of the pixels, DEPTH at a time.

    rows, channels: per group, of inner and outer. height, width: of outer. A tile has one tap; FLAT: taps and channels
    are one dimension, for few channels.
    """
    if FLAT:
        column_tiles = tl.cdiv(KH * KW * channels, COLUMNS)
        column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
        channel = column % channels
        tap = (column // channels)[None, :]
        in_columns = column < KH * KW * channels
    else:
        tiles = tl.cdiv(channels, COLUMNS)
        column_tiles = KH * KW * tiles
        column = tl.program_id(0) % column_tiles
        channel = column % tiles * COLUMNS + tl.arange(0, COLUMNS)
        tap = column // tiles
        in_columns = channel < channels
    a = tap // KW
    b = tap % KW
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    row = tl.program_id(1) * rows + row
    from_channel = tl.program_id(1) * channels + channel
    split = tl.program_id(2)
    if WIDE:
        row = row.to(tl.int64)
        from_channel = from_channel.to(tl.int64)
        split = split.to(tl.int64)
    from_inner = inner + row * xc
    from_outer = outer + from_channel * yc
    start = split * chunk
    stop = tl.minimum(start + chunk, pixels)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, stop, DEPTH):
        pixel = first + tl.arange(0, DEPTH)
        valid = pixel < stop
        j = pixel % inner_width
        i = pixel // inner_width % inner_height
        sample = pixel // inner_width // inner_height
        h = (i * SH - PH)[:, None] + a * DH
        w = (j * SW - PW)[:, None] + b * DW
        if REFLECT:
            h = mirror(h, height)
            w = mirror(w, width)
        in_image = valid[:, None] & in_columns[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = (sample * xn + i * xh + j * xw)[None, :]
        left = tl.load(from_inner[:, None] + at, in_rows[:, None] & valid[None, :], 0.0)
        right = tl.load(from_outer[None, :] + (sample * yn)[:, None] + h * yh + w * yw, in_image, 0.0)
        if INTERPRETED:  # the interpreter multiplies the bits of bfloat16
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    to = out + split * split_size + (row * wr)[:, None] + (channel * wc)[None, :] + a * wh + b * ww
    tl.store(to, total.to(out.dtype.element_ty), in_rows[:, None] & in_columns[None, :])


@triton.jit
def add(parts, out, size, splits, SPLITS: tl.constexpr, VALUES: tl.constexpr):
    """The sum of the parts (splits, size), in float32 and in a fixed order."""
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    total = merge_sums(parts, at, at < size, size, splits, SPLITS)
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


def operands(grad: Tensor, x: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """(inner, outer), in one memory order."""
    channels_last = is_channels_last(x) or is_channels_last(grad)
    x, grad = in_order(x, channels_last), in_order(grad, channels_last)
    return (x, grad) if transposed else (grad, x)


def kind_of(inner: Tensor, outer: Tensor, groups: int) -> str:
    """The kind of _tiles.TILES for the product; vector loads need contiguous channels in both images."""
    adjacent = inner.stride(1) == outer.stride(1) == 1
    rows, channels = inner.shape[1] // groups, outer.shape[1] // groups
    return _tiles.kind_of(inner, adjacent and rows % 16 == 0, channels)


def weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int], reflect: bool, tile: str = "",
) -> Tensor:  # fmt: skip
    """The op fastgen::convolution_weight_grad; output_padding is empty for a strided convolution. tile: the str() of
    the fastest tile, if known."""
    geometry = Geometry(stride, padding, dilation, groups, bool(output_padding), output_padding, reflect)
    inner, outer = operands(grad, x, geometry.transposed)
    out = torch.empty_like(weight)
    if inner.numel() == 0:
        return out.zero_()
    n, _, inner_height, inner_width = inner.shape
    rows, channels = weight.shape[0] // groups, weight.shape[1]
    taps, pixels = math.prod(weight.shape[2:]), n * inner_height * inner_width
    kind, chip = kind_of(inner, outer, groups), multiprocessors(x)
    flat = kind in ("gathered", "ieee") and channels < FEW
    columns, products = (taps * channels, 1) if flat else (channels, taps)  # per group
    chosen = _tiles.choose_tile(kind, rows, columns, products * groups, chip, tile)
    tiles = products * triton.cdiv(rows, chosen.rows) * triton.cdiv(columns, chosen.columns)
    steps = triton.cdiv(pixels, chosen.depth)
    chunk = triton.cdiv(steps, _tiles.splits_of(tiles * groups, steps, chip, MAX_SPLITS)) * chosen.depth
    splits = triton.cdiv(pixels, chunk)
    target = out if splits == 1 else x.new_empty((splits, out.numel()), dtype=torch.float32)
    launch(
        correlate, (tiles, groups, splits), x, warps=chosen.warps, stages=chosen.stages,
        maxnreg=255,  # as in _convolution
        inner=inner, outer=outer, out=target, rows=rows, channels=channels, pixels=pixels, inner_height=inner_height,
        inner_width=inner_width, height=outer.shape[2], width=outer.shape[3], **strides("x", inner),
        **strides("y", outer), **strides("w", out, "rchw"), chunk=chunk, split_size=out.numel(),
        **geometry.arguments(weight), FLAT=flat, PRECISION="tf32" if _tiles.precision_of(x) == "tf32" else "ieee",
        INTERPRETED=INTERPRETED, WIDE=wide(inner, outer, target), ROWS=chosen.rows, COLUMNS=chosen.columns,
        DEPTH=chosen.depth,
    )  # fmt: skip
    if splits > 1:
        across = power_of_2(splits)
        values = 4096 // across
        launch(
            add, (triton.cdiv(out.numel(), values),), x, parts=target, out=out, size=out.numel(), splits=splits,
            SPLITS=across, VALUES=values,
        )  # fmt: skip
    return out
