"""Likelihoods of images: a VAE's bounds, and a Gaussian that any VAE of the same latent size should beat."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import UsageError
from fastgen.metrics._check import check_finite

_MAX_DECODED = 1024  # latents per forward pass


@torch.no_grad()
def vae_log_likelihood(
    model: Any, images: Tensor, *, samples: int = 64, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Two lower bounds of log p(x), in nats, of images (N, C, H, W) in [-1, 1].

    Args:
        model: with `encode(images) -> (mu, logvar)`, `decode(z)` and `nll(decoded, images)`, -log p(x|z) per image.
        samples: K, the number of z that are drawn from q(z|x) per image.
        generator: draws them, on its device.

    Returns:
        The ELBO, E[log p(x|z) + log p(z) - log q(z|x)] over the K samples, and the importance-weighted bound
        log(1/K sum p(x|z) p(z) / q(z|x)) (Burda et al. 2016, arXiv:1509.00519), each (N,) float64. The second is never
        below the first and approaches log p(x) as K grows.

    Raises:
        UsageError: samples below 1.
        DataError: an image, or the model's output for it, is not finite.
    """
    if samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    check_finite("images", images)
    weights = []
    for part in images.split(max(1, _MAX_DECODED // samples)):
        mu, logvar = model.encode(part)
        device = mu.device if generator is None else generator.device
        noise = torch.randn(samples, *mu.shape, generator=generator, device=device, dtype=torch.float32).to(mu)
        z = mu + (logvar / 2).exp() * noise  # (K, n, nz)
        repeated = part.expand(samples, *part.shape).flatten(0, 1)
        log_px = -model.nll(model.decode(z.flatten(0, 1)), repeated).double().view(samples, len(part))
        # log N(z; 0, 1) - log N(z; mu, var); the constants cancel
        log_ratio = (noise.square() + logvar - z.square()).double().sum(2) / 2
        weights.append(log_px + log_ratio)
    joined = torch.cat(weights, 1)
    check_finite("the model's output for the images", joined.T)
    return joined.mean(0), joined.logsumexp(0) - math.log(samples)


class PCAGaussian:
    """The Gaussian of probabilistic PCA (Tipping and Bishop 1999): an optimal linear VAE with `latent` dimensions.

    Args:
        images: (N, C, H, W), N > latent; the Gaussian is fitted to them by maximum likelihood, in float64.
        latent: number of principal directions with their own variance; all others share one.

    Raises:
        UsageError: more directions than images or pixels.
        DataError: an image is not finite.
    """

    def __init__(self, images: Tensor, latent: int) -> None:
        check_finite("images", images)
        x = images.flatten(1).double()
        dimensions = x.shape[1]
        if not 0 < latent < min(len(x), dimensions):
            raise UsageError(f"latent must be between 1 and {min(len(x), dimensions) - 1}, not {latent}")
        self.mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        self.noise = values[:-latent].clamp(min=0).mean().clamp(min=1e-12)
        self.variances = values[-latent:].clamp(min=self.noise)
        self.directions = vectors[:, -latent:]  # (D, latent)

    def log_likelihood(self, images: Tensor) -> Tensor:
        """log p(x) in nats, (N,) float64."""
        x = images.flatten(1).double() - self.mean
        along = x @ self.directions
        across = x.square().sum(1) - along.square().sum(1)
        rest = x.shape[1] - len(self.variances)
        log_det = self.variances.log().sum() + rest * self.noise.log()
        distance = (along.square() / self.variances).sum(1) + across.clamp(min=0) / self.noise
        return -(distance + log_det + x.shape[1] * math.log(2 * math.pi)) / 2
