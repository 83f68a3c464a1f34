"""Which convolutions fastgen's kernels compute faster than PyTorch's, where nothing was measured on this chip.

In each list of rules the first rule that applies decides. A rule names the section of benchmarks/NOTES.md with the
measurements that it is based on. The processor is an argument of the rules, so that tests can cover every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from fastgen.ops._geometry import HW, Geometry
from fastgen.ops._processor import WINOGRAD, Processor, algorithm


class Convolution(NamedTuple):
    """A convolution to decide about. Its methods are the properties that the rules depend on."""

    processor: Processor
    geometry: Geometry
    input: Sequence[int]  # (n, c, h, w)
    weight: Sequence[int]  # its shape
    dtype: torch.dtype
    device: str  # a type: "cpu", "cuda"
    channels_last: bool  # of the weight; for the weight's gradient, of the side (input or output) with more channels
    batch_stats: bool = False  # a norm with batch statistics follows
    weight_gradient: bool = False

    @property
    def output(self) -> Sequence[int]:
        return self.geometry.sizes(self.input, self.weight)

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels."""
        return self.geometry.channels(self.weight)

    @property
    def kernel(self) -> HW:
        return self.weight[2], self.weight[3]

    @property
    def smaller(self) -> Sequence[int]:
        """The shape of the side with fewer pixels if strided: the input of a transposed convolution, else the
        output."""
        return self.input if self.geometry.transposed else self.output

    def is_exact(self) -> bool:
        return self.dtype in (torch.float32, torch.float64)

    def is_wide(self) -> bool:
        """At least 16 input and output channels per group."""
        return min(self.channels) >= 16 * self.geometry.groups

    def is_one_pixel(self) -> bool:
        return tuple(self.smaller[2:]) == (1, 1)

    def is_to_few_channels(self) -> bool:
        return self.channels[1] <= 4 and self.channels[0] >= 16

    def is_four_by_two(self) -> bool:
        """A 4x4 kernel with a stride of 2."""
        return self.kernel == (4, 4) and self.geometry.stride == (2, 2)

    def is_three_by_three(self) -> bool:
        """A 3x3 kernel with a stride of 1 or 2 in float32, on a processor with AVX2 and no AVX-512: only these were
        measured."""
        plain = self.geometry.stride in ((1, 1), (2, 2)) and (self.geometry.dilation, self.geometry.groups) == (
            (1, 1),
            1,
        )
        avx2 = self.dtype == torch.float32 and self.processor.vectors == "AVX2"
        return plain and self.kernel == (3, 3) and avx2

    def is_winograd(self) -> bool:
        """fastgen's kernel would use Winograd's algorithm, which pays except for 3x3 kernels with a stride of 2."""
        if self.kernel == (3, 3) and self.geometry.stride == (2, 2):
            return False
        return algorithm(self.geometry, self.input, self.weight, self.dtype, self.weight_gradient) in WINOGRAD

    def multiplies_tiles(self) -> bool:
        """fastgen's kernel would multiply tiles of bfloat16, with 16 channels or more."""
        plain = self.geometry.groups == 1 and self.device == "cpu" and self.dtype == torch.bfloat16
        return plain and self.processor.fastgen_amx and self.is_wide()

    def pixels(self) -> int:
        """The number of output pixels in the whole batch."""
        return self.output[0] * self.output[2] * self.output[3]


class Rule(NamedTuple):
    """One line of a list of rules."""

    name: str
    applies: Callable[[Convolution], bool]
    fastgen: bool  # fastgen's kernel computes it, else PyTorch's
    reason: str
    notes: str  # a heading of benchmarks/NOTES.md


def decide(rules: Iterable[Rule], convolution: Convolution) -> Rule:
    return next(rule for rule in rules if rule.applies(convolution))


def torch_is_wrong(conv: Convolution) -> bool:
    """Whether PyTorch's kernel may compute wrong numbers, read memory that was never written or end the process.

    oneDNN's bfloat16 kernels do so (PyTorch 2.13) where a stride along the width leaves images that are 1 to 3 pixels
    wide. With AMX this affects the convolution, and therefore also the gradient of a transposed convolution's input;
    with AVX-512 it affects the weight's gradient. With AMX it also affects strided convolutions that read only padding
    along an axis.
    """
    if not conv.processor.torch_bf16 or conv.dtype != torch.bfloat16 or conv.device != "cpu":
        return False
    if conv.geometry.stride[1] > 1 and conv.smaller[3] <= 3:
        return True
    return not conv.geometry.transposed and not all(_reads_pixels(conv, axis) for axis in range(2))


