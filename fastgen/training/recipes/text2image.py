from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.data import Batch
from fastgen.errors import DataError
from fastgen.models import make_vocabulary
from fastgen.training.config import Text2ImageTraining
from fastgen.training.recipes.gan import DCGANRecipe


class Text2ImageRecipe(DCGANRecipe):
    """A real image with another image's caption counts as generated (matching-aware: Reed et al. 2016,
    arXiv:1605.05396, section 4.2). The text encoder learns with the discriminator.
    """

    model_name = "text2image"
    parts: ClassVar = {"generator": ("generator",), "discriminator": ("discriminator", "text_encoder")}
    averaged = ("generator", "text_encoder")
    config: Text2ImageTraining

    def make_model_options(self) -> dict[str, Any]:
        data = self.single_dataset()
        if data.captions is None:
            raise DataError(
                f"text2image learns from images with captions, but {self.config.data} has none: "
                "use a folder with metadata.jsonl"
            )
        return super().make_model_options() | {"vocabulary": make_vocabulary(data.captions)}

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.model.text_encoder(batch.captions),)

    def logits(self, real: Tensor, fake: Tensor, batch: Batch, conditions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        discriminator, (condition,) = self.model.discriminator, conditions
        assert batch.captions is not None  # make_model_options checked that there are captions
        kinds = batch.captions if batch.labels is None else batch.labels.tolist()
        others = [at for at, kind in enumerate(kinds) if kind != kinds[at - 1]]
        wrong = torch.tensor(others, dtype=torch.int64, device=self.device)
        with self.autocast():
            features = discriminator.features(torch.cat([real, fake]))
            features = torch.cat([features, features[wrong]])
            logits = discriminator.judge(features, torch.cat([condition, condition, condition.roll(1, 0)[wrong]]))
        real_logits, fake_logits = logits.float().tensor_split([len(real)])
        return real_logits, fake_logits

    def sample_conditions(self, model: Any, n: int) -> tuple[Tensor, ...]:
        captions = self.data.captions
        if n <= len(captions):
            captions = [captions[at * len(captions) // n] for at in range(n)]
        return (model.text_encoder([captions[at % len(captions)] for at in range(n)]),)
