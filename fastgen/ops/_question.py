"""Question: a convolution to choose an implementation for. Choice: the implementation, and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgen.ops._geometry import Geometry
from fastgen.ops._tiers import float32_is_tf32

_FLAGS = {"forward": "batch_stats", "weight_grad": "channels_last_images"}


class Choice(NamedTuple):
    """The implementation that computes something, and the reason.

    implementation: "cpp", "cuda" and "triton" are fastgen's kernels, "torch" is PyTorch's kernel for a convolution or a
    gradient. For a whole op it may also be "reference" (the op in plain PyTorch) or "unfused" (PyTorch's convolution,
    then fastgen's norm_act), and for a layer also "modules" (PyTorch's modules, one by one).
    tile: the measured tile of a Triton kernel, such as "64x64x64x4x3"; else "".
    """

    implementation: str
    tile: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.implementation} {self.tile}".rstrip()

    @staticmethod
    def parse(text: str, reason: str = "") -> Choice:
        """The inverse of str()."""
        implementation, _, tile = text.partition(" ")
        return Choice(implementation, tile, reason)


class Question(NamedTuple):
    """What has to be computed, on which tensors; its str() is the key in a file of measured choices."""

    what: str  # "forward", "input_grad" or "weight_grad"
    geometry: Geometry
    input: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: torch.dtype
    device: str
    channels_last: bool  # of the weight
    # "forward": statistics of the batch are computed; "weight_grad": the images with more channels are channels_last.
    flag: bool

    def __str__(self) -> str:
        geometry, dtype = self.geometry, str(self.dtype).removeprefix("torch.")
        if self.device != "cpu" and dtype == "float32" and float32_is_tf32():
            dtype = "tf32"
        kind = "conv_transpose2d" if geometry.transposed else "conv2d"
        words = [self.what, kind, _times(self.input), "by", _times(self.weight), dtype]
        words += ["channels_last"] * self.channels_last
        words += [
            "stride",
            _times(geometry.stride),
            "padding",
            _times(geometry.padding),
            *["reflect"] * geometry.reflect,
        ]
        words += [] if geometry.output_padding is None else ["output_padding", _times(geometry.output_padding)]
        words += ["dilation", _times(geometry.dilation), "groups", str(geometry.groups)]
        return " ".join(words + [_FLAGS.get(self.what, "")] * self.flag)


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
