"""A model's inputs and outputs, as commands, tasks, evaluation and tuning need to know them; these depend on no
particular class of model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def _unchanged(values: Any) -> Any:
    return values


@dataclass(frozen=True)
class Condition:
    """Something that a model draws with besides noise, such as a class or a caption."""

    name: str
    """Keyword argument of the model's `sample`, and field of `fastgen.data.Batch` that holds the values of a data
    set."""
    classes: int | None = None
    """Number of classes, if the values are labels (N,) int64; None for anything else."""
    width: int | None = None
    """Length of the vector that `encode` makes of a value, if it makes one."""
    encode: Callable[[Any], Tensor] = _unchanged
    """Values of N images -> what `generate` and the discriminator take, (N, ...)."""

    def example(self, n: int) -> Tensor:
        """What `encode` could return for n images, on the CPU."""
        if self.classes is not None:
            return torch.arange(n, device="cpu") % self.classes
        return torch.randn(n, self.width or 1, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Capabilities:
    """A model's inputs and outputs; a model declares them in its property `capabilities`."""

    image_size: int | None = None
    """Height and width of the images that it is trained on."""
    channels: int | None = None
    """Channels of the images that it draws and encodes."""
    draws: bool = False
    """It has `sample(n, *, generator=None, <conditions>)`: n images, in eval mode and without gradients."""
    latent_shape: tuple[int, ...] | None = None
    """Shape of one image's noise, if it has `latent(n, *, generator=None)`, which draws noise, and
    `generate(z, *conditions)`, which makes images from it."""
    conditions: tuple[Condition, ...] = ()
    """What it draws with, in the order of `generate`'s arguments after the noise."""
    encodes: bool = False
    """It has `encode(images)`: mean and log-variance of q(z | images), and `decode(z)`: images."""
    discriminator: nn.Module | None = None
    """Images and encoded conditions -> logits (N,)."""
    directions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """It has `translate(images, direction)` for these directions: channels of the images before and after."""
    size_multiple: int = 1
    """Heights and widths that `translate` takes are multiples of this, ..."""
    least_size: int = 1
    """... and at least this."""


def capabilities(model: Any) -> Capabilities:
    """The capabilities that the model declares.

    For a model that declares none, they follow from its methods: `sample`, `latent` and `generate`, `encode`, an
    nn.Module `discriminator`, or `translate` (between images of 3 channels, heights and widths multiples of 4 from 8
    up). It draws with `labels` or `captions` if `sample` has arguments of these names or, without `sample`, with all
    arguments of `generate` after the noise; captions are encoded by its `text_encoder`. Its `config` may contain
    `image_size`, `channels` and `classes`.
    """
    declared = getattr(model, "capabilities", None)
    if isinstance(declared, Capabilities):
        return declared
    config = getattr(model, "config", None)
    discriminator = getattr(model, "discriminator", None)
    from_noise = hasattr(model, "latent") and hasattr(model, "generate")
    translates = hasattr(model, "translate")
    return Capabilities(
        image_size=getattr(config, "image_size", None),
        channels=getattr(config, "channels", None),
        draws=hasattr(model, "sample"),
        latent_shape=tuple(model.latent(0).shape[1:]) if from_noise else None,
        conditions=tuple(_condition(model, config, name) for name in _condition_names(model)),
        encodes=hasattr(model, "encode"),
        discriminator=discriminator if isinstance(discriminator, nn.Module) else None,
        directions=dict.fromkeys(("a_to_b", "b_to_a"), (3, 3)) if translates else {},
        size_multiple=4 if translates else 1,
        least_size=8 if translates else 1,
    )


def _condition_names(model: Any) -> list[str]:
    if hasattr(model, "sample"):
        return [name for name in ("labels", "captions") if name in inspect.signature(model.sample).parameters]
    return list(inspect.signature(model.generate).parameters)[1:] if hasattr(model, "generate") else []


def _condition(model: Any, config: Any, name: str) -> Condition:
    if name == "labels":
        return Condition(name, classes=getattr(config, "classes", 2**31))
    return Condition(name, encode=getattr(model, "text_encoder", _unchanged))
