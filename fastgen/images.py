"""Pictures on disk, of NumPy arrays or tensors; needs no torch."""

from __future__ import annotations

import io
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastgen.errors import FastgenError, UsageError, naming

if TYPE_CHECKING:
    from torch import Tensor


def picture_format(path: str | os.PathLike[str]) -> str:
    """The image format that the ending of `path` stands for.

    Raises:
        UsageError: it stands for none that can be written.
    """
    known = Image.registered_extensions()
    name = known.get(Path(path).suffix.lower(), "")
    if name not in Image.SAVE:
        raise UsageError(f"{str(path)!r} does not end in an image format that can be written: use .png")
    return name


def save_grid(
    images: np.ndarray | Tensor, path: str | os.PathLike[str], *, columns: int | None = None, padding: int = 2
) -> None:
    """Writes images side by side into one picture.

    Args:
        images: (N, 1 or 3, H, W) in [-1, 1]; values outside are clamped.
        path: file to write; its ending selects the format. Missing folders are created.
        columns: images per row; by default the grid is square.
        padding: black pixels between images.

    Raises:
        UsageError: images of another shape, or an unknown ending.
        FastgenError: a value is NaN, or the format cannot hold this picture; an existing file stays as it was.
    """
    pixels = _to_pixels(images)
    path, format = Path(path), picture_format(path)
    n, channels, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    canvas = np.zeros((rows * (height + padding) + padding, columns * (width + padding) + padding, channels), np.uint8)
    for index, image in enumerate(pixels):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    _write(Image.fromarray(canvas[..., 0] if channels == 1 else canvas), path, format)


def save_animation(images: np.ndarray | Tensor, path: str | os.PathLike[str], *, milliseconds: int = 80) -> None:
    """Writes images as the frames of an endless GIF.

    Args:
        images: (N, 1 or 3, H, W) in [-1, 1]; values outside are clamped.
        path: file to write; it must end in .gif. Missing folders are created.
        milliseconds: how long each image is shown.
    """
    path, pixels = Path(path), _to_pixels(images)
    if path.suffix.lower() != ".gif":
        raise UsageError(f"an animation must end in .gif, not {str(path)!r}")
    frames = [Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in pixels]
    _write(frames[0], path, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _to_pixels(images: np.ndarray | Tensor) -> np.ndarray:
    """(N, 1 or 3, H, W), uint8."""
    if not isinstance(images, np.ndarray):
        images = images.detach().float().cpu().numpy()
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise UsageError(f"images must be (N, 1 or 3, H, W) with N > 0, not {tuple(images.shape)}")
    if (nan := np.isnan(images).any((1, 2, 3))).any():  # which would become black
        raise FastgenError(f"image {nan.argmax()} of {len(images)} (counted from 0) holds NaN: nothing is written")
    return np.clip(np.rint((images.astype(np.float32) + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)


def _write(picture: Image.Image, path: Path, format: str, **options: Any) -> None:
    encoded = io.BytesIO()
    try:
        picture.save(encoded, format, **options)
    except (OSError, ValueError, OverflowError, struct.error) as error:
        raise FastgenError(f"{path} cannot be written as {format}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_bytes(encoded.getbuffer())
