"""Images that are decoded when asked for, by threads."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.data.decode import Header, UnusableImageError, read_header, read_image
from fastgen.errors import DataError

_log = logging.getLogger(__name__)
_MOST_NAMED = 20  # of the images that are left out: a folder may hold a million


class LeftOut:
    """Raises the error of an image that cannot be used if `strict`; otherwise names it in the log, each once."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.first: Exception | None = None
        self._named: set[Path] = set()

    def add(self, path: Path, error: Exception) -> None:
        if self.strict:
            raise error
        self.first = self.first or error
        if path in self._named or len(self._named) > _MOST_NAMED:
            return
        self._named.add(path)
        if len(self._named) <= _MOST_NAMED:
            _log.warning("left out: %s", error)
        else:
            _log.warning("left out: more than %d images; the others are not named", _MOST_NAMED)


def read_headers(paths: Sequence[Path], image_size: int, left_out: LeftOut) -> list[Header | None]:
    """The header of each image; None where it shows that the image cannot be used, of which `left_out` is told.

    Raises:
        UnusableImageError: an image cannot be used, and `left_out` is strict.
        OSError: a file cannot be read.
    """

    def look(path: Path) -> Header | UnusableImageError:
        try:
            return read_header(path, image_size)
        except UnusableImageError as error:
            return error

    headers: list[Header | None] = []
    several: list[Path] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, found in zip(paths, threads.map(look, paths), strict=True):
            if isinstance(found, UnusableImageError):
                left_out.add(path, found)
            elif found.frames:
                several.append(path)
            headers.append(found if isinstance(found, Header) else None)
    if several:
        _log.warning("the first frame alone is read of %s%s", several[0], " and others" if len(several) > 1 else "")
    return headers


class ImageFiles:
    """Image files as (N, C, H, W), uint8, decoded by threads when asked for.

    It may be pickled, copied and used after a fork, as the workers of a DataLoader do: each process has threads of its
    own.

    Args:
        left_out: is told of a file that turns out to be damaged, too small or gone. If it is not strict, the next good
            one stands in for that.
    """

    def __init__(self, paths: Sequence[Path], channels: int, image_size: int, left_out: LeftOut) -> None:
        self.paths = paths
        self.shape = (len(paths), channels, image_size, image_size)
        self._left_out = left_out
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self._ahead: dict[int, Future[np.ndarray | UnusableImageError]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "shape": self.shape, "_left_out": self._left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def prefetch(self, indices: Tensor) -> None:
        """Starts to decode what the next `read` will ask for."""
        if self._process != os.getpid():  # threads do not survive a fork, nor does what they had begun
            self._start()
        for index in indices.tolist():
            if index not in self._ahead:
                self._ahead[index] = self._threads.submit(self._decode, index)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images at `indices`, (n,) int64.

        Returns:
            The indices of the images that were read, which differ from those asked for where another stands in, and the
            images (n, C, H, W), uint8.

        Raises:
            DataError: an image cannot be used and `left_out` is strict, or none can.
            OSError: a file cannot be read.
        """
        self.prefetch(indices)
        wanted = {index: self._ahead.pop(index, None) for index in set(indices.tolist())}
        read = []
        for index in indices.tolist():
            ahead = wanted[index]  # None if another thread has taken it
            read.append(self._usable(index, self._decode(index) if ahead is None else ahead.result()))
        found = torch.tensor([index for index, _ in read], dtype=torch.int64, device="cpu")
        return found, self._stack([image for _, image in read])

    def _usable(self, index: int, image: np.ndarray | UnusableImageError) -> tuple[int, np.ndarray]:
        """The image, or the next that can be used, and its index."""
        for _ in self.paths:
            if isinstance(image, np.ndarray):
                return index, image
            self._left_out.add(self.paths[index], image)
            index = (index + 1) % len(self.paths)
            image = self._decode(index)
        raise DataError(f"none of the {len(self.paths)} images in {self.paths[0].parent} can be read")

    def read_good(self) -> tuple[list[int], Tensor]:
        """Indices and images of all the files that can be used, the images as `read` returns them."""
        good: dict[int, np.ndarray] = {}
        for index, image in enumerate(self._threads.map(self._decode, range(len(self.paths)))):
            if isinstance(image, np.ndarray):
                good[index] = image
            else:
                self._left_out.add(self.paths[index], image)
        return [*good], self._stack([*good.values()])

    def _stack(self, images: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8))

    def _decode(self, index: int) -> np.ndarray | UnusableImageError:
        _, channels, image_size, _ = self.shape
        try:
            return read_image(self.paths[index], channels, image_size=image_size)
        except FileNotFoundError:
            return UnusableImageError(f"{self.paths[index]} is no longer there")
        except UnusableImageError as error:
            return error
