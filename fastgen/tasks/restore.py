"""Images put right by a VAE: the most probable latent, given what is known of the image, is decoded.

With y = A(x) + noise what is known, A the identity, a mask or the mean of squares of pixels, it is the z that maximises
log N(y; A(decode(z)), s^2) + log N(z; 0, 1), found by gradient from the encoder's guess (Bora et al. 2017,
arXiv:1703.03208).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fastgen.errors import UsageError
from fastgen.models import evaluating

_STD = 0.1  # of the pixels given z, for a model that does not say
_LEARNING_RATE = 0.1
_MAX_STEPS = 10**6


@torch.no_grad()
def reconstruct(model: Any, images: Tensor) -> Tensor:
    """decode(mean of q(z | images)), of images (N, C, H, W) in [-1, 1]."""
    with evaluating(model):
        return model.decode(model.encode(images)[0])


@torch.inference_mode(False)  # a search needs gradients
def denoise(model: Any, images: Tensor, *, std: float, steps: int = 100) -> Tensor:
    """Images without their noise.

    Args:
        images: (N, C, H, W), in [-1, 1] but for the noise.
        std: standard deviation of the noise, in the same unit: from 0 to 2.
        steps: of the search for the latent.
    """
    if not 0 <= std <= 2:
        raise UsageError(f"std must be between 0 and 2, not {std}")
    return _most_probable(model, images, images, lambda x: x, std, steps)


@torch.inference_mode(False)  # a search needs gradients
def inpaint(model: Any, images: Tensor, mask: Tensor, *, steps: int = 100) -> Tensor:
    """Images with what is missing filled in; the rest stays as it is.

    Args:
        images: (N, C, H, W) in [-1, 1]; what they hold under the mask is not looked at.
        mask: (H, W) or (N, 1, H, W), true where a pixel is missing.
        steps: of the search for the latent.

    Raises:
        UsageError: a mask of another shape, or one that leaves no pixel.
    """
    if mask.shape not in (images.shape[2:], (len(images), 1, *images.shape[2:])):
        raise UsageError(f"mask must be {tuple(images.shape[2:])} or one an image, not {tuple(mask.shape)}")
    missing = mask.bool().expand(len(images), 1, *images.shape[2:])
    known = (~missing).to(images)
    if not known.flatten(1).any(1).all():
        raise UsageError("mask must leave a pixel of each image")
    images = images.where(~missing, 0)
    return images.where(~missing, _most_probable(model, images, images, lambda x: x * known, 0.0, steps))


@torch.inference_mode(False)  # a search needs gradients
def upscale(model: Any, images: Tensor, *, steps: int = 100) -> Tensor:
    """Images at the model's size, whose squares of pixels have the means that were given, as far as [-1, 1] allows.

    Args:
        images: (N, C, h, w) in [-1, 1], h and w the model's `config.image_size` over a whole number.
        steps: of the search for the latent.
    """
    side, (height, width) = model.config.image_size, images.shape[2:]
    if height != width or height < 1 or side % height or height == side:
        raise UsageError(f"images must be squares of {side} pixels over 2, 3, ..., not {height}x{width}")
    factor = side // height

    def shrink(x: Tensor) -> Tensor:
        return avg_pool2d(x, factor)

    guess = interpolate(images, size=(side, side), mode="bicubic").clamp(-1, 1)
    found = _most_probable(model, images, guess, shrink, 0.0, steps)
    return (found + interpolate(images - shrink(found), size=(side, side))).clamp(-1, 1)


def _most_probable(
    model: Any, known: Tensor, guess: Tensor, degrade: Callable[[Tensor], Tensor], noise: float, steps: int
) -> Tensor:
    """decode(z) for the z that fits `known` best; `guess` is an image to start from."""
    if not 0 <= steps <= _MAX_STEPS:
        raise UsageError(f"steps must be between 0 and {_MAX_STEPS}, not {steps}")
    log_std = getattr(model, "log_std", None)
    std = _STD if log_std is None else float(log_std.detach().exp())
    with evaluating(model):
        with torch.no_grad():
            z = model.encode(guess)[0]
        with torch.enable_grad():
            known, z = known.clone(), z.clone().requires_grad_()  # which may come from inference mode
            optimizer = torch.optim.Adam([z], _LEARNING_RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
            for _ in range(steps):
                misfit = (degrade(model.decode(z)) - known).square().sum() / (std**2 + noise**2)
                (z.grad,) = torch.autograd.grad((misfit + z.square().sum()) / 2, z)
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return model.decode(z)
