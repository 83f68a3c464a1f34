"""The base classes of the models, and their shared checks and layers."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models._capabilities import Capabilities
from fastgen.nn import Sequential

_SAMPLE_BATCH = 256  # images per forward pass of `sample`, which bounds its memory


class Generative(nn.Module):
    """A model that draws images from noise (N, config.nz)."""

    config: Any
    generate: Callable[..., Tensor]
    """Images (N, channels, image_size, image_size) in [-1, 1], from noise (N, nz) and the encoded conditions."""

    @property
    def capabilities(self) -> Capabilities:
        """The model's inputs and outputs."""
        config = self.config
        return Capabilities(config.image_size, config.channels, draws=True, latent_shape=(config.nz,))

    def example_inputs(self, n: int) -> dict[str, tuple[Tensor, ...]]:
        """The submodules that a training step runs ("" is the whole model), each with inputs for n images, on the
        CPU."""
        raise NotImplementedError

    def latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise (n, nz), drawn in float32 on `generator`'s device, in the model's dtype and on its
        device.

        Raises:
            UsageError: n is not a number of images, or the generator is not a torch.Generator.
        """
        n = check_count(n)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise UsageError(f"generator must be a torch.Generator, not {generator!r}")
        weight = next(self.parameters())
        device = weight.device if generator is None else generator.device
        noise = torch.randn(n, self.config.nz, generator=generator, dtype=torch.float32, device=device)
        return noise.to(weight.device, weight.dtype)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` images (n, channels, image_size, image_size) in [-1, 1], drawn in eval mode and without gradients."""
        return self.draw(n, generator)

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator | None = None, *conditions: Tensor) -> Tensor:
        """`sample`, with the encoded conditions (n, ...) that `generate` takes."""
        with evaluating(self):
            batches = (tensor.split(_SAMPLE_BATCH) for tensor in (self.latent(n, generator=generator), *conditions))
            return torch.cat([self.generate(*batch) for batch in zip(*batches, strict=True)])


class Adversarial(Generative):
    """A model with a `generator` of noise and encoded conditions, and a `discriminator` of images and the same."""

    generator: nn.Module
    discriminator: nn.Module

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, discriminator=self.discriminator)

    def example_inputs(self, n: int) -> dict[str, tuple[Tensor, ...]]:
        conditions = [condition.example(n) for condition in self.capabilities.conditions]
        z = torch.randn(n, self.config.nz, dtype=torch.float32, device="cpu")
        images = random_images(n, self.config.channels, self.config.image_size)
        return {"generator": (z, *conditions), "discriminator": (images, *conditions)}


def random_images(n: int, channels: int, image_size: int) -> Tensor:
    """Uniform noise (n, channels, image_size, image_size) in [-1, 1], on the CPU."""
    return torch.rand(n, channels, image_size, image_size, dtype=torch.float32, device="cpu") * 2 - 1


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts the model into eval mode within the context; afterwards each of its modules has its mode back. An object
    that is not an nn.Module has no mode."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    if modes:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_count(n: int) -> int:
    """n as an int.

    Raises:
        UsageError: n is not a number of images.
    """
    with contextlib.suppress(TypeError):
        if 0 <= operator.index(n) < 2**31:
            return operator.index(n)
    raise UsageError(f"n must be a number of images below 2^31, not {n!r}")


def check_noise(z: Tensor, nz: int) -> Tensor:
    """z as (N, nz).

    Raises:
        UsageError: z is neither (N, nz) nor (N, nz, 1, 1), or not floating-point.
    """
    if z.dim() not in (2, 4) or z.shape[1] != nz or z.shape[2:].numel() != 1:
        raise UsageError(f"z must be (N, {nz}) or (N, {nz}, 1, 1), not {tuple(z.shape)}")
    if not z.dtype.is_floating_point:
        raise UsageError(f"z must be floating-point, not {z.dtype}")
    return z.view(-1, nz)


def check_images(images: Tensor, channels: int, image_size: int | None = None) -> None:
    """Raises UsageError unless images are floating-point and (N, channels, image_size, image_size), or of any size if
    image_size is None."""
    sizes = ("H", "W") if image_size is None else (image_size, image_size)
    if images.dim() != 4 or images.shape[1] != channels or (image_size is not None and images.shape[2:] != sizes):
        raise UsageError(f"images must be (N, {', '.join(map(str, (channels, *sizes)))}), not {tuple(images.shape)}")
    if not images.dtype.is_floating_point:
        raise UsageError(f"images must be floating-point in [-1, 1], not {images.dtype}")


def check_each(name: str, conditions: Tensor, n: int, *shape: int) -> None:
    """Raises UsageError unless `conditions`, which the error calls `name`, are (n, *shape)."""
    if conditions.shape != (n, *shape):
        raise UsageError(f"{name} must be {(n, *shape)}, as there are {n} images, not {tuple(conditions.shape)}")


def normal_init(module: nn.Module) -> None:
    """Weights of pytorch/examples' DCGAN: convolutions N(0, 0.02), batch norm gamma N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def norm_layer(norm: str, channels: int) -> nn.Module | None:
    """The norms of pytorch-CycleGAN-and-pix2pix: "batch", "instance" without parameters and running statistics, or
    "none"."""
    layers = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
    return None if norm == "none" else layers[norm](channels)


def numbered(children: list[nn.Module | None]) -> Sequential:
    """The children, named by their positions; None takes a position too."""
    sequential = Sequential()
    for number, child in enumerate(children):
        if child is not None:
            sequential.add_module(str(number), child)
    return sequential
