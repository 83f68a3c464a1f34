"""What an image loses before a model is to give it back: noise on it, a rectangle of it, or its detail."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def corrupt(images: Tensor, task: str, generator: torch.Generator, noise: float = 0.5) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as the encoder is given them for a task.

    Args:
        task: "reconstruct" (as they are), "denoise" (with Gaussian noise of standard deviation `noise`), "inpaint" (a rectangle
            a half to three quarters as high and wide is 0) or "upscale" (at a quarter of the size, and back by bicubic
            interpolation).
        generator: on the CPU.
    """
    if task == "denoise":
        return images + noise * torch.randn(images.shape, generator=generator).to(images.device)
    if task == "inpaint":
        return images.masked_fill(missing_rectangles(images, generator), 0.0)
    if task == "upscale":
        small = interpolate(images, scale_factor=0.25, mode="bicubic", antialias=True)
        return interpolate(small, images.shape[-2:], mode="bicubic").clamp(-1, 1)
    return images


def missing_rectangles(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, H, W), bool: in each a rectangle a half to three quarters as high and wide."""
    sides = []
    for size in images.shape[-2:]:
        length = torch.randint(size // 2, 3 * size // 4 + 1, (len(images), 1), generator=generator)
        start = (torch.rand(len(images), 1, generator=generator) * (size - length + 1)).long()
        pixels = torch.arange(size)
        sides.append((pixels >= start) & (pixels < start + length))
    return (sides[0][:, None, :, None] & sides[1][:, None, None, :]).to(images.device)
