from typing import Any

import torch
from torch import Tensor

from fastgen.data import Batch
from fastgen.errors import DataError
from fastgen.training.config import CGANTraining
from fastgen.training.recipes.gan import DCGANRecipe


class CGANRecipe(DCGANRecipe):
    """Both networks are given each real image's label (Mirza and Osindero 2014, arXiv:1411.1784)."""

    model_name = "cgan"
    config: CGANTraining

    def make_model_options(self) -> dict[str, Any]:
        data = self.one_set()
        if data.labels is None or data.classes is None:
            raise DataError(
                f"cgan learns from labelled images, and {self.config.data} has no labels: use one folder per class"
            )
        return super().make_model_options() | {"classes": len(data.classes)}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.one_set().classes

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        assert batch.labels is not None  # make_model_options asked for them
        return (batch.labels,)

    def sample_conditions(self, model: Any, n: int) -> tuple[Tensor, ...]:
        return (torch.arange(n, device=self.device) % self.model_options["classes"],)
