from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastgen.models._base import Adversarial, check_images, check_noise, normal_init
from fastgen.models.registry import register_model
from fastgen.nn import Sequential
from fastgen.options import check_options


@dataclass(frozen=True)
class DCGANConfig:
    """Sizes of a DCGAN; the defaults are those of pytorch/examples."""

    image_size: Literal[32, 64, 128] = 64
    """Height and width of the images."""
    channels: int = 3
    """Channels of the images."""
    nz: int = 100
    """Length of the noise vector."""
    ngf: int = 64
    """Channels of the generator's last hidden layer."""
    ndf: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_norm: Literal["batch", "none"] = "batch"
    """Norm in the discriminator. Gradient penalties need "none"."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def multipliers(self) -> list[int]:
        """Channels of the hidden layers divided by ngf or ndf, from the image inwards: 1, 2, 4, ..., at 4x4 pixels."""
        return [2**level for level in range(self.image_size.bit_length() - 3)]


def generator_layers(config: DCGANConfig, inputs: int) -> list[nn.Module]:
    """From (N, inputs, 1, 1) to images, in the order of `netG`: convolution, norm, ReLU, ..., convolution, tanh."""
    widths = [config.ngf * multiplier for multiplier in reversed(config.multipliers)]
    layers: list[nn.Module] = [nn.ConvTranspose2d(inputs, widths[0], 4, 1, 0, bias=False)]
    for width, next_width in zip(widths, [*widths[1:], config.channels], strict=True):
        layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.ConvTranspose2d(width, next_width, 4, 2, 1, bias=False)]
    return [*layers, nn.Tanh()]


def discriminator_layers(config: DCGANConfig, inputs: int) -> list[nn.Module]:
    """From (N, inputs, image_size, image_size) to features (N, ndf * multipliers[-1], 4, 4), in the order of `netD`."""
    widths = [config.ndf * multiplier for multiplier in config.multipliers]
    layers: list[nn.Module] = []
    for width, next_width in zip([inputs, *widths], widths, strict=False):
        layers.append(nn.Conv2d(width, next_width, 4, 2, 1, bias=config.discriminator_norm == "none"))
        if layers[1:] and config.discriminator_norm == "batch":
            layers.append(nn.BatchNorm2d(next_width))
        layers.append(nn.LeakyReLU(0.2, True))
    return layers


def discriminator_head(config: DCGANConfig) -> nn.Conv2d:
    """From those features to a logit (N, 1, 1, 1)."""
    width = config.ndf * config.multipliers[-1]
    return nn.Conv2d(width, 1, 4, 1, 0, bias=config.discriminator_norm == "none")


class DCGANGenerator(nn.Module):
    """Noise (N, nz) or (N, nz, 1, 1) -> images (N, channels, image_size, image_size) in [-1, 1].

    Its state dict is that of `netG` in pytorch/examples `dcgan/main.py`.
    """

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        self.nz = config.nz
        self.main = Sequential(*generator_layers(config, config.nz))
        self.apply(normal_init)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(check_noise(z, self.nz).view(-1, self.nz, 1, 1))


class DCGANDiscriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> logits (N,); `probability` is their sigmoid.

    With discriminator_norm="batch" its state dict is that of `netD` in pytorch/examples `dcgan/main.py`, whose last
    layer is the sigmoid. Losses take logits, so `main` ends before it.
    """

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        self.config = config
        self.main = Sequential(*discriminator_layers(config, config.channels), discriminator_head(config))
        self.apply(normal_init)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.config.channels, self.config.image_size)
        return self.main(images).flatten()

    def probability(self, images: Tensor) -> Tensor:
        """Probability that each image is real, shape (N,): what the official `netD` returns, flattened."""
        return self.forward(images).sigmoid()


@register_model("dcgan", DCGANConfig)
class DCGAN(Adversarial):
    """Deep convolutional GAN (Radford, Metz and Chintala 2015, arXiv:1511.06434)."""

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = DCGANGenerator(config)
        self.discriminator = DCGANDiscriminator(config)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    generate = forward
