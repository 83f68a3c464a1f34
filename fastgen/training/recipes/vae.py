from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen import losses
from fastgen.training.config import VAETraining
from fastgen.training.recipes.base import Recipe


class VAERecipe(Recipe):
    """The evidence lower bound (Kingma and Welling 2014, arXiv:1312.6114), with a weight on its KL term (Higgins et al.
    2017) that is warmed up (Bowman et al. 2016, arXiv:1511.06349).
    """

    parts: ClassVar = {"model": ("",)}
    averaged = ("",)
    config: VAETraining

    def make_model_options(self) -> dict[str, Any]:
        config = self.config
        self.model_name = "vae" if config.architecture == "conv" else "vae_mlp"
        channels = self.single_dataset().channels
        if config.architecture == "mlp":
            return self.shared_options(channels=channels, width=25 * config.width)
        widths = [config.width * 2**level for level in range(config.halvings)]
        return self.shared_options(channels=channels, widths=widths)

    def step(self, step: int) -> dict[str, Tensor]:
        config, model = self.config, self.model
        (batch,) = self.next_batches()
        with self.autocast():
            mu, logvar = model.encode(batch.images)
            z, kl = model.reparameterize(mu.float(), logvar.float())
            reconstruction = model.decode(z).float()
        model.fit_log_std(losses.l2_loss(reconstruction, batch.images), 0.05)
        nll, kl = model.nll(reconstruction, batch.images).mean(), kl.mean()
        ramp = config.warm_up * config.steps
        beta = config.beta * min(1.0, (step + 1) / ramp if ramp else 1.0)
        self.update("model", (nll + beta * kl) / batch.images[0].numel())
        return {"nll": nll.detach(), "kl": kl.detach(), "bound": (nll + kl).detach()}

    @torch.no_grad()
    def finish_average(self) -> None:
        super().finish_average()
        errors = [
            losses.l2_loss(self.ema.model(images, noise)[0], images) for images, noise in self._calibration_batches()
        ]
        self.ema.model.fit_log_std(torch.stack(errors).mean())

    def calibrate(self, model: Any) -> None:
        for images, noise in self._calibration_batches():
            model(images, noise)

    def _calibration_batches(self) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Batches of images, evenly spread over the data, and a generator of noise: the same every time."""
        count = min(2048, len(self.data))
        count -= count > 1 and count % 256 == 1  # batch norm cannot take a batch of one image
        noise = torch.Generator(self.device).manual_seed(self.config.seed)
        for indices in (torch.arange(count, device="cpu") * len(self.data) // count).split(256):
            yield self.data.batch(indices).to(self.device).images, noise

    def sample(self, n: int, seed: int) -> Tensor:
        return self.ema.model.sample(n, generator=torch.Generator().manual_seed(seed))
