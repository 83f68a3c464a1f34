from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.errors import UsageError
from fastgen.models._base import Generative, check_images, check_noise, random_images
from fastgen.models._capabilities import Capabilities
from fastgen.models.registry import register_model
from fastgen.nn import Reparameterize, Sequential
from fastgen.options import MAX_SIZE, check_options


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a convolutional VAE; the widths are those of PyTorch-VAE."""

    image_size: int = 64
    """Height and width of the images, a multiple of 2**len(widths)."""
    channels: int = 3
    """Channels of the images."""
    nz: int = 128
    """Length of the latent vector."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Channels of the encoder's layers, each of which halves the image; the decoder has the same in reverse."""
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    """Distribution of a pixel x given z: a Gaussian with one variance for all pixels, or a Bernoulli of (x + 1) / 2."""

    def __post_init__(self) -> None:
        check_options(self)
        widths = self.widths if isinstance(self.widths, (list, tuple)) else ()
        if not 1 <= len(widths) <= 16 or any(type(width) is not int or not 1 <= width <= MAX_SIZE for width in widths):
            raise UsageError(
                f"widths must be 1 to 16 positive integers up to {MAX_SIZE}, not {reprlib.repr(self.widths)}"
            )
        object.__setattr__(self, "widths", tuple(widths))  # JSON has lists
        if self.image_size % 2 ** len(self.widths):
            raise UsageError(
                f"image_size must be a multiple of {2 ** len(self.widths)} for {len(self.widths)} widths, "
                f"not {self.image_size}"
            )


class GaussianVAE(Generative):
    """What the VAEs share, with a normal prior and posterior (Kingma and Welling 2014, arXiv:1312.6114); an
    architecture adds `encode` and `decode`.
    """

    log_std: Tensor
    """Logarithm of a pixel's standard deviation given z, (), if the likelihood is Gaussian. Loading a state_dict
    without it, such as another project's, keeps its value.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.reparameterize = Reparameterize(kl=True)
        if config.likelihood == "gaussian":
            self.register_buffer("log_std", torch.zeros(()))

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, encodes=True)

    def example_inputs(self, n: int) -> dict[str, tuple[Tensor, ...]]:
        return {"": (random_images(n, self.config.channels, self.config.image_size),)}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.config.likelihood == "gaussian" and "log_std" not in self._non_persistent_buffers_set:
            state_dict.setdefault(prefix + "log_std", self.log_std)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | images), each (N, nz)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x | z), images in [-1, 1]."""
        raise NotImplementedError

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, mu, logvar) of images (N, channels, image_size, image_size) in [-1, 1]."""
        mu, logvar = self.encode(images)
        return self.decode(self.reparameterize(mu, logvar, generator)[0]), mu, logvar

    def generate(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def nll(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """-log p(images | z) in nats, (N,), where decode(z) is `reconstruction`."""
        if self.config.likelihood == "bernoulli":
            return losses.bernoulli_nll(reconstruction, images)
        return losses.gaussian_nll(reconstruction, images, self.log_std)

    @torch.no_grad()
    def fit_log_std(self, squared_error: Tensor, share: float = 1.0) -> None:
        """Moves `log_std` by the fraction `share` towards its best value for a mean squared error (), the logarithm of
        that error's root (Rybkin et al. 2021, arXiv:2006.13202); does nothing without a Gaussian likelihood.
        """
        if self.config.likelihood == "gaussian":
            self.log_std.lerp_(squared_error.clamp(min=1e-12).log() / 2, share)


@register_model("vae", VAEConfig)
class VAE(GaussianVAE):
    """Convolutional variational autoencoder, with the layers and the keys of PyTorch-VAE's `vanilla_vae.py`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        widths, self.pixels = config.widths, config.image_size >> len(config.widths)
        flat = widths[-1] * self.pixels**2
        self.encoder = Sequential(*map(_down, [config.channels, *widths], widths))
        self.fc_mu = nn.Linear(flat, config.nz)
        self.fc_var = nn.Linear(flat, config.nz)
        self.decoder_input = nn.Linear(config.nz, flat)
        self.decoder = Sequential(*map(_up, widths[:0:-1], widths[-2::-1]))
        self.final_layer = Sequential(
            *_up(widths[0], widths[0]), nn.Conv2d(widths[0], config.channels, 3, padding=1), nn.Tanh()
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        check_images(images, self.config.channels, self.config.image_size)
        features = self.encoder(images).flatten(1)
        return self.fc_mu(features), self.fc_var(features)

    def decode(self, z: Tensor) -> Tensor:
        z = check_noise(z, self.config.nz)
        features = self.decoder_input(z).view(-1, self.config.widths[-1], self.pixels, self.pixels)
        return self.final_layer(self.decoder(features))


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU())


def _up(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU())
