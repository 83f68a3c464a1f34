from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models import capabilities, evaluating


def conditions(model: Any, n: int, *, label: int | None = None, text: str | None = None) -> dict[str, Any]:
    """Keyword arguments of `model.sample` for `n` images of a class or of a text; empty if neither is given.

    Raises:
        UsageError: the model does not draw with a class or a text, or has no such class.
    """
    options: dict[str, Any] = {}
    for condition in capabilities(model).conditions:
        if label is not None and condition.classes is not None:
            if not 0 <= label < condition.classes:
                raise UsageError(f"the class must be between 0 and {condition.classes - 1}, not {label}")
            options[condition.name] = torch.full((n,), label, dtype=torch.int64, device="cpu")
        elif text is not None and condition.name == "captions":
            options[condition.name] = [text] * n
    if label is not None and not any(isinstance(values, Tensor) for values in options.values()):
        raise UsageError(f"a class was given, but this {type(model).__name__} draws without classes")
    if text is not None and "captions" not in options:
        raise UsageError(f"a text was given, but this {type(model).__name__} draws without captions")
    return options


class Drawing(nn.Module):
    """A module whose forward(z), or forward(z, labels) for a model with classes, is model.generate.

    `example` holds inputs for one image.

    Raises:
        UsageError: the model draws from anything but noise and labels.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        declared = capabilities(model)
        if declared.latent_shape is None:
            raise UsageError(f"a {type(model).__name__} does not draw from noise")
        if others := [condition.name for condition in declared.conditions if condition.classes is None]:
            raise UsageError(
                f"a {type(model).__name__} draws with {' and '.join(others)}, and not with noise and labels alone"
            )
        self.model = model
        z = model.latent(1)
        labels = [torch.zeros(1, dtype=torch.int64, device=z.device) for _ in declared.conditions]
        self.example: tuple[Tensor, ...] = (z, *labels)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.generate(*inputs)


@torch.no_grad()
def interpolate(
    model: Any,
    frames: int,
    *,
    points: int = 2,
    closed: bool = False,
    label: int | None = None,
    text: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images along a path through the latent space: spherical interpolation from one random point to the next (White
    2016, arXiv:1609.04468), so that each latent is about as long as those that the model was trained on.

    Args:
        model: one that draws from noise; see `fastgen.models.capabilities`.
        frames: number of images; the first and the last are at a point.
        points: number of random points, at least 2.
        closed: the path returns to its start, and the last image is one step before it.
        label, text: the class or the text of all images, if the model draws with one.
        generator: draws the points.

    Returns:
        (frames, C, H, W) in [-1, 1].

    Raises:
        UsageError: numbers out of range, or a condition that the model lacks or needs.
    """
    if not 2 <= points <= frames <= 10_000:
        raise UsageError(f"frames must be between points and 10000, and points at least 2, not {frames} and {points}")
    declared, values = capabilities(model), conditions(model, frames, label=label, text=text)
    if declared.latent_shape is None:
        raise UsageError(f"a {type(model).__name__} does not draw from noise")
    if missing := [condition.name for condition in declared.conditions if condition.name not in values]:
        raise UsageError(f"this {type(model).__name__} draws with {' and '.join(missing)}: say which class or text")
    ends = model.latent(points, generator=generator)
    if closed:
        ends = torch.cat([ends, ends[:1]])
    position = torch.linspace(0, len(ends) - 1, frames + closed, dtype=torch.float64, device=ends.device)[:frames]
    start = position.long().clamp(max=len(ends) - 2)
    z = slerp(ends[start], ends[start + 1], (position - start).to(ends)[:, None])
    with evaluating(model):
        encoded = [condition.encode(values[condition.name]).to(z.device) for condition in declared.conditions]
        batches = zip(*(tensor.split(64) for tensor in (z, *encoded)), strict=True)
        return torch.cat([model.generate(*batch) for batch in batches])


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation from a (N, D) to b (N, D) by the fraction `share` (N, 1); the lengths are interpolated
    linearly."""
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    a, b = (x / length for x, length in zip((a, b), lengths, strict=True))
    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).acos()
    flat = angle.sin() < 1e-4  # parallel or opposite: no unique great circle
    turned = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin().where(~flat, 1)
    return torch.where(flat, torch.lerp(a, b, share), turned) * torch.lerp(*lengths, share)
