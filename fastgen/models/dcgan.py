from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models.registry import register_model
from fastgen.nn import Sequential

_SAMPLE_BATCH = 256  # images a forward pass of `sample`, which bounds its memory


@dataclass(frozen=True)
class DCGANConfig:
    """Sizes of a DCGAN; the defaults are those of pytorch/examples."""

    image_size: int = 64
    """Height and width of the images: 32, 64 or 128."""
    channels: int = 3
    """Channels of the images."""
    nz: int = 100
    """Length of the noise vector."""
    ngf: int = 64
    """Channels of the generator's last hidden layer."""
    ndf: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_norm: Literal["batch", "none"] = "batch"
    """Norm in the discriminator. A gradient penalty wants "none"."""

    def __post_init__(self) -> None:
        if self.image_size not in (32, 64, 128):
            raise UsageError(f"image_size must be 32, 64 or 128, not {self.image_size!r}")
        for name in ("channels", "nz", "ngf", "ndf"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a positive integer, not {value!r}")
        if self.discriminator_norm not in ("batch", "none"):
            raise UsageError(f"discriminator_norm must be 'batch' or 'none', not {self.discriminator_norm!r}")

    @property
    def multipliers(self) -> list[int]:
        """Width of the hidden layers over ngf (ndf), from the image inwards: 1, 2, 4, ... down to 4x4 pixels."""
        return [2**level for level in range(self.image_size.bit_length() - 3)]


class DCGANGenerator(nn.Module):
    """Noise (N, nz) or (N, nz, 1, 1) -> images (N, channels, image_size, image_size) in [-1, 1].

    Its state dict is that of `netG` in pytorch/examples `dcgan/main.py`.
    """

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        self.nz = config.nz
        widths = [config.ngf * multiplier for multiplier in reversed(config.multipliers)]
        layers: list[nn.Module] = [nn.ConvTranspose2d(config.nz, widths[0], 4, 1, 0, bias=False)]
        for width, next_width in zip(widths, [*widths[1:], config.channels], strict=True):
            layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.ConvTranspose2d(width, next_width, 4, 2, 1, bias=False)]
        self.main = Sequential(*layers, nn.Tanh())
        self.apply(_official_init)

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() not in (2, 4) or z.shape[1] != self.nz or z.shape[2:].numel() != 1:
            raise UsageError(f"z must be (N, {self.nz}) or (N, {self.nz}, 1, 1), not {tuple(z.shape)}")
        return self.main(z.view(-1, self.nz, 1, 1))


class DCGANDiscriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> logits (N,); `probability` is their sigmoid.

    With discriminator_norm="batch" its state dict is that of `netD` in pytorch/examples `dcgan/main.py`, whose last
    layer is the sigmoid. Losses want logits, so `main` ends before it.
    """

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        self.image_shape = (config.channels, config.image_size, config.image_size)
        widths = [config.ndf * multiplier for multiplier in config.multipliers]
        bias = config.discriminator_norm == "none"  # a norm has its own
        layers: list[nn.Module] = []
        for width, next_width in zip([config.channels, *widths], widths, strict=False):
            layers.append(nn.Conv2d(width, next_width, 4, 2, 1, bias=bias))
            if layers[1:] and config.discriminator_norm == "batch":
                layers.append(nn.BatchNorm2d(next_width))
            layers.append(nn.LeakyReLU(0.2, True))
        self.main = Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=bias))
        self.apply(_official_init)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.image_shape:
            raise UsageError(f"images must be (N, {', '.join(map(str, self.image_shape))}), not {tuple(images.shape)}")
        return self.main(images).flatten()

    def probability(self, images: Tensor) -> Tensor:
        """Probability that each image is real, shape (N,): what the official `netD` returns, flattened."""
        return self.forward(images).sigmoid()


@register_model("dcgan", DCGANConfig)
class DCGAN(nn.Module):
    """Deep convolutional GAN (Radford, Metz and Chintala 2015, arXiv:1511.06434)."""

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = DCGANGenerator(config)
        self.discriminator = DCGANDiscriminator(config)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise (n, nz), drawn on `generator`'s device and moved to the model's."""
        weight = next(self.parameters())
        device = weight.device if generator is None else generator.device
        noise = torch.randn(n, self.config.nz, generator=generator, device=device)
        return noise.to(weight.device, weight.dtype)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` images (n, channels, image_size, image_size) in [-1, 1], made in eval mode and without gradients."""
        training = self.generator.training
        self.generator.eval()
        try:
            return torch.cat([self.generator(z) for z in self.latent(n, generator=generator).split(_SAMPLE_BATCH)])
        finally:
            self.generator.train(training)


def _official_init(module: nn.Module) -> None:
    """Weights of pytorch/examples: convolutions N(0, 0.02), batch norm gamma N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
