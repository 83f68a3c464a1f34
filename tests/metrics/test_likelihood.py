import math
from types import SimpleNamespace

import pytest
import torch

from fastgen.errors import UsageError
from fastgen.metrics import PCAGaussian, vae_log_likelihood
from tests.support.tolerance import units

LATENT, STD = 2, 0.5


@pytest.fixture
def linear():
    """x = W z + b + noise: a VAE whose p(x) is known, and one whose posterior is too wide."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, LATENT, generator=generator), torch.randn(6, generator=generator)
    precision = torch.eye(LATENT) + weight.T @ weight / STD**2
    covariance = precision.inverse()
    # W's columns are made orthogonal, so that the posterior is diagonal
    values, vectors = torch.linalg.eigh(covariance)
    weight, covariance = weight @ vectors, torch.diag(values)

    def encode(images, extra=0.0):
        mu = (images.flatten(1) - bias) @ weight / STD**2 @ covariance
        return mu, (covariance.diagonal().log() + extra).expand(len(images), -1)

    def nll(decoded, images):
        distance = ((decoded - images) / STD).square().flatten(1).sum(1)
        return distance / 2 + 6 * math.log(STD) + 3 * math.log(2 * math.pi)

    def decode(z):
        return (z @ weight.T + bias).view(-1, 1, 2, 3)

    z, noise = torch.randn(500, LATENT, generator=generator), torch.randn(500, 1, 2, 3, generator=generator)
    images = decode(z) + STD * noise
    exact = torch.distributions.MultivariateNormal(bias, weight @ weight.T + STD**2 * torch.eye(6))
    return SimpleNamespace(
        exact=SimpleNamespace(encode=encode, decode=decode, nll=nll),
        wide=SimpleNamespace(encode=lambda images: encode(images, 1.0), decode=decode, nll=nll),
        images=images,
        log_p=exact.log_prob(images.flatten(1)).double(),
    )


LOG_P = units(torch.float32, 256, 256)  # float32: a sum of terms up to fifty times as large that cancel


def test_the_bounds_are_exact_where_the_posterior_is(linear):
    for bound in vae_log_likelihood(linear.exact, linear.images[:20], samples=3):
        torch.testing.assert_close(bound, linear.log_p[:20], **LOG_P)


def test_more_samples_approach_the_likelihood_from_below(linear):
    images, draw = linear.images[:100], torch.Generator().manual_seed(1)
    gaps = []
    for samples in (1, 10, 1000):
        elbo, bound = vae_log_likelihood(linear.wide, images, samples=samples, generator=draw)
        assert (bound >= elbo - 1e-9).all()
        gaps.append((linear.log_p[:100] - bound).mean().item())
    assert gaps[0] > 0.2 > 2 * abs(gaps[1]) and abs(gaps[2]) < 0.01
    with pytest.raises(UsageError, match="samples must be at least 1"):
        vae_log_likelihood(linear.wide, images, samples=0)


def test_the_pca_gaussian_is_the_best_linear_model(linear):
    fitted = PCAGaussian(linear.images, LATENT)
    assert fitted.noise.sqrt().item() == pytest.approx(STD, rel=0.05)
    found = fitted.log_likelihood(linear.images)
    covariance = fitted.directions @ (fitted.variances - fitted.noise).diag() @ fitted.directions.T
    density = torch.distributions.MultivariateNormal(
        fitted.mean, covariance + fitted.noise * torch.eye(6, dtype=torch.float64)
    )
    torch.testing.assert_close(found, density.log_prob(linear.images.flatten(1).double()))
    assert linear.log_p.mean() < found.mean() < linear.log_p.mean() + 0.1
    for latent in (0, 6):
        with pytest.raises(UsageError, match=f"latent must be between 1 and 5, not {latent}"):
            PCAGaussian(linear.images, latent)