def _reads_pixels(conv: Convolution, axis: int) -> bool:
    """Whether a strided convolution reads any pixel of its input along an axis, and not only padding."""
    size, taps, positions = conv.input[2 + axis], conv.kernel[axis], conv.output[2 + axis]
    firsts = (at * conv.geometry.stride[axis] - conv.geometry.padding[axis] for at in range(positions))
    return any(0 <= first + tap * conv.geometry.dilation[axis] < size for first in firsts for tap in range(taps))


WRONG = Rule(
    "PyTorch is wrong", torch_is_wrong, True,
    "PyTorch's kernel computes wrong numbers for narrow images in bfloat16", "bfloat16 convolutions of narrow images",
)  # fmt: skip
_FIRST = (
    WRONG,
    Rule(
        "no instruction", lambda c: c.device == "cpu" and not c.processor.torch_multiplies(c.dtype), True,
        "PyTorch has no instructions for this dtype here and falls back to a loop", "bfloat16 without its instructions",
    ),
)  # fmt: skip

# The forward pass, and the gradient of the input, which is the adjoint convolution.
FORWARD = (
    *_FIRST,
    Rule(
        "GPU, transposed, 16 bits",
        lambda c: c.device == "cuda" and c.geometry.transposed and c.dtype in (torch.bfloat16, torch.float16), True,
        "one product per output phase on tensor cores; an estimate, nothing was measured", "fastgen or cuDNN",
    ),
    Rule(
        "GPU", lambda c: c.device == "cuda", False,
        "cuDNN's kernel for strided convolutions and float32; an estimate, nothing was measured", "fastgen or cuDNN",
    ),
    Rule(
        "AMX",
        lambda c: c.multiplies_tiles() and ((c.is_one_pixel() and c.input[0] >= 32)
        or (min(c.channels) >= 128 and max(c.channels) >= 256
        and (c.geometry.stride == (2, 2) or max(c.output[2:]) <= 4) and c.pixels() >= 256)), True,
        "tiles of bfloat16: one pixel, or many channels with a stride of 2 or on small images", "bfloat16 by tiles",
    ),
    Rule(
        "one pixel",
        lambda c: c.is_one_pixel() and (c.channels_last or (c.is_wide() and c.is_exact()))
        and (c.geometry.transposed or c.input[0] >= 32), True,
        "images of one pixel are one matrix product", "Images of one pixel",
    ),
    Rule(
        "one pixel, small batch or few channels", lambda c: c.is_one_pixel(), False,
        "PyTorch is as fast for images of one pixel in small batches or with few channels", "Images of one pixel",
    ),
    Rule(
        "to few channels",
        lambda c: c.is_to_few_channels() and not c.batch_stats and c.geometry.groups == 1
        and (c.is_exact() or min(c.kernel) >= 4), True,
        "at most 4 output channels: the taps of a kernel row fill the vectors", "Few output channels",
    ),
    Rule(
        "to few channels, statistics or groups", lambda c: c.is_to_few_channels(), False,
        "at most 4 output channels with statistics, groups or a small kernel in 16 bits", "Few output channels",
    ),
    Rule(
        "pairs of bfloat16",
        lambda c: c.dtype == torch.bfloat16 and c.geometry.stride == (2, 2) and c.processor.fastgen_bf16
        and not c.processor.fastgen_amx
        and min(c.channels) >= 128 * c.geometry.groups and max(c.channels) >= 256 * c.geometry.groups, True,
        "a stride of 2 between many channels, multiplied as pairs of bfloat16", "bfloat16 by pairs",
    ),
    Rule(
        "16 bits", lambda c: not c.is_exact(), False,
        "oneDNN has dedicated instructions for this dtype", "bfloat16",
    ),
    Rule(
        "fewer than 16 channels", lambda c: not c.is_wide(), False,
        "fewer than 16 channels per group do not fill the vectors", "Fewer than 16 channels",
    ),
    Rule(
        "transposed, 4x4, stride 2", lambda c: c.geometry.transposed and c.is_four_by_two(), True,
        "four 2x2 convolutions, one per output phase: no products with zeros", "Rows through pointers",
    ),
    Rule(
        "3x3 without AVX-512",
        lambda c: c.is_three_by_three() and (c.output[2] <= 8
        or (c.geometry.stride == (2, 2) and (c.geometry.transposed or c.channels_last))), True,
        "oneDNN's AVX2 kernel is slower on small images, and with a stride of 2 if transposed or channels_last",
        "Small images without AVX-512",
    ),
    Rule(
        "Winograd", Convolution.is_winograd, True,
        "Winograd's algorithm needs fewer multiplications", "Winograd",
    ),
    Rule(
        "direct", lambda c: True, False,
        "oneDNN's direct convolution is as fast where Winograd's algorithm does not pay", "Rows through pointers",
    ),
)  # fmt: skip

