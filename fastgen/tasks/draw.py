import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models import evaluating


def conditions(model: Any, n: int, *, label: int | None = None, text: str | None = None) -> dict[str, Any]:
    """Arguments of `model.sample(n, ...)` for `n` images of a class or of a text; empty if neither is given.

    Raises:
        UsageError: the model does not take what is given, or has no such class.
    """
    takes = inspect.signature(model.sample).parameters if hasattr(model, "sample") else {}
    for name, given, argument in (("class", label, "labels"), ("text", text, "captions")):
        if given is not None and argument not in takes:
            raise UsageError(f"a {name} is given, and this {type(model).__name__} draws without one")
    classes = getattr(getattr(model, "config", None), "classes", 2**31)
    if label is not None and not 0 <= label < classes:
        raise UsageError(f"the class must be between 0 and {classes - 1}, not {label}")
    labels = {} if label is None else {"labels": torch.full((n,), label, dtype=torch.int64, device="cpu")}
    return labels if text is None else {**labels, "captions": [text] * n}


class Drawing(nn.Module):
    """What draws images in a model, as a module: forward(z), or forward(z, labels) for one with classes, is
    model.generate.

    `example` is inputs for one image. Raises UsageError for a model that draws from anything else.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not hasattr(model, "latent"):
            raise UsageError(f"a {type(model).__name__} does not draw from noise")
        takes = list(inspect.signature(model.generate).parameters)[1:]
        if takes not in ([], ["labels"]):
            raise UsageError(
                f"a {type(model).__name__} draws from {' and '.join(takes)}, and not from noise and labels alone"
            )
        self.model = model
        z = model.latent(1)
        self.example: tuple[Tensor, ...] = (z, *(torch.zeros(1, dtype=torch.int64, device=z.device) for _ in takes))

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
    """Images on a way through the latent space, spherically from one random point to the next (White 2016,
    arXiv:1609.04468), so that all of it has the length that the model knows.

    Args:
        model: with `latent(n)` and `generate(z, ...)`.
        frames: images in all, the first and the last at a point.
        points: random points on the way, at least 2.
        closed: the way goes back to its start, and the last image is one step before it.
        label, text: the class or the text of all the images, where the model draws with one.
        generator: draws the points.

    Returns:
        (frames, C, H, W) in [-1, 1].
    """
    if not 2 <= points <= frames <= 10_000:
        raise UsageError(f"frames must be between points and 10000, and points at least 2, not {frames} and {points}")
    given = conditions(model, frames, label=label, text=text)
    if not hasattr(model, "latent"):
        raise UsageError(f"a {type(model).__name__} draws nothing from noise")
    ends = model.latent(points, generator=generator)
    if closed:
        ends = torch.cat([ends, ends[:1]])
    position = torch.linspace(0, len(ends) - 1, frames + closed, dtype=torch.float64, device=ends.device)[:frames]
    start = position.long().clamp(max=len(ends) - 2)
    z = slerp(ends[start], ends[start + 1], (position - start).to(ends)[:, None])
    extra: tuple[Tensor, ...] = ()
    if "labels" in given:
        extra = (given["labels"].to(z.device),)
    elif "captions" in given:
        with evaluating(model):
            extra = (model.text_encoder(given["captions"]),)
    elif wanted := {"labels", "captions"} & set(inspect.signature(model.sample).parameters):
        raise UsageError(f"this {type(model).__name__} draws with {' and '.join(wanted)}: say which class or text")
    with evaluating(model):
        return torch.cat([model.generate(*part) for part in zip(*(x.split(64) for x in (z, *extra)), strict=True)])


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """From a (N, D) to b (N, D), `share` (N, 1) of the way: the direction turns evenly and the length grows evenly."""
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    a, b = (x / length for x, length in zip((a, b), lengths, strict=True))
    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).acos()
    flat = angle.sin() < 1e-4  # they point the same way, or there is no one way to turn
    turned = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin().where(~flat, 1)
    return torch.where(flat, torch.lerp(a, b, share), turned) * torch.lerp(*lengths, share)
