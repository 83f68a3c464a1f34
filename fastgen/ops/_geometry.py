"""The geometry of a convolution: its sizes, its opposite, and which implementation is the fastest for which tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgen._build import native
from fastgen.ops import _choices
from fastgen.ops._layout import Like
from fastgen.ops._memory import constant, remembered

Pair = tuple[int, int]  # height, width


class Geometry(NamedTuple):
    """output_padding is None unless transposed."""

    stride: Pair
    padding: Pair
    output_padding: Pair | None
    groups: int
    dilation: Pair
    reflect: bool = False

    @staticmethod
    def of(stride, padding, output_padding, groups, dilation, reflect=False) -> Geometry:
        """From arguments of a schema; an empty output_padding stands for None where an op serves both kinds."""
        return Geometry(
            tuple(stride), tuple(padding), tuple(output_padding) or None, groups, tuple(dilation), reflect
        )  # fmt: skip

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None

    def arguments(self) -> tuple:
        """Those of the ops that serve both kinds."""
        return self.stride, self.padding, self.output_padding or (), self.groups, self.dilation, self.reflect

    def fused(self) -> tuple[str, tuple]:
        """The op that serves this kind, with its arguments."""
        op = "conv_transpose2d_norm_act" if self.transposed else "conv2d_norm_act"
        third = self.reflect if self.output_padding is None else self.output_padding
        return op, (self.stride, self.padding, third, self.groups, self.dilation)

    def channels(self, weight: Sequence[int]) -> tuple[int, int]:
        """(input channels, output channels) that a weight of this shape stands for."""
        first, second = weight[0], weight[1] * self.groups
        return (first, second) if self.transposed else (second, first)

    @remembered
    def sizes(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """The output's shape, from those of x and the weight."""
        return (x[0], self.channels(weight)[1], self._size(x, weight, 0), self._size(x, weight, 1))

    def _size(self, x: Sequence[int], weight: Sequence[int], axis: int) -> int:
        reach = self.dilation[axis] * (weight[2 + axis] - 1) + 1
        if self.output_padding is None:
            return (x[2 + axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
        return (x[2 + axis] - 1) * self.stride[axis] - 2 * self.padding[axis] + reach + self.output_padding[axis]

    @remembered
    def inner(self, x: Sequence[int]) -> tuple[Geometry, tuple[int, ...]]:
        """The same without reflection, and the shape of what it reads of x: of x mirrored at its borders."""
        if not self.reflect:
            return self, tuple(x)
        height, width = self.padding
        return self._replace(padding=(0, 0), reflect=False), (*x[:2], x[2] + 2 * height, x[3] + 2 * width)

    @remembered
    def opposite(self, x: Sequence[int], weight: Sequence[int]) -> Geometry:
        """The convolution of the output's gradient that gives the gradient of x, of this shape; without reflection."""
        output_padding = None
        if not self.transposed:  # rows and columns of x that no output reads
            reach = [spread * (size - 1) + 1 for spread, size in zip(self.dilation, weight[2:], strict=True)]
            height, width = ((x[2 + i] + 2 * self.padding[i] - reach[i]) % self.stride[i] for i in range(2))
            output_padding = (height, width)
        return self._replace(output_padding=output_padding)

    @remembered
    def wins(self, x: Sequence[int], weight: Like, batch_stats: bool = False) -> str | None:
        """Which of fastgen's implementations is faster than PyTorch's convolution for x's shape, None if none is.

        As measured on this chip (`_choices`), else by the rule of `_wins`, where "own" is the one that auto takes.
        """
        return _choices.best("forward", self, x, weight, batch_stats, self._wins(x, weight, batch_stats))

    @remembered
    def wins_weight_grad(self, x: Sequence[int], weight: Like, channels_last: bool) -> str | None:
        """The same of the weight's gradient, where the images with more channels are `channels_last`."""
        guess = self._wins_weight_grad(x, weight, channels_last)
        return _choices.best("weight_grad", self, x, weight, channels_last, guess)

    @remembered
    def wins_input_grad(self, x: Sequence[int], weight: Like) -> str | None:
        """The same of x's gradient, which is the opposite convolution; by rule where that one's does."""
        if not self.has_opposite(x, weight.shape):
            return None
        inner, read = self.inner(x)
        guess = inner.opposite(read, weight.shape)._wins(self.sizes(x, weight.shape), weight, False)
        return _choices.best("input_grad", self, x, weight, False, guess)

    @remembered
    def has_opposite(self, x: Sequence[int], weight: Sequence[int]) -> bool:
        """Whether x's gradient is the opposite convolution: not with an output_padding of a stride or more."""
        inner, read = self.inner(x)
        return inner.opposite(read, weight).sizes(self.sizes(x, weight), weight)[2:] == read[2:]

    def _wins(self, x: Sequence[int], weight: Like, batch_stats: bool) -> bool:
        """Whether fastgen's own kernel is faster than PyTorch's on the CPU, by what was measured there (benchmarks/NOTES.md).

        It is where Winograd's algorithm pays, in transposed convolutions with four 2x2 phases, for images of one pixel, and to
        few output channels without statistics; without AVX-512 in 3x3 kernels to images of 8x8 and smaller, or with a stride
        of 2 and transposed or channels_last. In bfloat16 and float16, in which oneDNN multiplies, one pixel and few channels
        alone; and in bfloat16 for strides of 2 between many channels, where the processor multiplies pairs. Everywhere where
        PyTorch has no code for the dtype.
        """
        if weight.device.type == "cuda":
            return self._wins_on_gpu(weight)
        if not torch_multiplies(weight.dtype):
            return True
        channels, out_channels = self.channels(weight.shape)
        wide = min(channels, out_channels) >= 16 * self.groups
        exact = weight.dtype in (torch.float32, torch.float64)
        if self._one_pixel(x, weight):
            return (weight.channels_last or (wide and exact)) and (self.transposed or x[0] >= 32)
        if out_channels <= 4 and channels >= 16:
            return not batch_stats and self.groups == 1 and (exact or min(weight.shape[2:]) >= 4)
        if weight.dtype == torch.bfloat16 and self.stride == (2, 2):
            fewer, more = sorted((channels // self.groups, out_channels // self.groups))
            return fewer >= 128 and more >= 256 and _multiplies_bf16()
        four_by_two = self.transposed and self._four_by_two(weight)
        three_by_three = self._three_by_three(weight) and (
            self.sizes(x, weight.shape)[2] <= 8 or (self.stride == (2, 2) and (self.transposed or weight.channels_last))
        )
        return exact and wide and (four_by_two or three_by_three or self._winograd(x, weight, 256))

    def _wins_weight_grad(self, x: Sequence[int], weight: Like, channels_last: bool) -> bool:
        """The same of the weight's gradient: for Winograd's algorithm and for images of one pixel, in all dtypes; to few output
        channels with a stride of 1, and in float32 and float64, where the images with more channels are channels_last, for 4x4
        kernels from or to few channels in large batches, and where oneDNN has no code for that order, on images of 32x32 and
        larger with a stride of 2. Without AVX-512 in float32 for 3x3 kernels with that stride, in large batches that are
        channels_last or have many channels, and for images of 2x2 with any. On a GPU, where nothing was measured, cuDNN's."""
        if weight.device.type == "cuda":
            return False
        fewer, more = sorted(self.channels(weight.shape))
        if not torch_multiplies(weight.dtype):
            return True
        if more < 16 * self.groups:
            return False
        exact = weight.dtype in (torch.float32, torch.float64)
        if fewer <= 4:
            to_few = not self.transposed and weight.shape[0] == fewer and self.stride == (1, 1)
            n, _, height, width = x if self.transposed else self.sizes(x, weight.shape)
            large = channels_last and more >= 64 and n * height * width >= 16384
            return self.groups == 1 and (to_few or (exact and large and self._four_by_two(weight)))
        if fewer < 16 * self.groups:
            return False
        smaller = x if self.transposed else self.sizes(x, weight.shape)
        large = self.groups == 1 and min(weight.shape[2:]) >= 3 and min(smaller[2:]) >= 32
        if large and exact and channels_last and self.stride == (2, 2) and _no_more_than_avx2():
            return True
        if self._three_by_three(weight):
            n, _, height, width = self.sizes(x, weight.shape)
            lines, many, tiles = min(x[2], height), fewer >= 128, n * height * width >= 1024 and self.stride == (2, 2)
            if (many and lines <= 2) or ((many or channels_last) and lines >= 4 and tiles):
                return True
        return self._winograd(x, weight, 1024) or (self._one_pixel(x, weight) and x[0] >= 32)

    def _wins_on_gpu(self, weight: Like) -> bool:
        """A guess, where nothing was measured: cuDNN for strided convolutions and true float32; transposed convolutions, the
        input gradients of strided ones among them, by output phase on tensor cores."""
        return self.transposed and weight.dtype in (torch.bfloat16, torch.float16)

    def _one_pixel(self, x: Sequence[int], weight: Like) -> bool:
        """Whether the images have one pixel: x's when transposed, else the output's."""
        return tuple(x[2:] if self.transposed else self.sizes(x, weight.shape)[2:]) == (1, 1)

    def _four_by_two(self, weight: Like) -> bool:
        return tuple(weight.shape[2:]) == (4, 4) and self.stride == (2, 2)

    def _three_by_three(self, weight: Like) -> bool:
        """A 3x3 kernel with a stride of 1 or 2 in float32, where there is no AVX-512: measured there alone."""
        plain = self.stride in ((1, 1), (2, 2)) and (self.dilation, self.groups) == ((1, 1), 1)
        return plain and tuple(weight.shape[2:]) == (3, 3) and weight.dtype == torch.float32 and _no_more_than_avx2()

    def _winograd(self, x: Sequence[int], weight: Like, least: int) -> bool:
        """Whether Winograd's algorithm can run, on images of 8x8 and larger, with at least so many pixels in the output."""
        kernel, (n, _, height, width) = tuple(weight.shape[2:]), self.sizes(x, weight.shape)
        if self.groups != 1 or self.dilation != (1, 1):
            return False
        if self._four_by_two(weight):
            return n * height * width >= 1024
        return kernel == (3, 3) and self.stride == (1, 1) and height >= 8 and n * height * width >= least


@constant
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch's convolutions have instructions for a dtype on this CPU. Without, they take up to a hundred times as
    long as fastgen's, which multiply in float32."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


@constant
def _no_more_than_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


# Whether this processor has an instruction for pairs of bfloat16.
torch.library.define("fastgen::multiplies_bf16", "() -> bool")


@constant
def _multiplies_bf16() -> bool:
    return native.load() is None and torch.ops.fastgen.multiplies_bf16()
