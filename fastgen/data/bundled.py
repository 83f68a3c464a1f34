"""Real data sets that come inside Python packages, so that they need no network."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastgen.data.datasets import DomainPair, ImageDataset
from fastgen.errors import DataError

Split = Literal["train", "test"]
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_digit_bitmaps(split: Split) -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of UCI as scikit-learn ships them: three quarters to train on, a quarter to test on.

    Returns:
        Grey levels (1347 or 450, 8, 8), float32 in 0..16, and labels (1347 or 450,), int64.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'fastgen[demo]'"
        ) from error
    bitmaps, labels = load_digits(return_X_y=True)
    parts = train_test_split(bitmaps, labels, test_size=0.25, stratify=labels, random_state=0)
    images, targets = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return torch.from_numpy(images).float().view(-1, 8, 8), torch.from_numpy(targets).long()


def _digits(image_size: int, split: Split) -> ImageDataset:
    bitmaps, labels = load_digit_bitmaps(split)
    images = interpolate(bitmaps[:, None] / 8 - 1, size=image_size, mode="bicubic", align_corners=False)
    captions = [f"a handwritten {_NUMBER_WORDS[label]}" for label in labels.tolist()]
    return ImageDataset("digits", images.clamp(-1, 1), labels, tuple("0123456789"), captions)


BUNDLED: dict[str, Callable[[int, Split], ImageDataset | DomainPair]] = {"digits": _digits}
