"""Images that are decoded when asked for, by threads."""

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data.decode import DamagedImageError, read_image
from fastgen.errors import DataError

_log = logging.getLogger(__name__)


class ImageFiles:
    """Image files as (N, C, H, W), uint8, decoded by threads when asked for.

    Args:
        strict: a damaged file is an error; otherwise it is named in the log once, and the next good one stands in for it.
    """

    def __init__(self, paths: Sequence[Path], channels: int, image_size: int, *, strict: bool = False) -> None:
        self.paths = paths
        self.shape = (len(paths), channels, image_size, image_size)
        self.strict = strict
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self._ahead: dict[int, Future[np.ndarray | None]] = {}
        self._named: set[int] = set()
        self._lock = threading.Lock()

    def prefetch(self, indices: Tensor) -> None:
        """Starts to decode what the next `read` will ask for."""
        for index in indices.tolist():
            if index not in self._ahead:
                self._ahead[index] = self._threads.submit(self._decode, index)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images at `indices`, (n,) int64.

        Returns:
            The indices of the images that were read, which differ from those asked for where a file is damaged, and
            the images (n, C, H, W), uint8.

        Raises:
            DataError: a file is damaged and `strict` holds, or none is good.
            OSError: a file cannot be read.
        """
        self.prefetch(indices)
        futures = {index: self._ahead.pop(index) for index in set(indices.tolist())}
        found, images = [], []
        for index in indices.tolist():
            image = futures[index].result()
            for _ in self.paths:
                if image is not None:
                    break
                index = (index + 1) % len(self.paths)
                image = self._decode(index)
            else:
                raise DataError(f"none of the {len(self.paths)} images in {self.paths[0].parent} can be read")
            found.append(index)
            images.append(image)
        return torch.tensor(found), torch.from_numpy(np.stack(images))

    def read_good(self) -> tuple[Tensor, Tensor]:
        """Indices and images of all the files that are not damaged, as `read` returns them."""
        images = enumerate(self._threads.map(self._decode, range(len(self.paths))))
        good = {index: image for index, image in images if image is not None}
        pixels = np.stack([*good.values()]) if good else np.empty((0, *self.shape[1:]), np.uint8)
        return torch.tensor([*good], dtype=torch.int64), torch.from_numpy(pixels)

    def _decode(self, index: int) -> np.ndarray | None:
        _, channels, image_size, _ = self.shape
        try:
            return read_image(self.paths[index], channels, image_size=image_size)
        except DamagedImageError as error:
            if self.strict:
                raise
            with self._lock:
                if index not in self._named:
                    self._named.add(index)
                    _log.warning("left out: %s", error)
            return None
