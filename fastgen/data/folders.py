"""What users bring: a folder of images, a folder a class, trainA/ and trainB/, metadata.jsonl, MNIST's and CIFAR-10's files."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from fastgen.data import published
from fastgen.data.bundled import Split
from fastgen.data.datasets import DomainPair, ImageDataset
from fastgen.data.decode import ENDINGS, DamagedImageError, is_grey
from fastgen.data.files import ImageFiles
from fastgen.errors import DataError

_MAX_IN_MEMORY = 2**29  # bytes of pixels; above, files are decoded again each time they are drawn
_MAX_LINE = 2**16  # bytes of a line of metadata.jsonl
_METADATA = "metadata.jsonl"


def load_folder(path: Path, image_size: int, split: Split, *, strict: bool) -> ImageDataset | DomainPair:
    """The data set at `path`; see `load_dataset`.

    Raises:
        DataError: what the path holds is of no use; the message says what was found.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder" if path.exists() else f"{path} is not there")
    if found := published.load(path, image_size, split):
        return found
    folders = {folder.name for folder in _children(path) if folder.is_dir()}
    if folders & {"trainA", "trainB", "testA", "testB"}:
        parts = [path / f"{split}{domain}" for domain in "AB"]
        a, b = (_one_domain(part, image_size, strict=strict) for part in parts)
        if a.channels != b.channels:  # one of them is grey
            a, b = (_one_domain(part, image_size, strict=strict, channels=3) for part in parts)
        return DomainPair(path.name, a, b)
    if "train" in folders:
        names = ("train",) if split == "train" else ("test", "val", "validation")
        path = next((path / name for name in names if name in folders), path / split)
    elif split == "test":
        raise DataError(f"{path} holds no part to test on: no folder test, val or testA")
    return _one_domain(path, image_size, strict=strict)


def image_paths(folder: Path) -> list[Path]:
    """The image files in a folder, sorted by name."""
    return [path for path in _children(folder) if path.suffix.lower() in ENDINGS and path.is_file()]


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _one_domain(folder: Path, image_size: int, *, strict: bool, channels: int | None = None) -> ImageDataset:
    if not folder.is_dir():
        raise DataError(f"{folder} is not there")
    images = image_paths(folder)
    labels: list[int] | None = None
    captions: list[str] | None = None
    classes: tuple[str, ...] | None = None
    by_class = {child.name: image_paths(child) for child in _children(folder) if child.is_dir()}
    if (folder / _METADATA).exists():
        images, captions = map(list, zip(*_read_metadata(folder), strict=True))
    elif images and any(by_class.values()):
        raise DataError(f"{folder} mixes images and folders of images: {_describe(folder)}; keep one or the other")
    elif any(by_class.values()):
        empty = [name for name, paths in by_class.items() if not paths]
        if empty:
            raise DataError(f"{folder} has a folder a class, and {', '.join(empty[:5])} holds no image")
        classes = tuple(by_class)
        images = [path for paths in by_class.values() for path in paths]
        labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
    if len(images) < 2:
        count = "a single image" if images else "no images"
        raise DataError(f"{folder} holds {count}: {_describe(folder)}; images end in {', '.join(ENDINGS)}")
    channels = channels or (1 if all(_grey_or_damaged(path) for path in images) else 3)
    files = ImageFiles(images, channels, image_size, strict=strict)
    targets = None if labels is None else torch.tensor(labels)
    if len(images) * channels * image_size**2 > _MAX_IN_MEMORY:
        return ImageDataset(str(folder), files, targets, classes, captions)
    good, pixels = files.read_good()
    if len(good) < 2:
        raise DataError(f"of the {len(images)} images in {folder} {len(good)} can be read: at least 2 are needed")
    kept = None if captions is None else [captions[index] for index in good.tolist()]
    return ImageDataset(str(folder), pixels, None if targets is None else targets[good], classes, kept)


def _grey_or_damaged(path: Path) -> bool:
    try:
        return is_grey(path)
    except DamagedImageError:
        return True


def _read_metadata(folder: Path) -> Iterator[tuple[Path, str]]:
    """Path and text of each line of metadata.jsonl, the form of Hugging Face's image folders."""
    path = folder / _METADATA
    root = folder.resolve()
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(line) > _MAX_LINE:
                raise DataError(f"{where} is longer than {_MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            name, text = (entry.get("file_name"), entry.get("text")) if isinstance(entry, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
                missing = "file_name" if not isinstance(name, str) else "text (the caption)"
                raise DataError(f'{where} has no {missing}: each line is {{"file_name": "1.png", "text": "a caption"}}')
            image = folder / name
            if "\0" in name or not image.resolve().is_relative_to(root) or not image.is_file():
                raise DataError(f"{where} names {name!r}, which is no file in {folder}")
            count += 1
            yield image, text
    if not count:
        raise DataError(f"{path} is empty")


def _describe(folder: Path) -> str:
    """What a folder holds, in words."""
    children = _children(folder)
    endings = Counter(path.suffix.lower() or "no ending" for path in children if not path.is_dir())
    folders = [path.name for path in children if path.is_dir()]
    parts = [f"{count} {'file' if count == 1 else 'files'} ({ending})" for ending, count in endings.most_common(5)]
    if folders:
        parts.append(f"{len(folders)} {'folder' if len(folders) == 1 else 'folders'} ({', '.join(folders[:5])})")
    return "it holds " + (", ".join(parts) if parts else "nothing")
