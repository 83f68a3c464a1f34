from __future__ import annotations

from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models._base import norm_layer, numbered


class ResnetGenerator(nn.Module):
    """Images (N, inputs, H, W) -> (N, outputs, H, W) in [-1, 1], H and W multiples of 4 from 8 up: convolutions,
    residual blocks at a quarter of the size, transposed convolutions (Johnson et al. 2016, arXiv:1603.08155; Zhu et al.
    2017).

    Its state dict is that of `ResnetGenerator` in pytorch-CycleGAN-and-pix2pix. The convolutions pad by
    reflection themselves, so the children are named by their positions there.

    Args:
        width: channels of the first layer.
        blocks: residual blocks.
        norm: "instance" (without affine), "batch" or "none".
        dropout: dropout with probability 0.5 in each block.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int = 64, blocks: int = 9, norm: str = "instance", dropout: bool = False
    ) -> None:
        super().__init__()
        bias = norm == "instance"
        # None takes the position of a reflection pad in the original
        layers = [None, _reflecting(inputs, width, 7, bias), norm_layer(norm, width), nn.ReLU(True)]
        for channels in (width, 2 * width):
            down = nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=bias)
            layers += [down, norm_layer(norm, 2 * channels), nn.ReLU(True)]
        layers += [ResnetBlock(4 * width, norm, dropout) for _ in range(blocks)]
        for channels in (4 * width, 2 * width):
            half = channels // 2
            up = nn.ConvTranspose2d(channels, half, 3, 2, 1, output_padding=1, bias=bias)
            layers += [up, norm_layer(norm, half), nn.ReLU(True)]
        self.model = numbered([*layers, None, _reflecting(width, outputs, 7), nn.Tanh()])

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % 4 or width % 4 or min(height, width) < 8:
            raise UsageError(
                f"images must have a height and width that are multiples of 4 from 8 up, not {height}x{width}"
            )
        return self.model(images)


class ResnetBlock(nn.Module):
    """x + conv_block(x); the convolutions are `conv_block.{1,5}`, or {1,6} with dropout."""

    def __init__(self, channels: int, norm: str, dropout: bool) -> None:
        super().__init__()
        bias = norm == "instance"
        layers = [None, _reflecting(channels, channels, 3, bias), norm_layer(norm, channels), nn.ReLU(True)]
        layers += [nn.Dropout(0.5)] if dropout else []
        layers += [None, _reflecting(channels, channels, 3, bias), norm_layer(norm, channels)]
        self.conv_block = numbered(layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def _reflecting(inputs: int, outputs: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect", bias=bias)
