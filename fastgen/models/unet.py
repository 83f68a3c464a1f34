from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models._base import norm_layer
from fastgen.nn import Sequential


class UnetGenerator(nn.Module):
    """Images (N, inputs, H, W) -> (N, outputs, H, W) in [-1, 1], H and W multiples of 2**depth: an encoder and a
    decoder with skip connections (Isola et al. 2017, arXiv:1611.07004).

    Its state dict is that of `UnetGenerator` in pytorch-CycleGAN-and-pix2pix.

    Args:
        width: channels of the first layer; the next have 2, 4, 8, 8, ... times as many.
        depth: number of layers that halve the image, 8 for 256 pixels.
        norm: "batch", "instance" (without affine) or "none".
        dropout: dropout with probability 0.5 in the decoder's layers of 8 times the width, except the innermost.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int = 64, depth: int = 8, norm: str = "batch", dropout: bool = False
    ) -> None:
        super().__init__()
        self.depth = depth
        widths = [width * min(2**level, 8) for level in range(depth)]
        block: UnetBlock | None = None
        for level in range(depth - 1, 0, -1):
            drops = dropout and 4 <= level < depth - 1
            block = UnetBlock(widths[level - 1], widths[level], block, norm, drops)
        bias = norm == "instance"
        down = nn.Conv2d(inputs, width, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(2 * width, outputs, 4, 2, 1)
        self.model = UnetLayers([("0", down), ("act", nn.LeakyReLU(0.2)), ("1", block), ("3", up), ("out", nn.Tanh())])

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % 2**self.depth or width % 2**self.depth:
            raise UsageError(
                f"images must have a height and width that are multiples of {2**self.depth}, not {height}x{width}"
            )
        return self.model(images)


class UnetLayers(nn.Module):
    """A Sequential `model` of named children: the level that the names in checkpoints have."""

    def __init__(self, children: list[tuple[str, nn.Module | None]]) -> None:
        super().__init__()
        self.model = Sequential()
        for name, child in children:
            if child is not None:
                self.model.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class UnetBlock(UnetLayers):
    """Halves the features, runs the block inside and doubles them again; returns its input concatenated with that.

    In the original a block begins with an in-place LeakyReLU, which also changes the skip connection, and a ReLU
    follows the concatenation. Here each activation directly follows its convolution and norm, so that one op computes
    them: the input has already passed the LeakyReLU, and the output the ReLU (which commutes with dropout).
    """

    def __init__(self, outer: int, inner: int, inside: UnetBlock | None, norm: str, dropout: bool) -> None:
        bias = norm == "instance"
        down = nn.Conv2d(outer, inner, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(2 * inner if inside else inner, outer, 4, 2, 1, bias=bias)
        if inside is None:
            middle: list[tuple[str, nn.Module | None]] = [("act", nn.ReLU()), ("3", up), ("4", norm_layer(norm, outer))]
        else:
            middle = [("2", norm_layer(norm, inner)), ("act", nn.LeakyReLU(0.2)), ("3", inside), ("5", up)]
            middle += [("6", norm_layer(norm, outer))]
        super().__init__([("1", down), *middle, ("out", nn.ReLU()), ("drop", nn.Dropout(0.5) if dropout else None)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), self.model(x)], 1)