# The gradient of the weight.
WEIGHT_GRAD = (
    *_FIRST,
    Rule(
        "AMX",
        lambda c: c.multiplies_tiles() and ((c.is_one_pixel() and c.input[0] >= 32)
        or (min(c.channels) >= 128 and min(c.kernel) >= 3 and c.pixels() >= 512)
        or (min(c.channels) >= 64 and max(c.channels) >= 128 and c.is_four_by_two() and c.pixels() >= 1024)), True,
        "tiles of bfloat16: one pixel, or many channels", "bfloat16 by tiles",
    ),
    Rule("GPU", lambda c: c.device == "cuda", False, "cuDNN's kernel; nothing was measured", "fastgen or cuDNN"),
    Rule(
        "fewer than 16 channels", lambda c: max(c.channels) < 16 * c.geometry.groups, False,
        "fewer than 16 channels per group do not fill the vectors", "Fewer than 16 channels",
    ),
    Rule(
        "to few channels, stride 1",
        lambda c: min(c.channels) <= 4 and c.geometry.groups == 1 and not c.geometry.transposed
        and c.weight[0] == min(c.channels) and c.geometry.stride == (1, 1), True,
        "at most 4 output channels", "Few output channels",
    ),
    Rule(
        "4x4 from or to few channels, large batch",
        lambda c: min(c.channels) <= 4 and c.geometry.groups == 1 and c.is_exact() and c.is_four_by_two()
        and c.channels_last and max(c.channels) >= 64
        and c.smaller[0] * c.smaller[2] * c.smaller[3] >= 16384, True,
        "at most 4 channels on one side, in large channels_last batches", "Weight gradients from or to 3 channels",
    ),
    Rule(
        "few channels", lambda c: min(c.channels) <= 4 or not c.is_wide(), False,
        "oneDNN's kernel is as fast with few channels", "Weight gradients from or to 3 channels",
    ),
    Rule(
        "large images without AVX-512",
        lambda c: c.geometry.groups == 1 and min(c.kernel) >= 3 and min(c.smaller[2:]) >= 32 and c.is_exact()
        and c.channels_last and c.geometry.stride == (2, 2) and c.processor.vectors == "AVX2", True,
        "oneDNN has no AVX2 kernel for channels_last images here", "Strided weight gradients without AVX-512",
    ),
    Rule(
        "3x3 on images of 2x2 without AVX-512",
        lambda c: c.is_three_by_three() and min(c.channels) >= 128 and min(c.input[2], c.output[2]) <= 2, True,
        "oneDNN's AVX2 kernel is slower between many channels on tiny images", "Small images without AVX-512",
    ),
    Rule(
        "3x3, stride 2, large batch without AVX-512",
        lambda c: c.is_three_by_three() and (min(c.channels) >= 128 or c.channels_last)
        and min(c.input[2], c.output[2]) >= 4 and c.geometry.stride == (2, 2) and c.pixels() >= 1024, True,
        "oneDNN's AVX2 kernel is slower with a stride of 2", "3x3 kernels with a stride of 2",
    ),
    Rule(
        "Winograd", lambda c: c.pixels() >= 1024 and c.is_winograd(), True,
        "Winograd's algorithm needs fewer multiplications", "Weight gradients by Winograd",
    ),
    Rule(
        "one pixel", lambda c: c.is_one_pixel() and c.input[0] >= 32, True,
        "images of one pixel are one matrix product", "Images of one pixel",
    ),
    Rule("direct", lambda c: True, False, "oneDNN's kernel is as fast", "Weight gradients by Winograd"),
)  # fmt: skip

# A whole layer: numbers of multiplications below which a fused op's overhead in Python and the dispatcher costs more
# than the op saves.
SMALL_WITH_GRADIENTS = 100_000_000
SMALL = 20_000_000


def is_small(multiplications: int, records_gradients: bool) -> bool:
    """Whether PyTorch's modules, one by one, are faster than an op for a layer of so many multiplications on the CPU
    (benchmarks/NOTES.md, "Small convolutions")."""
    return multiplications < (SMALL_WITH_GRADIENTS if records_gradients else SMALL)
