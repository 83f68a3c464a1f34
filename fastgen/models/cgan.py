from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models._base import Adversarial, check_count, check_each, check_images, check_noise, normal_init
from fastgen.models._capabilities import Capabilities, Condition
from fastgen.models.dcgan import DCGANConfig, discriminator_head, discriminator_layers, generator_layers
from fastgen.models.registry import register_model
from fastgen.nn import ConditionalBatchNorm2d, Sequential


@dataclass(frozen=True)
class CGANConfig(DCGANConfig):
    """Sizes of a conditional GAN: those of a DCGAN, and how the class enters."""

    classes: int = 10
    """Number of classes."""
    embedding: int = 32
    """Length of a class's embedding, which is appended to the noise."""
    generator_norm: Literal["batch", "conditional"] = "batch"
    """Norm in the generator; "conditional" gives each class gains and biases of its own."""
    discriminator_conditioning: Literal["projection", "concatenation"] = "projection"
    """How the discriminator sees the class: by an inner product with its features, or as an additional channel of the
    image."""

    renamed: ClassVar[dict[str, str]] = {"condition": "discriminator_conditioning"}
    """Old name of an option -> its name, for checkpoints that were saved with it."""


class CGANGenerator(nn.Module):
    """Noise (N, nz) and labels (N,) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, config: CGANConfig) -> None:
        super().__init__()
        self.nz = config.nz
        self.embedding = nn.Embedding(config.classes, config.embedding)
        layers = generator_layers(config, config.nz + config.embedding)
        self.stages = nn.ModuleList()
        if config.generator_norm == "conditional":
            hidden, layers = layers[:-2], layers[-2:]
            for convolution, norm in zip(hidden[::3], hidden[1::3], strict=True):
                self.stages.append(
                    ConditionalBatchNorm2d(norm.num_features, config.classes, convolution=convolution)  # type: ignore
                )
        self.main = Sequential(*layers)
        self.apply(normal_init)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        z = check_noise(z, self.nz)
        x = torch.cat([z, embed(self.embedding, labels, z.shape[0]).to(z.dtype)], 1)[:, :, None, None]
        for stage in self.stages:
            x = stage(x, labels).relu()
        return self.main(x)


class CGANDiscriminator(nn.Module):
    """Images (N, channels, image_size, image_size) and labels (N,) -> logits (N,)."""

    def __init__(self, config: CGANConfig) -> None:
        super().__init__()
        self.config = config
        joined = config.discriminator_conditioning == "concatenation"
        self.main = Sequential(*discriminator_layers(config, config.channels + joined))
        self.head = discriminator_head(config)
        self.apply(normal_init)
        self.embedding = nn.Embedding(config.classes, config.image_size**2 if joined else self.head.in_channels)
        nn.init.normal_(self.embedding.weight, 0.0, 1.0 if joined else 0.02)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        check_images(images, self.config.channels, self.config.image_size)
        embedded = embed(self.embedding, labels, images.shape[0]).to(images.dtype)
        if self.config.discriminator_conditioning == "concatenation":
            features = self.main(torch.cat([images, embedded.view(-1, 1, *images.shape[2:])], 1))
            return self.head(features).flatten()
        features = self.main(images)  # (N, C, 4, 4)
        return self.head(features).flatten() + (features.sum((2, 3)) * embedded).sum(1)


@register_model("cgan", CGANConfig)
class CGAN(Adversarial):
    """Conditional GAN (Mirza and Osindero 2014, arXiv:1411.1784) with a DCGAN's layers; the projection discriminator is
    by Miyato and Koyama 2018 (arXiv:1802.05637).
    """

    def __init__(self, config: CGANConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = CGANGenerator(config)
        self.discriminator = CGANDiscriminator(config)

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, conditions=(Condition("labels", classes=self.config.classes),))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.generator(z, labels)

    generate = forward

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None, labels: Tensor | None = None) -> Tensor:
        """`n` images (n, channels, image_size, image_size) in [-1, 1], drawn in eval mode and without gradients.

        Args:
            labels: (n,) int64, the class of each image; by default each class in turn.

        Raises:
            UsageError: labels of another shape or dtype, or out of range.
        """
        n, device = check_count(n), next(self.parameters()).device
        if labels is None:
            labels = torch.arange(n, dtype=torch.int64, device=device) % self.config.classes
        else:
            check_labels(labels, n, self.config.classes)
        return self.draw(n, generator, labels.to(device))


def embed(embedding: nn.Embedding, labels: Tensor, n: int) -> Tensor:
    """The embeddings (n, ...) of the labels of n images.

    Raises:
        UsageError: labels of another shape or dtype, or, on the CPU, out of range.
    """
    check_each("labels", labels, n)
    if labels.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"labels must be int64, not {labels.dtype}")
    try:
        return embedding(labels)
    except IndexError as error:
        raise UsageError(f"labels must be between 0 and {embedding.num_embeddings - 1}: {error}") from error


def check_labels(labels: Tensor, n: int, classes: int) -> None:
    """Raises UsageError unless labels are (n,) int64 in 0..classes - 1."""
    if not isinstance(labels, Tensor):
        raise UsageError(f"labels must be a tensor ({n},) int64, not a {type(labels).__name__}")
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise UsageError(f"labels must be ({n},) int64, not {tuple(labels.shape)} {labels.dtype}")
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(f"labels must be between 0 and {classes - 1}, not {int(labels.min())} to {int(labels.max())}")
