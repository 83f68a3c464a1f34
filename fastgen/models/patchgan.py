from torch import Tensor, nn

from fastgen.models._base import norm_layer, numbered


class PatchGAN(nn.Module):
    """Images (N, inputs, H, W) -> logits (N, 1, H', W'), one per patch of the image, 70x70 pixels for three layers
    (Isola et al. 2017, arXiv:1611.07004).

    Its state dict is that of `NLayerDiscriminator` in pytorch-CycleGAN-and-pix2pix.

    Args:
        width: channels of the first layer.
        layers: hidden layers after the first.
        norm: "instance" (without affine), "batch" or "none".
    """

    def __init__(self, inputs: int, width: int = 64, layers: int = 3, norm: str = "instance") -> None:
        super().__init__()
        children: list[nn.Module | None] = [nn.Conv2d(inputs, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        channels = width
        for level in range(1, layers + 1):
            previous, channels = channels, width * min(2**level, 8)
            stride = 2 if level < layers else 1
            children.append(nn.Conv2d(previous, channels, 4, stride, 1, bias=norm == "instance"))
            children += [norm_layer(norm, channels), nn.LeakyReLU(0.2, True)]
        self.model = numbered([*children, nn.Conv2d(channels, 1, 4, 1, 1)])

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class PixelDiscriminator(nn.Module):
    """Images (N, inputs, H, W) -> logits (N, 1, H, W), one per pixel: a PatchGAN with patches of 1x1.

    Its state dict is that of `PixelDiscriminator` in pytorch-CycleGAN-and-pix2pix.

    Args:
        width: channels of the first layer.
        norm: "instance" (without affine), "batch" or "none".
    """

    def __init__(self, inputs: int, width: int = 64, norm: str = "instance") -> None:
        super().__init__()
        bias = norm == "instance"
        self.net = numbered(
            [
                nn.Conv2d(inputs, width, 1),
                nn.LeakyReLU(0.2, True),
                nn.Conv2d(width, 2 * width, 1, bias=bias),
                norm_layer(norm, 2 * width),
                nn.LeakyReLU(0.2, True),
                nn.Conv2d(2 * width, 1, 1, bias=bias),
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)
