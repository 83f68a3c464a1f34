"""Which pixels and taps of a convolution, strided or transposed, are multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Geometry(NamedTuple):
    """The arguments of a convolution; each sequence is of (height, width)."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    transposed: bool = False
    output_padding: Sequence[int] = (0, 0)  # of a transposed convolution
    reflect: bool = False  # the padding mirrors x instead of being zero; not if transposed

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        kernel = weight.shape[2:]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel, strict=True)]
        if self.transposed:
            channels = weight.shape[1] * self.groups
            height, width = (
                (x.shape[2 + i] - 1) * self.stride[i] - 2 * self.padding[i] + reach[i] + self.output_padding[i]
                for i in (0, 1)
            )
        else:
            channels = weight.shape[0]
            height, width = ((x.shape[2 + i] + 2 * self.padding[i] - reach[i]) // self.stride[i] + 1 for i in (0, 1))
        return x.shape[0], channels, height, width

    @property
    def phases(self) -> int:
        return math.prod(self.stride) if self.transposed else 1

    def per_phase(self, sizes: Sequence[int]) -> int:
        """The number of output pixels, or of taps, of these (height, width) in the largest phase."""
        steps = self.stride if self.transposed else (1, 1)
        return math.prod(triton.cdiv(size, step) for size, step in zip(sizes, steps, strict=True))

    def tap_steps(self) -> list[int]:
        """The distance between taps of a phase."""
        return [s // math.gcd(s, d) if self.transposed else 1 for s, d in zip(self.stride, self.dilation, strict=True)]

    def arguments(self, weight: Tensor) -> dict[str, int | bool]:
        """The kernels' arguments, for a weight (*, *, KH, KW)."""
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = weight.shape[2:], self.stride, self.padding, self.dilation
        sizes = {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw}
        return sizes | {"REFLECT": self.reflect}


@triton.jit
def phase(
    q, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    TAP_STEP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A phase along one dimension: its first output pixel, its number of output pixels (of `size`), the input pixel
    that its first tap reads for the first output pixel, its first tap, and its number of taps, which are TAP_STEP
    apart."""
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
