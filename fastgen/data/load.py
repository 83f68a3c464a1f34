from pathlib import Path
from typing import Literal

from fastgen.data.bundled import BUNDLED
from fastgen.data.datasets import DomainPair, ImageDataset
from fastgen.data.folders import load_folder
from fastgen.errors import UsageError, unknown_name


def list_datasets() -> list[str]:
    """The names that `load_dataset` knows, sorted."""
    return sorted(BUNDLED)


def load_dataset(
    name_or_path: str, image_size: int = 32, *, split: Literal["train", "test"] = "train", strict: bool = False
) -> ImageDataset | DomainPair:
    """Loads a data set: by name one that is part of fastgen's extras, or by path one on disk.

    Args:
        name_or_path: one of `list_datasets()`, or a folder: of images; with one folder of images per class; with
            `trainA`, `trainB`, `testA`, `testB`; with `metadata.jsonl` (one line per image: {"file_name": ..., "text":
            caption}); or with the files of MNIST or CIFAR-10. Folders `train` and `test` (or `val`, `valid`,
            `validation`), in upper or lower case, are the two splits; a class has the same number in both.
        image_size: height and width of the images.
        split: the part to train on, or the part held out to measure with. No image is in both.
        strict: raise an error for an image that cannot be used (damaged, smaller than `image_size`, with an unknown
            range of values: see `read_image`); otherwise it is named in the log and left out. Headers are checked at
            once. In a set too large for memory, other damage is found when the image is drawn, and another image takes
            its place.

    Returns:
        A `DomainPair` for two domains (folders with `trainA` and `trainB`), otherwise an `ImageDataset`.

    Raises:
        UsageError: unknown name (the message has the nearest names) or a size out of range.
        DataError: the package with the data is not installed, or the folder is not a data set; the message says why,
            for example because the test part has a class that the training part lacks.
    """
    if not 1 <= image_size <= 4096:
        raise UsageError(f"image_size must be between 1 and 4096, not {image_size}")
    if split not in ("train", "test"):
        raise UsageError(f"split must be 'train' or 'test', not {split!r}")
    if name_or_path in BUNDLED:
        return BUNDLED[name_or_path](image_size, split)
    path = Path(name_or_path)
    if not path.exists() and path.name == name_or_path:
        raise unknown_name("data set", name_or_path, BUNDLED, f"; nor is there a folder {str(path.absolute())!r}")
    return load_folder(path, image_size, split, strict=strict)
