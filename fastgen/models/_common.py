"""What the models have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError

_SAMPLE_BATCH = 256  # images a forward pass of `sample`, which bounds its memory


class Generative(nn.Module):
    """A model that makes images from noise (N, config.nz)."""

    config: Any
    generate: Callable[..., Tensor]
    """Images (N, channels, image_size, image_size) in [-1, 1], from noise (N, nz) and the conditions that a model has."""

    def latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise (n, nz), drawn on `generator`'s device and moved to the model's."""
        weight = next(self.parameters())
        device = weight.device if generator is None else generator.device
        noise = torch.randn(n, self.config.nz, generator=generator, device=device)
        return noise.to(weight.device, weight.dtype)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` images (n, channels, image_size, image_size) in [-1, 1], made in eval mode and without gradients."""
        return self.draw(n, generator)

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator | None = None, *conditions: Tensor) -> Tensor:
        """`sample`, with the conditions (n, ...) that `generate` takes."""
        with evaluating(self):
            parts = (tensor.split(_SAMPLE_BATCH) for tensor in (self.latent(n, generator=generator), *conditions))
            return torch.cat([self.generate(*part) for part in zip(*parts, strict=True)])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode within the context; afterwards each of its modules has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_noise(z: Tensor, nz: int) -> Tensor:
    """z as (N, nz).

    Raises:
        UsageError: z is neither (N, nz) nor (N, nz, 1, 1).
    """
    if z.dim() not in (2, 4) or z.shape[1] != nz or z.shape[2:].numel() != 1:
        raise UsageError(f"z must be (N, {nz}) or (N, {nz}, 1, 1), not {tuple(z.shape)}")
    return z.view(-1, nz)


def check_images(images: Tensor, channels: int, image_size: int) -> None:
    """Raises UsageError unless images are (N, channels, image_size, image_size)."""
    shape = (channels, image_size, image_size)
    if images.dim() != 4 or images.shape[1:] != shape:
        raise UsageError(f"images must be (N, {', '.join(map(str, shape))}), not {tuple(images.shape)}")


def normal_init(module: nn.Module) -> None:
    """Weights of pytorch/examples' DCGAN: convolutions N(0, 0.02), batch norm gamma N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """The norms of pytorch-CycleGAN-and-pix2pix: "batch", or "instance" without parameters and statistics."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)
