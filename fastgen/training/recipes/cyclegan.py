from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.data import DomainPair
from fastgen.errors import DataError
from fastgen.training.config import CycleGANTraining
from fastgen.training.recipes.base import Recipe, frozen


class CycleGANRecipe(Recipe):
    """Both generators at once, on adversarial, cycle and identity losses, then both discriminators, on images from a
    pool (Zhu et al. 2017, arXiv:1703.10593).
    """

    model_name = "cyclegan"
    parts: ClassVar = {"generators": ("a_to_b", "b_to_a"), "discriminators": ("discriminator_a", "discriminator_b")}
    averaged = ("a_to_b", "b_to_a")
    config: CycleGANTraining

    def make_model_options(self) -> dict[str, Any]:
        if not isinstance(self.data, DomainPair):
            raise DataError(
                f"cyclegan learns from two domains, but {self.config.data} is one: use a folder with trainA and trainB"
            )
        return self.shared_options(channels_a=self.data.a.channels, channels_b=self.data.b.channels)

    def make_extra(self) -> nn.Module:
        size = self.config.image_size
        shapes = {"a": (self.data.a.channels, size, size), "b": (self.data.b.channels, size, size)}
        return nn.ModuleDict({name: ImagePool(self.config.pool_size, shape) for name, shape in shapes.items()})

    def step(self, step: int) -> dict[str, Tensor]:
        config, model = self.config, self.model
        discriminator_loss, generator_loss = losses.GAN_LOSSES[config.loss]
        a, b = (batch.images for batch in self.next_batches())
        with frozen(model.discriminator_a), frozen(model.discriminator_b):
            with self.autocast():
                fake_a, fake_b = model.b_to_a(b), model.a_to_b(a)
                cycled = [model.b_to_a(fake_b).float(), model.a_to_b(fake_a).float()]
                logits = [model.discriminator_a(fake_a).float(), model.discriminator_b(fake_b).float()]
            g_loss = generator_loss(logits[0]) + generator_loss(logits[1])
            cycle = losses.cycle_loss(cycled, (a, b))
            total, report = g_loss + config.cycle * cycle, {"g_loss": g_loss, "cycle": cycle}
            if config.identity and a.shape[1] == b.shape[1]:
                with self.autocast():
                    same = [model.b_to_a(a).float(), model.a_to_b(b).float()]
                report["identity"] = losses.identity_loss(same, (a, b))
                total = total + config.cycle * config.identity * report["identity"]
            self.update("generators", total)

        pool: Any = self.extra
        d_loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for discriminator, real, fake, shown in (
            (model.discriminator_a, a, fake_a, pool["a"]),
            (model.discriminator_b, b, fake_b, pool["b"]),
        ):
            seen = shown(fake.detach().float(), self.noise)
            with (
                self.autocast()
            ):  # separately, as in the generators' step: in one batch, batch norm would tell them apart
                real_logits, fake_logits = discriminator(real).float(), discriminator(seen).float()
            d_loss = d_loss + discriminator_loss(real_logits, fake_logits)
        self.update("discriminators", d_loss)
        return {name: value.detach() for name, value in report.items()} | {"d_loss": d_loss.detach()}

    def calibrate(self, model: Any) -> None:
        for source, generator in ((self.data.a, model.a_to_b), (self.data.b, model.b_to_a)):
            count = min(256, len(source))
            for indices in (torch.arange(count, device="cpu") * len(source) // count).split(32):
                generator(source.batch(indices).to(self.device).images)

    def sample(self, n: int, seed: int) -> Tensor:
        """Groups of four, evenly spread over the data: an image of a, its translation, one of b, its translation."""
        columns = []
        for source, direction in ((self.data.a, "a_to_b"), (self.data.b, "b_to_a")):
            each = -(-n // 4)
            images = source.batch(torch.arange(each, device="cpu") * len(source) // each).images.to(self.device)
            columns += [images, self.ema.model.translate(images, direction)]
        channels = max(images.shape[1] for images in columns)
        columns = [images.expand(-1, channels, -1, -1) for images in columns]
        return torch.stack(columns, 1).flatten(0, 1)[:n]


class ImagePool(nn.Module):
    """Earlier generated images; half of what the discriminator sees is drawn from them (Shrivastava et al. 2017,
    arXiv:1612.07828, section 2.3).
    """

    images: Tensor
    count: Tensor

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape, dtype=torch.float32, device="cpu"))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device="cpu"))

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Each image, or with probability 0.5, once the pool is full, one from the pool, which the image replaces."""
        size, shown = len(self.images), images.clone()
        for at, image in enumerate(images if size else ()):
            if (count := int(self.count)) < size:
                self.images[count] = image
                self.count += 1
            elif torch.rand((), generator=generator, dtype=torch.float32, device="cpu") < 0.5:
                index = int(torch.randint(size, (), generator=generator, device="cpu"))
                shown[at], self.images[index] = self.images[index].clone(), image
        return shown
