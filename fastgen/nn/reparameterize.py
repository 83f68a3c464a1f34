from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen import ops


class Reparameterize(nn.Module):
    """A differentiable sample from N(mu, exp(logvar)), whose noise is drawn inside the op, in both training and eval
    mode.

    Args:
        kl: return (z, kl), where kl (N,) is the Kullback-Leibler divergence of each sample from the prior.
        prior_mean, prior_logvar, free_bits, beta: options of the divergence, as in fastgen.ops.reparameterize_kl.
        num_samples, logvar_range: options of z, as there.

    forward(mu, logvar, generator=None): mu and logvar (N, *); z has mu's shape, or (num_samples, N, *).
    """

    def __init__(
        self,
        *,
        kl: bool = False,
        prior_mean: float | None = None,
        prior_logvar: float | None = None,
        free_bits: float = 0.0,
        beta: float = 1.0,
        num_samples: int | None = None,
        logvar_range: tuple[float | None, float | None] | None = None,
    ):
        super().__init__()
        self.kl, self.num_samples, self.logvar_range = kl, num_samples, logvar_range
        self.prior_mean, self.prior_logvar, self.free_bits, self.beta = prior_mean, prior_logvar, free_bits, beta

    def forward(
        self, mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.kl:
            return ops.reparameterize(
                mu, logvar, num_samples=self.num_samples, logvar_range=self.logvar_range, generator=generator
            )
        return ops.reparameterize_kl(
            mu, logvar, prior_mean=self.prior_mean, prior_logvar=self.prior_logvar, free_bits=self.free_bits,
            beta=self.beta, num_samples=self.num_samples, logvar_range=self.logvar_range, generator=generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"kl={self.kl}, num_samples={self.num_samples}, logvar_range={self.logvar_range}"
