from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models._base import check_images, evaluating, normal_init, random_images
from fastgen.models._capabilities import Capabilities
from fastgen.models.patchgan import PatchGAN
from fastgen.models.registry import register_model
from fastgen.models.resnet_generator import ResnetGenerator
from fastgen.models.unet import UnetGenerator
from fastgen.options import check_options

Direction = Literal["a_to_b", "b_to_a"]


@dataclass(frozen=True)
class CycleGANConfig:
    """Sizes of a CycleGAN; the defaults are those of the paper at 256 pixels."""

    image_size: int = 256
    """Height and width of the images to train on: for a ResNet a multiple of 4 from 8 up, for a U-Net of
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
    """Hidden layers of a PatchGAN after its first; with 3 it judges patches of 70x70 pixels."""
    norm: Literal["instance", "batch"] = "instance"
    """Norm of all networks."""
    dropout: bool = False
    """Dropout with probability 0.5 in the generators."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "blocks": (1, 1000), "unet_depth": (2, 16), "discriminator_layers": (1, 16)
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        multiple, least = self.image_sizes
        if self.image_size % multiple or self.image_size < least:
            kind = f"generator {self.generator!r}" + f" of unet_depth {self.unet_depth}" * (self.generator == "unet")
            raise UsageError(
                f"image_size must be a multiple of {multiple} from {least} up for {kind}, not {self.image_size}"
            )
        # each layer halves the image, then come two 4x4 convolutions with a border of 1
        least = 3 * 2**self.discriminator_layers
        if self.image_size < least:
            raise UsageError(
                f"image_size must be at least {least} for {self.discriminator_layers} discriminator_layers, "
                f"not {self.image_size}"
            )

    @property
    def image_sizes(self) -> tuple[int, int]:
        """Heights and widths that a generator takes are multiples of the first, and at least the second."""
        return (4, 8) if self.generator == "resnet" else (2**self.unet_depth, 2**self.unet_depth)


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

    @property
    def capabilities(self) -> Capabilities:
        """The model's inputs and outputs."""
        config = self.config
        a, b = config.channels_a, config.channels_b
        multiple, least = config.image_sizes
        return Capabilities(
            config.image_size,
            directions={"a_to_b": (a, b), "b_to_a": (b, a)},
            size_multiple=multiple,
            least_size=least,
        )

    def example_inputs(self, n: int) -> dict[str, tuple[Tensor, ...]]:
        """The submodules that a training step runs, each with inputs for n images, on the CPU."""
        a, b = (
            random_images(n, channels, self.config.image_size)
            for channels in (self.config.channels_a, self.config.channels_b)
        )
        return {"a_to_b": (a,), "b_to_a": (b,), "discriminator_a": (a,), "discriminator_b": (b,)}

    def _make_generator(self, inputs: int, outputs: int) -> nn.Module:
        config = self.config
        if config.generator == "unet":
            return UnetGenerator(inputs, outputs, config.ngf, config.unet_depth, config.norm, config.dropout)
        return ResnetGenerator(inputs, outputs, config.ngf, config.blocks, config.norm, config.dropout)

    def forward(self, images: Tensor, direction: Direction = "a_to_b") -> Tensor:
        """Translates images (N, C, H, W) in [-1, 1] of one domain to the other; H and W as `image_sizes` says."""
        if direction not in ("a_to_b", "b_to_a"):
            raise UsageError(f"direction must be 'a_to_b' or 'b_to_a', not {direction!r}")
        check_images(images, self.config.channels_a if direction == "a_to_b" else self.config.channels_b)
        return self.a_to_b(images) if direction == "a_to_b" else self.b_to_a(images)

    @torch.no_grad()
    def translate(self, images: Tensor, direction: Direction = "a_to_b") -> Tensor:
        """`forward` in eval mode and without gradients."""
        with evaluating(self):
            return self.forward(images, direction)
