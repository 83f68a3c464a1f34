"""Losses, each differentiable to any order: scalars, or one value per image where the docstring says (N,).

Adversarial losses, `*_discriminator_loss(real, fake)` and `*_generator_loss(fake)`, take the discriminator's logits, of
any shape, for real and for generated images. Reconstruction losses take images of one shape, the model's first.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def minimax_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-E[log D(x)] - E[log(1 - D(G(z)))] with D = sigmoid(logit) (Goodfellow et al. 2014, arXiv:1406.2661)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def minimax_generator_loss(fake: Tensor) -> Tensor:
    """E[log(1 - D(G(z)))], which saturates where D is confident (Goodfellow et al. 2014, arXiv:1406.2661)."""
    return -F.softplus(fake).mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """-E[log D(G(z))] (Goodfellow et al. 2014, section 3); the discriminator's loss is the minimax one."""
    return F.softplus(-fake).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Lim and Ye 2017, arXiv:1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-E[D(G(z))] (Lim and Ye 2017, arXiv:1705.02894)."""
    return -fake.mean()


def least_squares_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2 (Mao et al. 2017, arXiv:1611.04076, equation 9)."""
    return (real - 1).square().mean() / 2 + fake.square().mean() / 2


def least_squares_generator_loss(fake: Tensor) -> Tensor:
    """E[(D(G(z)) - 1)^2] / 2 (Mao et al. 2017, arXiv:1611.04076, equation 9)."""
    return (fake - 1).square().mean() / 2


def wasserstein_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-E[D(x)] + E[D(G(z))], for a D kept Lipschitz by `clip_weights_` or `gradient_penalty` (Arjovsky et al. 2017,
    arXiv:1701.07875).
    """
    return fake.mean() - real.mean()


def wasserstein_generator_loss(fake: Tensor) -> Tensor:
    """-E[D(G(z))] (Arjovsky et al. 2017, arXiv:1701.07875)."""
    return -fake.mean()


GAN_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "minimax": (minimax_discriminator_loss, minimax_generator_loss),
    "non_saturating": (minimax_discriminator_loss, non_saturating_generator_loss),
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "least_squares": (least_squares_discriminator_loss, least_squares_generator_loss),
    "wasserstein": (wasserstein_discriminator_loss, wasserstein_generator_loss),
}
"""Name -> (discriminator loss, generator loss)."""


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """E[|grad_x D(x)|^2], to be weighted by gamma / 2 (Mescheder et al. 2018, arXiv:1801.04406).

    Args:
        logits: D(images), shape (N,).
        images: real images (N, C, H, W) that require a gradient.
    """
    return _input_gradient(logits, images).square().sum(1).mean()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E[(|grad_x D(x)| - 1)^2] at random points x between real and generated images, to be weighted by lambda, 10 in
    the paper (Gulrajani et al. 2017, arXiv:1704.00028, algorithm 1).

    Args:
        discriminator: images -> logits (N,), each of which depends only on its own image (no batch norm).
        real, fake: images (N, C, H, W); no gradient flows into them.
        generator: draws the points, on its device.
    """
    device = real.device if generator is None else generator.device
    fraction = torch.rand(len(real), 1, 1, 1, generator=generator, dtype=torch.float32, device=device)
    between = torch.lerp(real.detach(), fake.detach(), fraction.to(real.device, real.dtype)).requires_grad_()
    gradient = _input_gradient(discriminator(between), between)
    return (gradient.norm(dim=1) - 1).square().mean()


def _input_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """The gradient of each image's logit with respect to that image: (N, C*H*W)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(1)


@torch.no_grad()
def clip_weights_(parameters: Iterable[Tensor], limit: float) -> None:
    """Clamps the parameters to [-limit, limit] in place, as after each discriminator step of a Wasserstein GAN
    (Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1).
    """
    torch._foreach_clamp_min_(clipped := list(parameters), -limit)
    torch._foreach_clamp_max_(clipped, limit)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over all but the first dimension: (N,) (Kingma and Welling 2014,
    arXiv:1312.6114, appendix B). `fastgen.nn.Reparameterize(kl=True)` computes it in the pass that draws z.
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def gaussian_nll(reconstruction: Tensor, images: Tensor, log_std: Tensor | float = 0.0) -> Tensor:
    """-log N(images; reconstruction, exp(log_std)^2) in nats, constants included: (N,) (with a learned log_std:
    Rybkin et al. 2021, arXiv:2006.13202).
    """
    log_std = torch.as_tensor(log_std, dtype=reconstruction.dtype, device=reconstruction.device)
    squares = ((images - reconstruction) * torch.exp(-log_std)).square()
    return (0.5 * squares + log_std + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def bernoulli_nll(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Binary cross-entropy of pixels (x + 1) / 2, for images and reconstructions in [-1, 1], in nats: (N,) (Kingma and
    Welling 2014, arXiv:1312.6114, appendix C.1). As in PyTorch, logarithms are clamped to -100 and above.
    """
    p, target = ((x + 1) / 2 for x in (reconstruction, images))
    return F.binary_cross_entropy(p.clamp(0, 1), target.clamp(0, 1), reduction="none").flatten(1).sum(1)


def l1_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """E|reconstruction - images|, over all values (Isola et al. 2017, arXiv:1611.07004, equation 3)."""
    return (reconstruction - images).abs().mean()


def l2_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """E[(reconstruction - images)^2], over all values (Pathak et al. 2016, arXiv:1604.07379)."""
    return (reconstruction - images).square().mean()


def cycle_loss(cycled: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Sum over the domains of E|F(G(x)) - x| (Zhu et al. 2017, arXiv:1703.10593, equation 2)."""
    return torch.stack([l1_loss(back, x) for back, x in zip(cycled, images, strict=True)]).sum()


def identity_loss(same: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Sum over the domains of E|G(y) - y|, where G is the generator into y's own domain (Zhu et al. 2017,
    arXiv:1703.10593, section 5.2; Taigman et al. 2017, arXiv:1611.02200).
    """
    return cycle_loss(same, images)


def feature_matching_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean over layers of |E[f(x)] - E[f(G(z))]|^2 / dimension of f (Salimans et al. 2016, arXiv:1606.03498, section
    3.1).

    Args:
        real, fake: the discriminator's features of each layer, (N, ...); no gradient flows into `real`.
    """
    distances = [l2_loss(g.mean(0), r.detach().mean(0)) for r, g in zip(real, fake, strict=True)]
    return torch.stack(distances).mean()
