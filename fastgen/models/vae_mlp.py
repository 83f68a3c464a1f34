from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastgen.models._base import check_images, check_noise
from fastgen.models.registry import register_model
from fastgen.models.vae import GaussianVAE
from fastgen.options import check_options


@dataclass(frozen=True)
class MLPVAEConfig:
    """Sizes of a VAE of fully connected layers; the defaults are those of pytorch/examples."""

    image_size: int = 28
    """Height and width of the images."""
    channels: int = 1
    """Channels of the images."""
    nz: int = 20
    """Length of the latent vector."""
    width: int = 400
    """Units of the hidden layers."""
    likelihood: Literal["gaussian", "bernoulli"] = "bernoulli"
    """Distribution of a pixel x given z: a Gaussian with one variance for all pixels, or a Bernoulli of (x + 1) / 2."""

    def __post_init__(self) -> None:
        check_options(self)


@register_model("vae_mlp", MLPVAEConfig)
class MLPVAE(GaussianVAE):
    """Variational autoencoder of two perceptrons, with the layers and the keys of pytorch/examples `vae/main.py`.

    Its images are in [-1, 1], while its layers work on (x + 1) / 2, in [0, 1] as the original's.
    """

    def __init__(self, config: MLPVAEConfig) -> None:
        super().__init__(config)
        pixels = config.channels * config.image_size**2
        self.fc1 = nn.Linear(pixels, config.width)
        self.fc21 = nn.Linear(config.width, config.nz)
        self.fc22 = nn.Linear(config.width, config.nz)
        self.fc3 = nn.Linear(config.nz, config.width)
        self.fc4 = nn.Linear(config.width, pixels)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        check_images(images, self.config.channels, self.config.image_size)
        hidden = self.fc1((images.flatten(1) + 1) / 2).relu()
        return self.fc21(hidden), self.fc22(hidden)

    def decode(self, z: Tensor) -> Tensor:
        pixels = self.fc4(self.fc3(check_noise(z, self.config.nz)).relu()).sigmoid()
        return (2 * pixels - 1).view(-1, self.config.channels, self.config.image_size, self.config.image_size)
