"""Commands for the user's pictures: a VAE restores them, a CycleGAN translates them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastgen.cli._arguments import Pictures, Run
from fastgen.errors import UsageError


def reconstruct(run: Run, pictures: Pictures, out: Path, strict: bool = False) -> None:
    """Encode pictures with a VAE and decode them again.

    Args:
        run: Run folder of a VAE (`fastgen train vae`).
        pictures: Folder of pictures, or one picture; each is scaled down and cropped to the model's size.
        out: Folder to write to.
        strict: Stop at a picture that cannot be used; otherwise it is named and left out.
    """
    from fastgen.tasks import reconstruct

    model, size = _load_vae(run)
    _restore(model, pictures, out, strict, size, lambda image: reconstruct(model, image))


def denoise(
    run: Run,
    pictures: Pictures,
    out: Path,
    std: float = 0.2,
    steps: int = 100,
    strict: bool = False,
) -> None:
    """Remove noise from pictures with a VAE.

    Args:
        run: Run folder of a VAE (`fastgen train vae`), trained on pictures like these without noise.
        pictures: Folder of pictures, or one picture; each is scaled down and cropped to the model's size.
        out: Folder to write to.
        std: Standard deviation of the noise, where black is -1 and white 1.
        steps: Optimization steps per picture.
        strict: Stop at a picture that cannot be used; otherwise it is named and left out.
    """
    from fastgen.tasks import denoise

    model, size = _load_vae(run)
    _restore(model, pictures, out, strict, size, lambda image: denoise(model, image, std=std, steps=steps))


def inpaint(run: Run, pictures: Pictures, mask: Path, out: Path, steps: int = 100, strict: bool = False) -> None:
    """Fill in missing parts of pictures with a VAE.

    Args:
        run: Run folder of a VAE (`fastgen train vae`), trained on complete pictures like these.
        pictures: Folder of pictures, or one picture; each is scaled down and cropped to the model's size.
        mask: Picture that is white where the pictures are to be filled in; scaled and cropped as they are.
        out: Folder to write to.
        steps: Optimization steps per picture.
        strict: Stop at a picture that cannot be used; otherwise it is named and left out.
    """
    import torch

    from fastgen.data import read_image
    from fastgen.tasks import inpaint

    model, size = _load_vae(run)
    missing = torch.from_numpy(read_image(mask, 1, image_size=size)[0] >= 128)
    if not missing.any():
        raise UsageError(f"mask {mask} has no white pixels (128 of 255 or more): nothing would be filled in")
    _restore(model, pictures, out, strict, size, lambda image: inpaint(model, image, missing, steps=steps))


def upscale(
    run: Run,
    pictures: Pictures,
    out: Path,
    factor: int = 4,
    steps: int = 100,
    strict: bool = False,
) -> None:
    """Enlarge pictures to a VAE's size.

    Args:
        run: Run folder of a VAE (`fastgen train vae`), trained at the size to enlarge to.
        pictures: Folder of pictures, or one picture; each is scaled down and cropped to the model's size / factor.
        out: Folder to write to.
        factor: How many times higher and wider the pictures become.
        steps: Optimization steps per picture.
        strict: Stop at a picture that cannot be used; otherwise it is named and left out.
    """
    from fastgen.tasks import upscale

    model, size = _load_vae(run)
    if factor < 2 or size % factor:
        raise UsageError(f"factor must be 2 or more and divide the model's {size} pixels, not {factor}")
    _restore(model, pictures, out, strict, size // factor, lambda image: upscale(model, image, steps=steps))


def translate(
    run: Run,
    pictures: Pictures,
    out: Path,
    direction: Literal["a_to_b", "b_to_a"] = "a_to_b",
    tile: int = 256,
    overlap: int = 64,
    strict: bool = False,
) -> None:
    """Translate pictures of any size from one domain to the other with a CycleGAN.

    Args:
        run: Run folder of a CycleGAN (`fastgen train cyclegan`).
        pictures: Folder of pictures, or one picture.
        out: Folder to write to.
        direction: From the first domain to the second, or back.
        tile: Height and width of the tiles in which a large picture is processed.
        overlap: Pixels that neighbouring tiles share.
        strict: Stop at a picture that cannot be used; otherwise it is named and left out.
    """
    from fastgen.models import capabilities
    from fastgen.tasks import transform_pictures, translate
    from fastgen.training import load_model

    model = load_model(run)
    directions = capabilities(model).directions
    if direction not in directions:
        raise UsageError(f"{run} holds a {type(model).__name__}, but translating needs a CycleGAN")
    channels, _ = directions[direction]
    written = transform_pictures(
        pictures,
        out,
        lambda image: translate(model, image, direction, tile=tile, overlap=overlap),
        channels,
        grey_as_colour=True,
        strict=strict,
    )
    print(f"{len(written)} pictures in {out}")


def _load_vae(run: Path) -> tuple[Any, int]:
    """The VAE in a run folder, and the height and width of its images."""
    from fastgen.models import capabilities
    from fastgen.training import load_model

    model = load_model(run)
    declared = capabilities(model)
    if not declared.encodes or declared.image_size is None:
        raise UsageError(f"{run} holds a {type(model).__name__}, but this needs a VAE")
    return model, declared.image_size


def _restore(model: Any, pictures: Path, out: Path, strict: bool, size: int, function: Callable[[Any], Any]) -> None:
    """Writes function(image) of each picture, scaled down and cropped to `size` pixels."""
    from fastgen.models import capabilities
    from fastgen.tasks import transform_pictures

    channels = capabilities(model).channels or 3
    written = transform_pictures(pictures, out, function, channels, image_size=size, strict=strict)
    print(f"{len(written)} pictures in {out}")
