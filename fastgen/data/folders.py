"""Data sets of users: a folder of images, one folder per class, trainA/ and trainB/, metadata.jsonl, the files of MNIST
and CIFAR-10."""

import difflib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgen.data import published
from fastgen.data.bundled import Split
from fastgen.data.datasets import DomainPair, ImageDataset
from fastgen.data.decode import ENDINGS, UnusableImageError, read_header
from fastgen.data.files import ImageFiles, LeftOut, read_headers
from fastgen.errors import DataError

_log = logging.getLogger(__name__)
_MAX_IN_MEMORY = 2**29  # bytes of pixels; of larger sets, files are decoded again whenever they are drawn
_MAX_LINE = 2**16  # bytes of a line of metadata.jsonl
_METADATA = "metadata.jsonl"
_PARTS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_DOMAINS = ("a", "b")


class NoTestPartError(DataError):
    """A data set has no test part."""


@dataclass(frozen=True)
class _Listing:
    """The images in a folder, and what is known of each."""

    folder: Path
    images: Sequence[Path]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] | None = None
    captions: Sequence[str] | None = None

    def take(self, indices: Sequence[int]) -> "_Listing":
        def some(values: Sequence[Any] | None) -> Any:
            return None if values is None else [values[index] for index in indices]

        return replace(self, images=some(self.images), labels=some(self.labels), captions=some(self.captions))


