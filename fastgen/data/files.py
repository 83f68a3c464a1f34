"""Image files that threads decode when they are needed."""

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
_MOST_NAMED = 20  # images that are left out and named: a folder may hold a million


class LeftOut:
    """Handles images that cannot be used: raises the error if `strict`, otherwise names each in the log once."""

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
            _log.warning("left out: more than %d images; no more of them are named", _MOST_NAMED)


def read_headers(paths: Sequence[Path], image_size: int, left_out: LeftOut) -> list[Header | None]:
    """The header of each image; None if it shows that the image cannot be used, which is passed to `left_out`.

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
    animated: list[Path] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, header in zip(paths, threads.map(look, paths), strict=True):
            if isinstance(header, UnusableImageError):
                left_out.add(path, header)
            elif header.frames:
                animated.append(path)
            headers.append(header if isinstance(header, Header) else None)
    if animated:
        _log.warning("only the first frame of %s%s is read", animated[0], " and others" if len(animated) > 1 else "")
    return headers


class ImageFiles:
    """Image files as (N, C, H, W), uint8, decoded by threads when needed.

    It may be pickled, copied and used after a fork, as a DataLoader's workers do: each process has its own threads.

    Args:
        left_out: handles a file that turns out to be damaged, too small or missing. If it is not strict, the next
            usable image takes its place.
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
        """Starts to decode the images that the next `read` will be called with."""
        if self._process != os.getpid():  # threads and their work do not survive a fork
            self._start()
        for index in indices.tolist():
            if index not in self._ahead:
                self._ahead[index] = self._threads.submit(self._decode, index)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images at `indices`, (n,) int64.

        Returns:
            The indices of the images that were read, which differ from `indices` where another image took a place, and
            the images (n, C, H, W), uint8.

        Raises:
            DataError: an image cannot be used and `left_out` is strict, or no image can be used.
            OSError: a file cannot be read.
        """
        self.prefetch(indices)
        futures = {index: self._ahead.pop(index, None) for index in set(indices.tolist())}
        read = []
        for index in indices.tolist():
            future = futures[index]  # None if another thread has taken it
            read.append(self._usable(index, self._decode(index) if future is None else future.result()))
        usable = torch.tensor([index for index, _ in read], dtype=torch.int64, device="cpu")
        return usable, self._stack([image for _, image in read])

    def _usable(self, index: int, image: np.ndarray | UnusableImageError) -> tuple[int, np.ndarray]:
        """The image or, if it cannot be used, the next one that can, with its index."""
        for _ in self.paths:
            if isinstance(image, np.ndarray):
                return index, image
            self._left_out.add(self.paths[index], image)
            index = (index + 1) % len(self.paths)
            image = self._decode(index)
        raise DataError(f"none of the {len(self.paths)} images in {self.paths[0].parent} can be read")

    def read_usable(self) -> tuple[list[int], Tensor]:
        """Indices and images of all files that can be used, as `read` returns them."""
        usable: dict[int, np.ndarray] = {}
        for index, image in enumerate(self._threads.map(self._decode, range(len(self.paths)))):
            if isinstance(image, np.ndarray):
                usable[index] = image
            else:
                self._left_out.add(self.paths[index], image)
        return [*usable], self._stack([*usable.values()])

    def _stack(self, images: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8))

    def _decode(self, index: int) -> np.ndarray | UnusableImageError:
        _, channels, image_size, _ = self.shape
        try:
            return read_image(self.paths[index], channels, image_size=image_size)
        except FileNotFoundError:
            return UnusableImageError(f"{self.paths[index]} no longer exists")
        except UnusableImageError as error:
            return error
