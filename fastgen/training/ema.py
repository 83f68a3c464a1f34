import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class EMA:
    """Exponential moving average of the parameters of one part of a model.

    `module` is the averaged part, in eval mode; `model` is the model with it in the part's place, sharing all else.

    The decay is warmed up, min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten.
    Running statistics of batch norms cannot be averaged along: call `reestimate_batch_norm` before sampling.
    """

    def __init__(self, model: nn.Module, part: str, decay: float) -> None:
        self.decay = decay
        shared = {id(child): child for name, child in model.named_children() if name != part}
        self.model: Any = copy.deepcopy(model, shared)
        self.module = self.model.get_submodule(part).requires_grad_(False).eval()
        self._average: list[Tensor] = list(self.module.parameters())
        self._source: list[Tensor] = list(model.get_submodule(part).parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the source's parameters after training step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._source, 1 - decay)


@torch.no_grad()
def reestimate_batch_norm(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces the running statistics of a module's batch norms by their mean over forward passes of `batches`."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    for batch in batches:
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
