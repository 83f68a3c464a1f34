from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen import losses
from fastgen.data import Batch
from fastgen.models import evaluating
from fastgen.training.augment import augment
from fastgen.training.config import DCGANTraining, GANTraining, MLPGANTraining
from fastgen.training.recipes.base import Recipe, frozen

_CALIBRATION = 4096  # images from which the statistics of batch norms are estimated


class GANRecipe(Recipe):
    """`d_steps` updates of the discriminator, then one of the generator, on the last images that the discriminator saw.

    The penalties need a discriminator without batch norm, which would mix the gradients of a batch's images.
    """

    parts: ClassVar = {"generator": ("generator",), "discriminator": ("discriminator",)}
    config: GANTraining

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        """The encoded conditions of generator and discriminator, each (N, ...)."""
        return ()

    def sample_conditions(self, model: Any, n: int) -> tuple[Tensor, ...]:
        """Encoded conditions for n samples."""
        return ()

    def logits(self, real: Tensor, fake: Tensor, batch: Batch, conditions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The discriminator's logits for the images that count as real and those that count as generated."""
        both = [torch.cat([condition, condition]) for condition in conditions]
        real_logits, fake_logits = self.judge(torch.cat([real, fake]), *both).chunk(2)
        return real_logits, fake_logits

    def judge(self, images: Tensor, *conditions: Tensor) -> Tensor:
        with self.autocast():
            return self.model.discriminator(images, *conditions).float()

    def step(self, step: int) -> dict[str, Tensor]:
        config = self.config
        discriminator_loss, generator_loss = losses.GAN_LOSSES[config.loss]
        for at in range(config.d_steps):
            (batch,) = self.next_batches()
            conditions = self.conditions(batch)
            constants = tuple(condition.detach() for condition in conditions)
            z = self.model.latent(len(batch), generator=self.noise)
            with torch.set_grad_enabled(at == config.d_steps - 1), self.autocast():
                fake = self.model.generate(z, *constants).float()
            real = self._augment(batch.images)
            d_loss = discriminator_loss(*self.logits(real, self._augment(fake.detach()), batch, conditions))
            report = {"d_loss": d_loss.detach()}
            penalty, penalties = self._penalty(step, real, fake.detach(), constants)
            self.update("discriminator", d_loss + penalty)
            if config.clip_weights:
                losses.clip_weights_(self.model.discriminator.parameters(), config.clip_weights)
        with frozen(self.model.discriminator):
            g_loss = generator_loss(self.judge(self._augment(fake), *constants))
            self.update("generator", g_loss)
        return report | penalties | {"g_loss": g_loss.detach()}

    def _penalty(
        self, step: int, real: Tensor, fake: Tensor, conditions: tuple[Tensor, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the penalties that the settings ask for, and each penalty without its weight."""
        config, report = self.config, {}
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        if config.r1_gamma and step % config.r1_every == 0:
            real = real.detach().requires_grad_()
            report["r1"] = losses.r1_penalty(self.judge(real, *conditions), real)
            total += config.r1_gamma / 2 * config.r1_every * report["r1"]
        if config.gradient_penalty:
            report["gradient_penalty"] = losses.gradient_penalty(
                lambda images: self.judge(images, *conditions), real, self._augment(fake), generator=self.noise
            )
            total += config.gradient_penalty * report["gradient_penalty"]
        return total, {name: value.detach() for name, value in report.items()}

    def _augment(self, images: Tensor) -> Tensor:
        return augment(images, self.config.augmentations, self.noise)

    def calibrate(self, model: Any) -> None:
        z = model.latent(_CALIBRATION, generator=torch.Generator().manual_seed(self.config.seed))
        for part in zip(*(tensor.split(256) for tensor in (z, *self.sample_conditions(model, len(z)))), strict=True):
            model.generate(*part)

    def sample(self, n: int, seed: int) -> Tensor:
        model = self.ema.model
        with evaluating(model), torch.no_grad():
            conditions = self.sample_conditions(model, n)
        return model.draw(n, torch.Generator().manual_seed(seed), *conditions)


class MLPGANRecipe(GANRecipe):
    """Goodfellow et al. 2014, arXiv:1406.2661."""

    model_name = "gan"
    config: MLPGANTraining

    def make_model_options(self) -> dict[str, Any]:
        return self.shared_options(channels=self.single_dataset().channels)


class DCGANRecipe(GANRecipe):
    """Radford et al. 2015, arXiv:1511.06434; loss and penalties as the settings say."""

    model_name = "dcgan"
    config: DCGANTraining

    def make_model_options(self) -> dict[str, Any]:
        return self.shared_options(channels=self.single_dataset().channels, discriminator_norm="none")
