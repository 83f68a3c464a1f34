"""Losses of adversarial training: logits (N,) in, a scalar out, differentiable to any order.

A `*_discriminator_loss(real, fake)` and a `*_generator_loss(fake)` take the discriminator's logits for real and for
generated images.
"""

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from fastgen.ops import without_weight_grads


def minimax_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-E[log D(x)] - E[log(1 - D(G(z)))] with D = sigmoid(logit) (Goodfellow et al. 2014, arXiv:1406.2661)."""
    return softplus(-real).mean() + softplus(fake).mean()


def minimax_generator_loss(fake: Tensor) -> Tensor:
    """E[log(1 - D(G(z)))], which saturates where D is sure (Goodfellow et al. 2014, arXiv:1406.2661)."""
    return -softplus(fake).mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """-E[log D(G(z))] (Goodfellow et al. 2014, section 3); its discriminator's loss is the minimax one."""
    return softplus(-fake).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Lim and Ye 2017, arXiv:1705.02894)."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-E[D(G(z))] (Lim and Ye 2017, arXiv:1705.02894)."""
    return -fake.mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """E[|grad_x D(x)|^2], to be weighted by gamma / 2 (Mescheder et al. 2018, arXiv:1801.04406).

    Args:
        logits: D(images), shape (N,).
        images: real images (N, C, H, W) that require a gradient.
    """
    with without_weight_grads():
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
