from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models._base import (
    Adversarial,
    check_count,
    check_each,
    check_images,
    check_noise,
    evaluating,
    normal_init,
)
from fastgen.models._capabilities import Capabilities, Condition
from fastgen.models.dcgan import DCGANConfig, discriminator_head, discriminator_layers, generator_layers
from fastgen.models.registry import register_model
from fastgen.models.text_encoder import HuggingFaceTextEncoder, TransformerTextEncoder
from fastgen.nn import Sequential


@dataclass(frozen=True)
class Text2ImageConfig(DCGANConfig):
    """Sizes of a text-to-image GAN: those of a DCGAN, and of its text encoder."""

    vocabulary: tuple[str, ...] = ("a",)
    """Words that the text encoder knows (`fastgen.models.make_vocabulary`); a Hugging Face encoder ignores them."""
    text_encoder: str = "transformer"
    """"transformer", trained with the model, or the name or folder of a Hugging Face text encoder, used as it is."""
    text_width: int = 64
    """Width of the text encoder that is trained, a multiple of 4."""
    text_layers: int = 2
    """Layers of the text encoder that is trained."""
    caption_width: int = 64
    """Length of the vector that a caption is encoded as."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"text_layers": (1, 100)}
    renamed: ClassVar[dict[str, str]] = {"condition": "caption_width"}
    """Old name of an option -> its name, for checkpoints that were saved with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_width % 4:
            raise UsageError(f"text_width must be a multiple of 4, not {self.text_width}")
        words = self.vocabulary
        if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) for word in words):
            raise UsageError(f"vocabulary must hold words, not {reprlib.repr(words)}")
        object.__setattr__(self, "vocabulary", tuple(words))  # JSON has lists
        if not isinstance(self.text_encoder, str) or not self.text_encoder:
            raise UsageError(
                f"text_encoder must be 'transformer' or an encoder's name, not {reprlib.repr(self.text_encoder)}"
            )


class CaptionEncoder(nn.Module):
    """Captions -> vectors (N, caption_width): the text encoder and a linear layer."""

    def __init__(self, config: Text2ImageConfig) -> None:
        super().__init__()
        self.encoder: HuggingFaceTextEncoder | TransformerTextEncoder
        if config.text_encoder == "transformer":
            self.encoder = TransformerTextEncoder(config.vocabulary, config.text_width, config.text_layers)
        else:
            self.encoder = HuggingFaceTextEncoder(config.text_encoder)
        self.project = nn.Linear(self.encoder.width, config.caption_width)

    def forward(self, captions: Sequence[str]) -> Tensor:
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise UsageError(f"captions must be a list of texts, not {reprlib.repr(captions)}")
        if not captions:
            return self.project.weight.new_zeros(0, self.project.out_features)
        return self.project(self.encoder(captions).to(self.project.weight))


class Text2ImageGenerator(nn.Module):
    """Noise (N, nz) and captions (N, caption_width) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, config: Text2ImageConfig) -> None:
        super().__init__()
        self.nz, self.caption_width = config.nz, config.caption_width
        self.main = Sequential(*generator_layers(config, config.nz + config.caption_width))
        self.apply(normal_init)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        z = check_noise(z, self.nz)
        check_each("condition", condition, z.shape[0], self.caption_width)
        return self.main(torch.cat([z, condition.to(z.dtype)], 1)[:, :, None, None])


class Text2ImageDiscriminator(nn.Module):
    """Images (N, channels, image_size, image_size) and captions (N, caption_width) -> logits (N,): the caption joins
    the features at 4x4 pixels (Reed et al. 2016, section 4.1).
    """

    def __init__(self, config: Text2ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.main = Sequential(*discriminator_layers(config, config.channels))
        width = config.ndf * config.multipliers[-1]
        self.joint = Sequential(nn.Conv2d(width + config.caption_width, width, 1), nn.LeakyReLU(0.2))
        self.head = discriminator_head(config)
        self.apply(normal_init)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        return self.judge(self.features(images), condition)

    def features(self, images: Tensor) -> Tensor:
        """The features (N, C, 4, 4) of images, which do not depend on the captions."""
        check_images(images, self.config.channels, self.config.image_size)
        return self.main(images)

    def judge(self, features: Tensor, condition: Tensor) -> Tensor:
        """Logits (N,) of `features` with captions (N, caption_width)."""
        check_each("condition", condition, features.shape[0], self.config.caption_width)
        spread = condition.to(features.dtype)[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.head(self.joint(torch.cat([features, spread], 1))).flatten()


@register_model("text2image", Text2ImageConfig)
class Text2Image(Adversarial):
    """Text-to-image GAN (Reed et al. 2016, arXiv:1605.05396) with a DCGAN's layers and a text encoder."""

    def __init__(self, config: Text2ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = CaptionEncoder(config)
        self.generator = Text2ImageGenerator(config)
        self.discriminator = Text2ImageDiscriminator(config)

    @property
    def capabilities(self) -> Capabilities:
        captions = Condition("captions", width=self.config.caption_width, encode=self.text_encoder)
        return replace(super().capabilities, conditions=(captions,))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.generator(z, condition)

    generate = forward

    @torch.no_grad()
    def sample(
        self, n: int, *, generator: torch.Generator | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """`n` images (n, channels, image_size, image_size) in [-1, 1], drawn in eval mode and without gradients.

        Args:
            captions: n texts, or one for all images.

        Raises:
            UsageError: no captions, another number of them, or one without a word that the model learned.
        """
        if captions is None:
            raise UsageError("captions must say what to draw")
        n = check_count(n)
        if isinstance(captions, str):
            captions = [captions]
        elif not isinstance(captions, (list, tuple)):
            raise UsageError(f"captions must be a text or a list of texts, not {reprlib.repr(captions)}")
        if len(captions) not in (1, n):
            raise UsageError(f"captions must be one text or {n}, not {len(captions)}")
        with evaluating(self):
            condition = self.text_encoder(captions)
        return self.draw(n, generator, condition.expand(n, -1))
