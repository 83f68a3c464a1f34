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
    """A data set that comes with fastgen's extras, by name, or one on disk, by path.

    Args:
        name_or_path: one of `list_datasets()`, or a folder: of images; with a folder of images a class; with `trainA`,
            `trainB`, `testA`, `testB`; with `metadata.jsonl` (a line an image: {"file_name": ..., "text": caption}); or
            with the files of MNIST or CIFAR-10. Folders `train` and `test` (or `val`, `valid`, `validation`), in upper
            or lower case, are the two splits; the classes of the second have the numbers that they have in the first.
        image_size: height and width of the images.
        split: the part to learn from, or the part held out to measure with. No image is in both.
        strict: an image that cannot be used (damaged, smaller than `image_size`, with levels of unknown meaning: see
            `read_image`) is an error; otherwise it is named in the log and left out. What a header shows is found at
            once; in a set too large for memory, an image that is damaged further on is found when it is drawn, and
            another stands in for it.

    Returns:
        A `DomainPair` for two domains (the paths with `trainA` and `trainB`), else an `ImageDataset`.

    Raises:
        UsageError: unknown name (the message holds the nearest) or a size below 1.
        DataError: the package that holds the data is not installed, or what the path holds is of no use; the message
            says what, for example a class of the part to test on that the part to learn from has not.
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
