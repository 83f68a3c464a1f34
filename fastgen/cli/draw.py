"""Drawing new images: by a run folder's model, or by a plan without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro import conf

from fastgen.cli._arguments import Run
from fastgen.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from fastgen.runtime import Plan

_MAX_VALUES = 2**26  # of the noise passed to a plan in one call


def generate(
    run: Run,
    n: int = 64,
    seed: int = 0,
    label: Annotated[int | None, conf.arg(name="class")] = None,
    text: str | None = None,
    interpolate: int = 0,
    out: Path = Path("grid.png"),
) -> None:
    """Draw new images with a trained model, into one picture.

    Args:
        run: Run folder written by `fastgen train`, or plan file written by `fastgen export` (which needs no torch).
        n: Number of images.
        seed: Seed of the noise; the same seed gives the same picture.
        label: Number of the class to draw, for a model that was trained with classes.
        text: What to draw, for a model that was trained with captions.
        interpolate: Interpolate between this many random images in n frames: a strip, or a GIF if --out ends in .gif.
        out: Picture to write; its ending selects the format.
    """
    from fastgen.images import picture_format, save_grid

    picture_format(out)  # a wrong ending is reported before the work is done
    if run.is_file() and (text is not None or interpolate):
        raise UsageError("a plan takes neither --text nor --interpolate: give the run folder")
    if run.is_file():
        from fastgen.runtime import Plan

        plan = Plan.load(run)
        save_grid(plan(*plan_inputs(plan, n, seed, label)), out)
    else:
        from fastgen.tasks import conditions
        from fastgen.training import load_model, sample

        model = load_model(run)
        if interpolate:
            _save_interpolation(model, n, interpolate, seed, label, text, out)
        else:
            # `sample` refuses a number of images that is out of range; nothing of that size is made before
            options = conditions(model, n, label=label, text=text) if 1 <= n <= 2**20 else {}
            save_grid(sample(model, n, seed, **options), out)
    print(f"{n} images in {out}")


def _save_interpolation(
    model: Any, frames: int, points: int, seed: int, label: int | None, text: str | None, out: Path
) -> None:
    import torch

    from fastgen.images import save_animation, save_grid
    from fastgen.tasks import interpolate
    from fastgen.training.run import check_seed

    check_seed(seed)
    animated = out.suffix.lower() == ".gif"
    generator = torch.Generator().manual_seed(seed)
    images = interpolate(model, frames, points=points, closed=animated, label=label, text=text, generator=generator)
    if animated:
        save_animation(images, out)
    else:
        save_grid(images, out, columns=min(frames, 16))


def plan_inputs(plan: Plan, n: int, seed: int, label: int | None = None) -> list[np.ndarray]:
    """Inputs of a plan for n images: noise and, for a plan that takes labels, `label` or by default each class in
    turn."""
    import numpy as np

    classes = [entry.classes for entry in plan.inputs if entry.classes is not None]
    if label is not None and not classes:
        raise UsageError("--class was given, but this plan draws without classes")
    if label is not None and not 0 <= label < min(classes):
        raise UsageError(f"the class must be between 0 and {min(classes) - 1}, not {label}")
    return [
        _noise(entry.shape, n, seed) if entry.classes is None
        else np.full(n, label) if label is not None else np.arange(n) % entry.classes
        for entry in plan.inputs
    ]  # fmt: skip


def _noise(shape: tuple[int, ...], n: int, seed: int) -> np.ndarray:
    import numpy as np

    most = max(1, _MAX_VALUES // max(1, int(np.prod(shape))))
    if not 1 <= n <= most:
        raise UsageError(f"the number of images must be between 1 and {most}, not {n}")
    if seed < 0:
        raise UsageError(f"seed must not be negative, got {seed}")
    return np.random.default_rng(seed).standard_normal((n, *shape), dtype=np.float32)
