from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models._common import check_images, evaluating, normal_init
from fastgen.models.patchgan import PatchGAN
from fastgen.models.registry import check_choice, check_positive, register_model
from fastgen.models.resnet_generator import ResnetGenerator
from fastgen.models.unet import UnetGenerator

Direction = Literal["a_to_b", "b_to_a"]


@dataclass(frozen=True)
class CycleGANConfig:
    """Sizes of a CycleGAN; the defaults are those of the paper at 256 pixels."""

    image_size: int = 256
    """Height and width that it is trained at. A ResNet takes multiples of 4 from 8, a U-Net multiples of
    2**unet_depth."""
    channels_a: int = 3
    """Channels of the images of domain a."""
    channels_b: int = 3
    """Channels of the images of domain b."""
    generator: Literal["resnet", "unet"] = "resnet"
    """Architecture of both generators: that of CycleGAN or that of pix2pix."""
    ngf: int = 64
    """Channels of a generator's first layer."""
    ndf: int = 64
    """Channels of a discriminator's first layer."""
    blocks: int = 9
    """Residual blocks of a ResNet: 9, or 6 for images of 128 pixels or less."""
    unet_depth: int = 8
    """Layers of a U-Net that halve the image."""
    discriminator_layers: int = 3
    """Hidden layers of a PatchGAN after its first; 3 judges patches of 70x70 pixels."""
    norm: Literal["instance", "batch"] = "instance"
    """Norm of all networks."""
    dropout: bool = False
    """Dropout of one half in the generators."""

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "channels_a", "channels_b", "ngf", "ndf")
        check_positive(self, "blocks", most=1000)
        check_positive(self, "discriminator_layers", most=16)
        check_choice(self, generator=("resnet", "unet"), norm=("instance", "batch"), dropout=(True, False))
        if type(self.unet_depth) is not int or not 2 <= self.unet_depth <= 16:
            raise UsageError(f"unet_depth must be between 2 and 16, not {reprlib.repr(self.unet_depth)}")
        unit, least, what = 4, 8, "generator 'resnet'"
        if self.generator == "unet":
            unit, least, what = (
                2**self.unet_depth,
                2**self.unet_depth,
                f"generator 'unet' of unet_depth {self.unet_depth}",
            )
        if self.image_size % unit or self.image_size < least:
            raise UsageError(f"image_size must be a multiple of {unit} from {least} for {what}, not {self.image_size}")
        least = (
            3 * 2**self.discriminator_layers
        )  # a halving for each layer, then two 4x4 convolutions with a border of 1
        if self.image_size < least:
            raise UsageError(
                f"image_size must be at least {least} for {self.discriminator_layers} discriminator_layers, "
                f"not {self.image_size}"
            )


@register_model("cyclegan", CycleGANConfig)
class CycleGAN(nn.Module):
    """Two generators and two discriminators between two unpaired domains (Zhu et al. 2017, arXiv:1703.10593)."""

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__()
        self.config = config
        a, b = config.channels_a, config.channels_b
        self.a_to_b = self._make_generator(a, b)
        self.b_to_a = self._make_generator(b, a)
        self.discriminator_a = PatchGAN(a, config.ndf, config.discriminator_layers, config.norm)
        self.discriminator_b = PatchGAN(b, config.ndf, config.discriminator_layers, config.norm)
        self.apply(normal_init)

    def _make_generator(self, inputs: int, outputs: int) -> nn.Module:
        config = self.config
        if config.generator == "unet":
            return UnetGenerator(inputs, outputs, config.ngf, config.unet_depth, config.norm, config.dropout)
        return ResnetGenerator(inputs, outputs, config.ngf, config.blocks, config.norm, config.dropout)

    def forward(self, images: Tensor, direction: Direction = "a_to_b") -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of one domain as of the other, H and W multiples as `image_size` is."""
        if direction not in ("a_to_b", "b_to_a"):
            raise UsageError(f"direction must be 'a_to_b' or 'b_to_a', not {direction!r}")
        channels = self.config.channels_a if direction == "a_to_b" else self.config.channels_b
        check_images(images, channels)
        return self.a_to_b(images) if direction == "a_to_b" else self.b_to_a(images)

    @torch.no_grad()
    def translate(self, images: Tensor, direction: Direction = "a_to_b") -> Tensor:
        """`forward` in eval mode and without gradients."""
        with evaluating(self):
            return self.forward(images, direction)
