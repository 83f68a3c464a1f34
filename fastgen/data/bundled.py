"""Real data sets that are part of Python packages, so that they need no network."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastgen.data.datasets import DomainPair, ImageDataset
from fastgen.errors import DataError

Split = Literal["train", "test"]
DIGITS = tuple("0123456789")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = tuple(f"a handwritten {word}" for word in _NUMBER_WORDS)


def load_digit_bitmaps(split: Split) -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of UCI that scikit-learn includes: three quarters for training, a quarter held out.

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
            "the digits are part of scikit-learn, which is not installed: pip install 'fastgen[demo]'"
        ) from error
    bitmaps, labels = load_digits(return_X_y=True)
    parts = train_test_split(bitmaps, labels, test_size=0.25, stratify=labels, random_state=0)
    images, targets = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return torch.from_numpy(images).float().view(-1, 8, 8), torch.from_numpy(targets).long()


def _digits(image_size: int, split: Split) -> ImageDataset:
    bitmaps, labels = load_digit_bitmaps(split)
    images = interpolate(bitmaps[:, None] / 8 - 1, size=image_size, mode="bicubic", align_corners=False)
    return ImageDataset("digits", images.clamp(-1, 1), labels, DIGITS, [DIGIT_CAPTIONS[label] for label in labels])


def _photos(image_size: int, split: Split) -> ImageDataset:
    """Patches of scikit-learn's two photographs (427x640); the right quarter of each is held out."""
    columns = slice(0, 480) if split == "train" else slice(480, None)
    patches = [_patches(photo[:, columns], image_size) for photo in _photographs()]
    return _labelled("photos", patches, ("temple", "flower"))


def _textures(image_size: int, split: Split) -> ImageDataset:
    """Patches of scikit-image's brick, grass and gravel (512x512, grey); the lowest quarter of each is held out."""
    names = ("brick", "grass", "gravel")
    return _labelled("textures", [_texture(name, image_size, split) for name in names], names)


def _labelled(name: str, parts: list[Tensor], classes: tuple[str, ...]) -> ImageDataset:
    """The images of all `parts`, each part labelled as one class."""
    labels = torch.cat([torch.full((len(part),), at, dtype=torch.int64, device="cpu") for at, part in enumerate(parts)])
    captions = [f"a photo of a {classes[label]}" for label in labels]
    return ImageDataset(name, torch.cat(parts), labels, classes, captions)


def _faces(image_size: int, split: Split) -> ImageDataset:
    """The 100 faces (25x25, grey) of scikit-image's subset of Labeled Faces in the Wild; every fifth is held out."""
    faces = torch.from_numpy(_skimage("lfw_subset")[:100]).float()[:, None]
    chosen = (torch.arange(len(faces), device="cpu") % 5 == 4) == (split == "test")
    images = interpolate(faces[chosen] * 2 - 1, size=image_size, mode="bicubic", antialias=True)
    return ImageDataset("faces", images.clamp(-1, 1))


def _colour_to_grey(image_size: int, split: Split) -> DomainPair:
    """Patches of the two photographs in colour and, from other parts of them, in grey.

    The photographs are cut into strips of 120 columns, of which every second one is grey; the last 160 columns are held
    out. There `a` and `b` are the same patches, so that the true translation is known.
    """
    strips = [photo[:, start : start + 120] for photo in _photographs() for start in (0, 120, 240, 360)]
    colour, grey = strips[::2], strips[1::2]
    if split == "test":
        colour = grey = [photo[:, 480:] for photo in _photographs()]
    a = torch.cat([_patches(strip, image_size) for strip in colour])
    b = to_grey(torch.cat([_patches(strip, image_size) for strip in grey]))
    return DomainPair("colour-to-grey", ImageDataset("colour", a), ImageDataset("grey", b), aligned=split == "test")


def _grass_to_gravel(image_size: int, split: Split) -> DomainPair:
    """The patches of two of the textures."""
    a, b = (ImageDataset(name, _texture(name, image_size, split)) for name in ("grass", "gravel"))
    return DomainPair("grass-to-gravel", a, b)


def to_grey(images: Tensor) -> Tensor:
    """Images (N, 3, H, W), uint8 or float, with the luma of ITU-R BT.601 in all three channels."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32, device=images.device).view(3, 1, 1)
    grey = (images.float() * weights).sum(1, keepdim=True).expand(images.shape)
    return grey.contiguous() if images.is_floating_point() else grey.round().byte()


def _photographs() -> list[Tensor]:
    """(427, 640, 3), uint8, each."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise DataError(
            "the photographs are part of scikit-learn, which is not installed: pip install 'fastgen[demo]'"
        ) from error
    return [torch.from_numpy(image.copy()) for image in load_sample_images().images]


def _texture(name: str, image_size: int, split: Split) -> Tensor:
    rows = slice(0, 384) if split == "train" else slice(384, None)
    return _patches(torch.from_numpy(_skimage(name).copy())[rows, :, None], image_size)


def _skimage(name: str) -> np.ndarray:
    try:
        import skimage.data
    except ImportError as error:
        raise DataError(
            f"{name} is part of scikit-image, which is not installed: pip install 'fastgen[demo]'"
        ) from error
    return getattr(skimage.data, name)()


def _patches(picture: Tensor, image_size: int) -> Tensor:
    """Square patches (N, C, image_size, image_size) of a picture (H, W, C), a quarter of their size apart."""
    if image_size > min(picture.shape[:2]):
        height, width = picture.shape[:2]
        raise DataError(f"image_size {image_size} is too large: the patches are cut from {width}x{height} pixels")
    stride = max(1, image_size // 4)
    squares = picture.unfold(0, image_size, stride).unfold(1, image_size, stride)  # (rows, columns, C, h, w)
    return squares.flatten(0, 1).contiguous()


BUNDLED: dict[str, Callable[[int, Split], ImageDataset | DomainPair]] = {
    "digits": _digits,
    "photos": _photos,
    "textures": _textures,
    "faces": _faces,
    "colour-to-grey": _colour_to_grey,
    "grass-to-gravel": _grass_to_gravel,
}
