"""Image restoration with a VAE: decode the most probable latent, given what is known of the image.

Known is y = A(x) + noise, where A is the identity, a mask or average pooling. The latent is the z that maximises
log N(y; A(decode(z)), s^2) + log N(z; 0, 1), found by gradient descent from the encoder's mean (Bora et al. 2017,
arXiv:1703.03208).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fastgen.errors import UsageError
from fastgen.models import capabilities, evaluating

_STD = 0.1  # standard deviation of pixels given z, for a model without log_std
_LEARNING_RATE = 0.1
_MAX_STEPS = 10**6


@torch.no_grad()
def reconstruct(model: Any, images: Tensor) -> Tensor:
    """decode(mean of q(z | images)) of images (N, C, H, W) in [-1, 1]."""
    with evaluating(model):
        return model.decode(model.encode(images)[0])


@torch.inference_mode(False)  # the optimization needs gradients
def denoise(model: Any, images: Tensor, *, std: float, steps: int = 100) -> Tensor:
    """Images without their noise.

    Args:
        images: (N, C, H, W), in [-1, 1] but for the noise.
        std: standard deviation of the noise, from 0 to 2.
        steps: optimization steps.
    """
    if not 0 <= std <= 2:
        raise UsageError(f"std must be between 0 and 2, not {std}")
    return _most_probable(model, images, images, lambda x: x, std, steps)


@torch.inference_mode(False)  # the optimization needs gradients
def inpaint(model: Any, images: Tensor, mask: Tensor, *, steps: int = 100) -> Tensor:
    """Images whose missing pixels are filled in; the others stay as they are.

    Args:
        images: (N, C, H, W) in [-1, 1]; their values under the mask are ignored.
        mask: (H, W) or (N, 1, H, W), true where a pixel is missing.
        steps: optimization steps.

    Raises:
        UsageError: a mask of another shape, or one that leaves no pixel of an image.
    """
    if mask.shape not in (images.shape[2:], (len(images), 1, *images.shape[2:])):
        height, width = images.shape[2:]
        raise UsageError(
            f"mask must be {(height, width)} or {(len(images), 1, height, width)}, not {tuple(mask.shape)}"
        )
    missing = mask.bool().expand(len(images), 1, *images.shape[2:])
    known = (~missing).to(images)
    if not known.flatten(1).any(1).all():
        raise UsageError("mask must leave at least one pixel of each image")
    images = images.where(~missing, 0)
    return images.where(~missing, _most_probable(model, images, images, lambda x: x * known, 0.0, steps))


@torch.inference_mode(False)  # the optimization needs gradients
def upscale(model: Any, images: Tensor, *, steps: int = 100) -> Tensor:
    """Images at the model's size that average to the given ones, as far as values in [-1, 1] allow.

    Args:
        images: (N, C, h, h) in [-1, 1], h the model's image size divided by an integer.
        steps: optimization steps.
    """
    side, (height, width) = capabilities(model).image_size, images.shape[2:]
    if side is None:
        raise UsageError(f"this {type(model).__name__} does not say its image size, which upscaling needs")
    if height != width or height < 1 or side % height or height == side:
        raise UsageError(f"images must be square, of {side} pixels divided by 2, 3, ..., not {height}x{width}")
    factor = side // height

    def shrink(x: Tensor) -> Tensor:
        return avg_pool2d(x, factor)

    guess = interpolate(images, size=(side, side), mode="bicubic").clamp(-1, 1)
    enlarged = _most_probable(model, images, guess, shrink, 0.0, steps)
    return (enlarged + interpolate(images - shrink(enlarged), size=(side, side))).clamp(-1, 1)


def _most_probable(
    model: Any, known: Tensor, guess: Tensor, degrade: Callable[[Tensor], Tensor], noise: float, steps: int
) -> Tensor:
    """decode(z) for the most probable z given `known`, starting at the encoding of the image `guess`."""
    if not 0 <= steps <= _MAX_STEPS:
        raise UsageError(f"steps must be between 0 and {_MAX_STEPS}, not {steps}")
    log_std = getattr(model, "log_std", None)
    std = _STD if log_std is None else float(log_std.detach().exp())
    with evaluating(model):
        with torch.no_grad():
            z = model.encode(guess)[0]
        with torch.enable_grad():
            known, z = known.clone(), z.clone().requires_grad_()  # they may have been made in inference mode
            optimizer = torch.optim.Adam([z], _LEARNING_RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
            for _ in range(steps):
                misfit = (degrade(model.decode(z)) - known).square().sum() / (std**2 + noise**2)
                (z.grad,) = torch.autograd.grad((misfit + z.square().sum()) / 2, z)
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return model.decode(z)
