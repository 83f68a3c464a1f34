from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastgen.errors import DataError, UsageError, unknown_name


@dataclass(frozen=True)
class ImageDataset:
    """A data set that fits in memory."""

    name: str
    images: Tensor
    """(N, C, H, W), float32 in [-1, 1]."""
    labels: Tensor
    """(N,), int64: index into `classes`."""
    classes: tuple[str, ...]


def list_datasets() -> list[str]:
    """The names that `load_dataset` knows, sorted."""
    return sorted(_LOADERS)


def load_dataset(name: str, image_size: int = 32) -> ImageDataset:
    """The data set `name`, with images of image_size x image_size pixels.

    Raises:
        UsageError: unknown name (the message holds the nearest) or a size below 1.
        DataError: the package that holds the data is not installed.
    """
    if name not in _LOADERS:
        raise unknown_name("data set", name, _LOADERS)
    if image_size < 1:
        raise UsageError(f"image_size must be positive, not {image_size}")
    return _LOADERS[name](image_size)


def load_digit_bitmaps() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of UCI as scikit-learn ships them.

    Returns:
        Grey levels (1797, 8, 8), float32 in 0..16, and labels (1797,), int64.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'fastgen[demo]'"
        ) from error
    digits = load_digits()
    return torch.from_numpy(digits.images).float(), torch.from_numpy(digits.target).long()


def _load_digits(image_size: int) -> ImageDataset:
    bitmaps, labels = load_digit_bitmaps()
    images = interpolate(bitmaps[:, None] / 8 - 1, size=image_size, mode="bicubic", align_corners=False)
    return ImageDataset("digits", images.clamp(-1, 1), labels, tuple("0123456789"))


_LOADERS: dict[str, Callable[[int], ImageDataset]] = {"digits": _load_digits}
