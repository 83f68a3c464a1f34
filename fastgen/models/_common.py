"""What the models have in common."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.nn import Sequential

_SAMPLE_BATCH = 256  # images a forward pass of `sample`, which bounds its memory


class Generative(nn.Module):
    """A model that makes images from noise (N, config.nz)."""

    config: Any
    generate: Callable[..., Tensor]
    """Images (N, channels, image_size, image_size) in [-1, 1], from noise (N, nz) and the conditions that a model
    has."""

    def latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise (n, nz), drawn in float32 on `generator`'s device; of the model's dtype, on its device.

        Raises:
            UsageError: n is no number of images, or the generator none of PyTorch's.
        """
        n = check_count(n)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise UsageError(f"generator must be a torch.Generator, not {generator!r}")
        weight = next(self.parameters())
        device = weight.device if generator is None else generator.device
        noise = torch.randn(n, self.config.nz, generator=generator, dtype=torch.float32, device=device)
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
def evaluating(model: Any) -> Iterator[None]:
    """The model is in eval mode within the context; afterwards each of its modules has the mode that it had. What is no
    nn.Module has no mode."""
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
        UsageError: it is no number of images.
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
    """Raises UsageError unless images are (N, channels, image_size, image_size), or of any size, and floating-point."""
    sizes = ("H", "W") if image_size is None else (image_size, image_size)
    if images.dim() != 4 or images.shape[1] != channels or (image_size is not None and images.shape[2:] != sizes):
        raise UsageError(f"images must be (N, {', '.join(map(str, (channels, *sizes)))}), not {tuple(images.shape)}")
    if not images.dtype.is_floating_point:
        raise UsageError(f"images must be floating-point in [-1, 1], not {images.dtype}")


def check_each(name: str, conditions: Tensor, n: int, *shape: int) -> None:
    """Raises UsageError unless there is a condition (*shape) for each of n images; `name` is what they are."""
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
    """The norms of pytorch-CycleGAN-and-pix2pix: "batch", "instance" without parameters and statistics, or "none"."""
    layers = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
    return None if norm == "none" else layers[norm](channels)


def numbered(children: list[nn.Module | None]) -> Sequential:
    """The children under their numbers; None takes a number too."""
    sequential = Sequential()
    for number, child in enumerate(children):
        if child is not None:
            sequential.add_module(str(number), child)
    return sequential
