from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from fastgen import losses
from fastgen.data import ImageDataset
from fastgen.training.config import DCGANTraining
from fastgen.training.ema import reestimate_batch_norm
from fastgen.training.recipes.base import Recipe


class DCGANRecipe(Recipe):
    """Non-saturating GAN loss, lazy R1 (Karras et al. 2020, arXiv:1912.04958, section 3.1)."""

    model_name = "dcgan"

    config: DCGANTraining

    def make_model_options(self, data: ImageDataset) -> dict[str, Any]:
        config = self.config
        return {
            "image_size": config.image_size,
            "channels": data.channels,
            "nz": config.nz,
            "ngf": config.ngf,
            "ndf": config.ndf,
            "discriminator_norm": "none",  # R1 is a penalty on each image's own gradient; batch norm would mix them
        }

    def make_optimizers(self) -> dict[str, Optimizer]:
        lr, betas = self.config.lr, (self.config.beta1, self.config.beta2)
        parts = {"generator": self.model.generator, "discriminator": self.model.discriminator}
        return {name: Adam(part.parameters(), lr, betas, fused=True) for name, part in parts.items()}

    def step(self, step: int, indices: Tensor) -> dict[str, Tensor]:
        config, discriminator = self.config, self.model.discriminator
        self._set_learning_rate(step / config.steps)
        real = self.data.batch(indices).to(self.device).images
        fake = self.model.generator(self.model.latent(len(real), generator=self.noise))

        discriminator.requires_grad_(True)
        self.optimizers["discriminator"].zero_grad()
        real_logits, fake_logits = discriminator(torch.cat([real, fake.detach()])).chunk(2)
        d_loss = losses.minimax_discriminator_loss(real_logits, fake_logits)
        d_loss.backward()
        report = {"d_loss": d_loss.detach()}
        if config.r1_gamma > 0 and step % config.r1_every == 0:
            real = real.requires_grad_()
            penalty = losses.r1_penalty(discriminator(real), real)
            (config.r1_gamma / 2 * config.r1_every * penalty).backward()
            report["r1"] = penalty.detach()
        self.optimizers["discriminator"].step()

        discriminator.requires_grad_(False)
        self.optimizers["generator"].zero_grad()
        g_loss = losses.non_saturating_generator_loss(discriminator(fake))
        g_loss.backward()
        self.optimizers["generator"].step()
        self.ema.update(step)
        return report | {"g_loss": g_loss.detach()}

    def _set_learning_rate(self, progress: float) -> None:
        """Constant, then linear to 0; `progress` runs from 0 to 1."""
        start = self.config.lr_decay_from
        factor = (1 - progress) / (1 - start) if progress > start else 1.0
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * factor

    def finish_average(self) -> None:
        noise = torch.Generator().manual_seed(self.config.seed)
        reestimate_batch_norm(self.ema.module, self.model.latent(4096, generator=noise).split(256))
