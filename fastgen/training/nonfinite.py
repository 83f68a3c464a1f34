"""Finds where a NaN or an infinity comes from: repeats the steps since the last checkpoint, bit for bit, watching each
layer.

Training itself only checks the losses that it logs and the weights that it saves, so this costs it nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.training.recipes import Recipe


class NotFiniteError(FastgenError):
    """A loss or a weight is NaN or infinite at training step `step`."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}")
        self.step = step


def trace(recipe: Recipe, first: int, last: int) -> str:
    """Trains the steps `first` to `last` and says where the first value that is not finite appears.

    Args:
        recipe: in its state after `first` steps; it cannot be used afterwards.
    """
    with _watching(recipe.model) as seen:
        for step in range(first, last):
            recipe.advance(step)
            seen += [
                f"{name} after the update" for name, value in recipe.model.named_parameters() if not _finite(value)
            ]
            if seen:
                return f"it first appears in {seen[0]} of step {step + 1}"
    return f"no layer shows it when steps {first + 1} to {last} are run again"


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Collects the outputs and gradients that are not finite, in order of appearance."""
    seen: list[str] = []
    hooks: list[Any] = []

    def watch_output(module: nn.Module, name: str) -> None:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(not _finite(value) for value in (output if isinstance(output, tuple) else (output,))):
                seen.append(f"the output of {name} ({type(module).__name__})")

        hooks.append(module.register_forward_hook(look))

    def watch_gradient(parameter: Tensor, name: str) -> None:
        def look(parameter: Tensor) -> None:
            if parameter.grad is not None and not _finite(parameter.grad):
                seen.append(f"the gradient of {name}")

        hooks.append(parameter.register_post_accumulate_grad_hook(look))

    for name, module in model.named_modules():
        watch_output(module, name or "the model")
    for name, parameter in model.named_parameters():
        watch_gradient(parameter, name)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
