"""MNIST's IDX files and CIFAR-10's, as their authors publish them."""

import gzip
import io
import math
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastgen.data.bundled import DIGIT_CAPTIONS, DIGITS, Split
from fastgen.data.datasets import ImageDataset
from fastgen.errors import DataError

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MAX_BYTES = 2**28
_CIFAR_RECORD = 3073  # a label and 3x32x32 bytes


def load(path: Path, image_size: int, split: Split) -> ImageDataset | None:
    """The data set whose files are in `path`, or in the subfolder that torchvision makes; None if there is none.

    Raises:
        DataError: a file is damaged, or labels are missing or out of range.
    """
    for folder in (path, path / "MNIST" / "raw", path / "raw"):
        stem = "train" if split == "train" else "t10k"
        if images := _find(folder, f"{stem}-images-idx3-ubyte"):
            labels = _find(folder, f"{stem}-labels-idx1-ubyte")
            if labels is None:
                raise DataError(f"{images} exists, but {stem}-labels-idx1-ubyte does not")
            pixels = _read_idx(images, 3)[:, None]
            return _dataset(images, pixels, _read_idx(labels, 1), DIGITS, image_size)
    for folder in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py"):
        names = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
        for ending, read in ((".bin", _read_cifar_binary), ("", _read_cifar_pickle)):
            files = [folder / f"{name}{ending}" for name in names]
            if not files[0].is_file():
                continue
            for file in files:
                if not file.is_file():
                    raise DataError(f"{files[0]} exists, but {file.name} does not")
            parts = [read(file) for file in files]
            pixels, labels_ = (np.concatenate(column) for column in zip(*parts, strict=True))
            return _dataset(files[0], pixels, labels_, _CIFAR10, image_size)
    return None


def _dataset(
    path: Path, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], image_size: int
) -> ImageDataset:
    if len(pixels) < 2:
        raise DataError(f"{path} has {len(pixels)} images: at least 2 are needed")
    images = torch.from_numpy(np.array(pixels))
    if images.shape[2] != image_size:
        images = torch.cat([_resize(part, image_size) for part in images.split(4096)])
    captions = DIGIT_CAPTIONS if classes is DIGITS else [f"a photo of {_article(name)} {name}" for name in classes]
    data = ImageDataset(str(path.parent), images, torch.from_numpy(labels.astype(np.int64)), classes)
    return replace(data, captions=[captions[label] for label in labels])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _resize(images: Tensor, image_size: int) -> Tensor:
    resized = interpolate(images.float(), size=(image_size, image_size), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).byte()


def _find(folder: Path, name: str) -> Path | None:
    names = (name, f"{name}.gz", name.replace("-idx", ".idx"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if len(content) > _MAX_BYTES:
        raise DataError(f"{path} is refused: it unpacks to more than {_MAX_BYTES} bytes")
    return content


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file: two zero bytes, the type (8: uint8), the number of dimensions, their big-endian sizes, the
    values."""
    content = _read(path)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    shape = [int(size) for size in np.frombuffer(content[4:header], ">u4")]
    if math.prod(shape) != len(content) - header:
        raise DataError(f"{path} is damaged: its header says {shape} values, but it holds {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _read(path)
    if not content or len(content) % _CIFAR_RECORD:
        raise DataError(f"{path} is damaged: {len(content)} bytes are not a multiple of {_CIFAR_RECORD}")
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _read_cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _ArraysOnly(io.BytesIO(_read(path)), encoding="bytes").load()
        pixels = np.asarray(content[b"data"])
        if pixels.dtype != np.uint8:
            raise DataError(f"{path} is not a batch of CIFAR-10: its pixels are {pixels.dtype}, not uint8")
        return pixels.reshape(-1, 3, 32, 32), np.asarray(content[b"labels"], np.int64)
    except DataError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise DataError(f"{path} is not a batch of CIFAR-10: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and NumPy arrays, and refuses anything else that the file names."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("ndarray", "dtype", "_reconstruct")
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise DataError(f"the file names {module}.{name}, which is not an array: it is not opened")
        return super().find_class(module, name)
