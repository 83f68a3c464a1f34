import os

from torch import Tensor

from fastgen import images as _images


def save_animation(images: Tensor, path: str | os.PathLike[str], *, milliseconds: int = 80) -> None:
    """Writes images (N, 1 or 3, H, W) in [-1, 1] as a GIF: fastgen.images.save_animation, for a tensor."""
    _images.save_animation(images.detach().float().cpu().numpy(), path, milliseconds=milliseconds)


def save_grid(images: Tensor, path: str | os.PathLike[str], *, columns: int | None = None, padding: int = 2) -> None:
    """Writes images (N, 1 or 3, H, W) in [-1, 1] side by side into one picture: fastgen.images.save_grid, for a
    tensor."""
    _images.save_grid(images.detach().float().cpu().numpy(), path, columns=columns, padding=padding)
