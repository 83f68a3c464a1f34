"""Which convolutions fastgen's own kernels compute faster than PyTorch's, where nothing was measured on the chip at
hand.

Each rule was measured (benchmarks/NOTES.md). They are functions of the processor, so that tests ask for every kind of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastgen.ops._layout import Like
from fastgen.ops._processor import Processor

if TYPE_CHECKING:
    from fastgen.ops._geometry import Geometry

_EXACT = (torch.float32, torch.float64)


def forward(processor: Processor, geometry: Geometry, x: Sequence[int], weight: Like, batch_stats: bool) -> bool:
    """Whether fastgen's own kernel is faster than PyTorch's for x's shape.

    On the CPU it is where Winograd's algorithm pays, in transposed convolutions with four 2x2 phases, for images of one
    pixel, and to few output channels without statistics; without AVX-512 in 3x3 kernels to images of 8x8 and smaller,
    or with a stride of 2 and transposed or channels_last. In bfloat16 and float16, in which oneDNN multiplies, one
    pixel and few channels alone; and in bfloat16 for strides of 2 between many channels, where the processor multiplies
    pairs. Everywhere where PyTorch has no code for the dtype.
    """
    if weight.device.type == "cuda":
        return _on_gpu(geometry, weight)
    if not processor.torch_multiplies(weight.dtype):
        return True
    channels, out_channels = geometry.channels(weight.shape)
    wide = min(channels, out_channels) >= 16 * geometry.groups
    exact = weight.dtype in _EXACT
    if _one_pixel(geometry, x, weight):
        return (weight.channels_last or (wide and exact)) and (geometry.transposed or x[0] >= 32)
    if out_channels <= 4 and channels >= 16:
        return not batch_stats and geometry.groups == 1 and (exact or min(weight.shape[2:]) >= 4)
    if weight.dtype == torch.bfloat16 and geometry.stride == (2, 2):
        fewer, more = sorted((channels // geometry.groups, out_channels // geometry.groups))
        return fewer >= 128 and more >= 256 and processor.own_bf16
    four_by_two = geometry.transposed and _four_by_two(geometry, weight)
    three_by_three = _three_by_three(processor, geometry, weight) and (
        geometry.sizes(x, weight.shape)[2] <= 8
        or (geometry.stride == (2, 2) and (geometry.transposed or weight.channels_last))
    )
    return exact and wide and (four_by_two or three_by_three or _winograd(geometry, x, weight, 256))


def weight_grad(processor: Processor, geometry: Geometry, x: Sequence[int], weight: Like, channels_last: bool) -> bool:
    """The same of the weight's gradient, where the images with more channels are `channels_last`.

    On the CPU for Winograd's algorithm and for images of one pixel, in all dtypes; to few output channels with a stride
    of 1, and in float32 and float64, where the images with more channels are channels_last, for 4x4 kernels from or to
    few channels in large batches, and where oneDNN has no code for that order, on images of 32x32 and larger with a
    stride of 2. Without AVX-512 in float32 for 3x3 kernels with that stride, in large batches that are channels_last or
    have many channels, and for images of 2x2 with any. On a GPU, where nothing was measured, cuDNN's.
    """
    if weight.device.type == "cuda":
        return False
    if not processor.torch_multiplies(weight.dtype):
        return True
    fewer, more = sorted(geometry.channels(weight.shape))
    if more < 16 * geometry.groups:
        return False
    exact = weight.dtype in _EXACT
    smaller = x if geometry.transposed else geometry.sizes(x, weight.shape)
    if fewer <= 4:
        to_few = not geometry.transposed and weight.shape[0] == fewer and geometry.stride == (1, 1)
        n, _, height, width = smaller
        large = channels_last and more >= 64 and n * height * width >= 16384
        return geometry.groups == 1 and (to_few or (exact and large and _four_by_two(geometry, weight)))
    if fewer < 16 * geometry.groups:
        return False
    large = geometry.groups == 1 and min(weight.shape[2:]) >= 3 and min(smaller[2:]) >= 32
    if large and exact and channels_last and geometry.stride == (2, 2) and processor.vectors == "AVX2":
        return True
    if _three_by_three(processor, geometry, weight):
        n, _, height, width = geometry.sizes(x, weight.shape)
        lines, many = min(x[2], height), fewer >= 128
        tiles = n * height * width >= 1024 and geometry.stride == (2, 2)
        if (many and lines <= 2) or ((many or channels_last) and lines >= 4 and tiles):
            return True
    return _winograd(geometry, x, weight, 1024) or (_one_pixel(geometry, x, weight) and x[0] >= 32)


def torch_is_wrong(processor: Processor, geometry: Geometry, x: Sequence[int], weight: Like) -> bool:
    """Whether PyTorch's kernel may compute wrong numbers, read memory that was never written or end the process.

    oneDNN's for bfloat16 do so (PyTorch 2.13) where a stride along the width leaves images that are 1 to 3 wide: with
    AMX the convolution, and with it the gradient of a transposed one's x, which is such a convolution; with AVX-512 the
    weight's gradient. With AMX also where all that a strided convolution reads along an axis is padding.
    """
    if not processor.torch_bf16 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    narrow = x if geometry.transposed else geometry.sizes(x, weight.shape)
    if geometry.stride[1] > 1 and narrow[3] <= 3:
        return True
    return not geometry.transposed and not all(_reads(geometry, x, weight, axis) for axis in range(2))


def _reads(geometry: Geometry, x: Sequence[int], weight: Like, axis: int) -> bool:
    """Whether a strided convolution reads any of x's pixels along an axis, and not padding alone."""
    size, taps, positions = x[2 + axis], weight.shape[2 + axis], geometry.sizes(x, weight.shape)[2 + axis]
    firsts = (at * geometry.stride[axis] - geometry.padding[axis] for at in range(positions))
    return any(0 <= first + tap * geometry.dilation[axis] < size for first in firsts for tap in range(taps))


