from typing import Any

import torch
from torch import Tensor

from fastgen.data import Batch
from fastgen.errors import DataError
from fastgen.training.config import CGANTraining
from fastgen.training.recipes.gan import DCGANRecipe


class CGANRecipe(DCGANRecipe):
    """Both networks see the label of each real image (Mirza and Osindero 2014, arXiv:1411.1784)."""

    model_name = "cgan"
    config: CGANTraining

    def make_model_options(self) -> dict[str, Any]:
        data = self.single_dataset()
        if data.labels is None or data.classes is None:
            raise DataError(
                f"cgan learns from labelled images, but {self.config.data} has no labels: use one folder per class"
            )
        return super().make_model_options() | {"classes": len(data.classes)}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.single_dataset().classes

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        assert batch.labels is not None  # make_model_options checked that there are labels
        return (batch.labels,)

    def sample_conditions(self, model: Any, n: int) -> tuple[Tensor, ...]:
        return (torch.arange(n, device=self.device) % self.model_options["classes"],)
