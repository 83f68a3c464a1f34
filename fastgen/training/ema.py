import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class EMA:
    """Exponential moving average of the parameters of some submodules of a model; "" is the whole model.

    `modules` holds the averaged submodules by name, in eval mode; `model` is the model with them in place of its own,
    sharing everything else.

    The decay is warmed up, min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten.
    Running statistics of batch norms are not averaged: use `batch_norms_reestimated` before sampling.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str], decay: float) -> None:
        self.decay = decay
        whole = "" in parts
        shared = {id(child): child for name, child in model.named_children() if not whole and name not in parts}
        self.model: Any = copy.deepcopy(model, shared)
        self.modules = {part: self.model.get_submodule(part).requires_grad_(False).eval() for part in parts}
        self._average: list[Tensor] = [p for module in self.modules.values() for p in module.parameters()]
        self._source: list[Tensor] = [p for part in parts for p in model.get_submodule(part).parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the source's parameters after training step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._source, 1 - decay)


@contextlib.contextmanager
def batch_norms_reestimated(modules: Mapping[str, nn.Module]) -> Iterator[bool]:
    """Replaces the running statistics of the modules' batch norms by the mean over the batches that run in the context.

    Yields whether there are any batch norms.
    """
    norms = [
        child
        for module in modules.values()
        for child in module.modules()
        if isinstance(child, _BatchNorm) and child.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    yield bool(norms)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