def _on_gpu(geometry: Geometry, weight: Like) -> bool:
    """A guess: cuDNN for strided convolutions and true float32; transposed convolutions, the input gradients of strided
    ones among them, by output phase on tensor cores."""
    return geometry.transposed and weight.dtype in (torch.bfloat16, torch.float16)


def _one_pixel(geometry: Geometry, x: Sequence[int], weight: Like) -> bool:
    """Whether the images have one pixel: x's when transposed, else the output's."""
    return tuple(x[2:] if geometry.transposed else geometry.sizes(x, weight.shape)[2:]) == (1, 1)


def _four_by_two(geometry: Geometry, weight: Like) -> bool:
    return tuple(weight.shape[2:]) == (4, 4) and geometry.stride == (2, 2)


def _three_by_three(processor: Processor, geometry: Geometry, weight: Like) -> bool:
    """A 3x3 kernel with a stride of 1 or 2 in float32, on a processor with AVX2 and no AVX-512: measured there
    alone."""
    plain = geometry.stride in ((1, 1), (2, 2)) and (geometry.dilation, geometry.groups) == ((1, 1), 1)
    return plain and tuple(weight.shape[2:]) == (3, 3) and weight.dtype == torch.float32 and processor.vectors == "AVX2"


def _winograd(geometry: Geometry, x: Sequence[int], weight: Like, least: int) -> bool:
    """Whether Winograd's algorithm can run, on images of 8x8 and larger, with at least so many pixels in the output."""
    kernel, (n, _, height, width) = tuple(weight.shape[2:]), geometry.sizes(x, weight.shape)
    if geometry.groups != 1 or geometry.dilation != (1, 1):
        return False
    if _four_by_two(geometry, weight):
        return n * height * width >= 1024
    return kernel == (3, 3) and geometry.stride == (1, 1) and height >= 8 and n * height * width >= least
