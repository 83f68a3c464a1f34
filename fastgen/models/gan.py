from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastgen.models._base import Adversarial, check_images, check_noise
from fastgen.models.registry import register_model
from fastgen.nn import Sequential
from fastgen.options import check_options


@dataclass(frozen=True)
class GANConfig:
    """Sizes of a GAN of fully connected layers."""

    image_size: int = 28
    """Height and width of the images."""
    channels: int = 1
    """Channels of the images."""
    nz: int = 100
    """Length of the noise vector."""
    width: int = 256
    """Units of each of the two hidden layers."""
    generator_norm: Literal["batch", "none"] = "none"
    """Norm after the generator's hidden layers."""

    def __post_init__(self) -> None:
        check_options(self)


class GANGenerator(nn.Module):
    """Noise (N, nz) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.nz = config.nz
        self.image_shape = (config.channels, config.image_size, config.image_size)
        layers: list[nn.Module] = []
        for inputs in (config.nz, config.width):
            layers.append(nn.Linear(inputs, config.width))
            layers += [nn.BatchNorm1d(config.width)] if config.generator_norm == "batch" else []
            layers.append(nn.ReLU())
        self.main = Sequential(*layers, nn.Linear(config.width, config.channels * config.image_size**2), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(check_noise(z, self.nz)).view(-1, *self.image_shape)


class GANDiscriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> logits (N,)."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        inputs, width = config.channels * config.image_size**2, config.width
        self.main = Sequential(
            nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.config.channels, self.config.image_size)
        return self.main(images.flatten(1)).flatten()


@register_model("gan", GANConfig)
class GAN(Adversarial):
    """The first GAN: two multilayer perceptrons (Goodfellow et al. 2014, arXiv:1406.2661)."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = GANGenerator(config)
        self.discriminator = GANDiscriminator(config)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    generate = forward
