"""DiffAugment: differentiable augmentations (Zhao et al. 2020, arXiv:2006.10738)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(images: Tensor, names: Iterable[str], generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each with its own random augmentations, in the order of `names`.

    Args:
        names: any of "color" (brightness, saturation and contrast), "translation" (by up to an eighth of the size,
            padded with zeros) and "cutout" (a square of half the size is zero).
        generator: on the CPU.
    """
    for name in names:
        images = _AUGMENTATIONS[name](images, generator)
    return images


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, 1, 1) in [0, 1)."""
    return torch.rand(len(images), 1, 1, 1, generator=generator, dtype=torch.float32, device="cpu").to(
        images.device, images.dtype
    )


def _color(images: Tensor, generator: torch.Generator) -> Tensor:
    images = images + (_uniform(images, generator) - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * _uniform(images, generator))
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_uniform(images, generator) + 0.5)


def _translation(images: Tensor, generator: torch.Generator) -> Tensor:
    size, most = images.shape[-1], images.shape[-1] // 8
    rows, columns = torch.randint(0, 2 * most + 1, (2, len(images), 1), generator=generator, device="cpu").to(
        images.device
    )
    pixels = torch.arange(size, device=images.device)
    padded = F.pad(images, (most,) * 4).permute(0, 2, 3, 1)  # (N, H, W, C)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[sample, (rows + pixels)[:, :, None], (columns + pixels)[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    size, half = images.shape[-1], images.shape[-1] // 2
    centers = torch.randint(0, size + 1, (2, len(images), 1), generator=generator, device="cpu").to(images.device)
    pixels = torch.arange(size, device=images.device)
    rows, columns = ((pixels >= center - half // 2) & (pixels < center + half - half // 2) for center in centers)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


_AUGMENTATIONS = {"color": _color, "translation": _translation, "cutout": _cutout}