def load_folder(path: Path, image_size: int, split: Split, *, strict: bool) -> ImageDataset | DomainPair:
    """The data set at `path`; see `load_dataset`.

    Raises:
        NoTestPartError: `split` is "test", and there is no test part.
        DataError: the folder is not a data set; the message says what it holds.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder" if path.exists() else f"{path} does not exist")
    if data := published.load(path, image_size, split):
        return data
    folders, training = _part(path, split)
    left_out = LeftOut(strict)
    listings = [_list(folder) for folder in folders]
    channels = None
    if split == "test" and training:  # the test part has the channels and the class numbers of the training part
        trained = [_list(folder) for folder in training]
        listings = [_labelled_as(listing, other) for listing, other in zip(listings, trained, strict=True)]
        channels = 1 if all(_looks_grey(image, image_size) for other in trained for image in other.images) else 3
    checked = [_check(listing, image_size, left_out) for listing in listings]
    channels = channels or (1 if all(grey for _, grey in checked) else 3)
    sets = [_open(listing, channels, image_size, left_out) for listing, _ in checked]
    return sets[0] if len(sets) == 1 else DomainPair(path.name, sets[0], sets[1])


def _part(path: Path, split: Split) -> tuple[list[Path], list[Path]]:
    """The folder of a part, or the two folders of its domains; and those of the training part, if it has its own
    folders."""
    names = {name + domain for part in _PARTS.values() for name in part for domain in ("", *_DOMAINS)}
    folders: dict[str, Path] = {}
    others: list[Path] = []
    for child in _children(path):
        name = child.name.lower()
        if not child.is_dir():
            continue
        if name in folders:
            raise DataError(f"{path} holds {folders[name].name} and {child.name}: keep one of them")
        if name in names:
            folders[name] = child
        else:
            others.append(child)

    domains = _DOMAINS if any(name.endswith(_DOMAINS) for name in folders) else ("",)
    parts: dict[Split, list[Path | None]] = {
        part: [next((folders[name + domain] for name in known if name + domain in folders), None) for domain in domains]
        for part, known in _PARTS.items()
    }
    training = [folder for folder in parts["train"] if folder is not None]
    if domains == ("",) and not training:
        if split == "test":
            raise NoTestPartError(f"{path} holds no test part: no folder test, val or testA")
        return [path], []
    for domain, folder in zip(domains, parts[split], strict=True):
        if folder is None:
            kind = NoTestPartError if split == "test" and not any(parts[split]) else DataError
            raise kind(f"{path / (split + domain.upper())} does not exist")
    if not any(parts["test"]) and (ignored := [child.name for child in others if image_paths(child)]):
        _log.warning(
            "in %s only %s is used for training, and %s is ignored", path, training[0].name, ", ".join(ignored[:5])
        )
    return [folder for folder in parts[split] if folder is not None], training if len(training) == len(domains) else []


def image_paths(folder: Path) -> list[Path]:
    """The image files in a folder, sorted by name."""
    return [path for path in _children(folder) if path.suffix.lower() in ENDINGS and path.is_file()]


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _list(folder: Path) -> _Listing:
    images = image_paths(folder)
    by_class = {child.name: image_paths(child) for child in _children(folder) if child.is_dir()}
    listing = _Listing(folder, images)
    if (folder / _METADATA).exists():
        images, captions = map(list, zip(*_read_metadata(folder), strict=True))
        listing = _Listing(folder, images, captions=captions)
    elif images and any(by_class.values()):
        raise DataError(f"{folder} mixes images and folders of images: {_describe(folder)}; keep one or the other")
    elif any(by_class.values()):
        if empty := [name for name, paths in by_class.items() if not paths]:
            raise DataError(f"{folder} has one folder per class, but {', '.join(empty[:5])} holds no image")
        images = [path for paths in by_class.values() for path in paths]
        labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
        listing = _Listing(folder, images, labels, tuple(by_class))
    if len(images) < 2:
        count = "a single image" if images else "no images"
        raise DataError(f"{folder} holds {count}: {_describe(folder)}; images end in {', '.join(ENDINGS)}")
    return listing


def _labelled_as(held: _Listing, trained: _Listing) -> _Listing:
    """`held` with the class numbers of `trained`.

    Raises:
        DataError: it has a class that `trained` lacks, or lacks labels or captions that `trained` has.
    """
    if trained.captions is not None and held.captions is None:
        raise DataError(f"{trained.folder} has captions, but {held.folder} has none: it needs a {_METADATA} too")
    if trained.classes is None:
        return held
    if held.classes is None or held.labels is None:
        raise DataError(
            f"{trained.folder} has one folder per class, but {held.folder} does not: sort its images likewise"
        )
    for name in held.classes:
        if name not in trained.classes:
            near = {known.lower(): known for known in trained.classes}
            hint = difflib.get_close_matches(name.lower(), near, 1)
            raise DataError(
                f"{held.folder} has a class {name!r}, but {trained.folder} does not"
                + (f": did you mean {near[hint[0]]!r}?" if hint else "")
            )
    numbers = [trained.classes.index(name) for name in held.classes]
    return replace(held, classes=trained.classes, labels=[numbers[label] for label in held.labels])


def _check(listing: _Listing, image_size: int, left_out: LeftOut) -> tuple[_Listing, bool]:
    """The images that can be used, judging by their headers, and whether all of them are grey."""
    headers = read_headers(listing.images, image_size, left_out)
    usable = {index: header for index, header in enumerate(headers) if header is not None}
    return listing.take([*usable]), all(header.grey for header in usable.values())


def _open(listing: _Listing, channels: int, image_size: int, left_out: LeftOut) -> ImageDataset:
    files = ImageFiles(listing.images, channels, image_size, left_out)
    pixels: ImageFiles | torch.Tensor = files
    if len(listing.images) * channels * image_size**2 <= _MAX_IN_MEMORY:
        usable, pixels = files.read_usable()
        listing = listing.take(usable)
    if len(listing.images) < 2:
        why = f": {left_out.first}" if left_out.first else ""
        raise DataError(f"fewer than 2 of the images in {listing.folder} can be used{why}")
    labels = None if listing.labels is None else torch.tensor(listing.labels, dtype=torch.int64, device="cpu")
    return ImageDataset(str(listing.folder), pixels, labels, listing.classes, listing.captions)


def _looks_grey(path: Path, image_size: int) -> bool:
    try:
        return read_header(path, image_size).grey
    except UnusableImageError:
        return True


def _read_metadata(folder: Path) -> Iterator[tuple[Path, str]]:
    """Path and text of each line of metadata.jsonl, in the format of Hugging Face's image folders."""
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
                raise DataError(f"{where} names {name!r}, which is not a file in {folder}")
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
