from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.data.files import ImageFiles
from fastgen.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Images of a data set and what is known of each."""

    images: Tensor
    """(N, C, H, W), float32 in [-1, 1]."""
    labels: Tensor | None = None
    """(N,), int64: index into the data set's `classes`."""
    captions: list[str] | None = None
    """N texts."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Batch":
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(self.images.to(device, non_blocking=True), labels, self.captions)


@dataclass(frozen=True)
class ImageDataset:
    """Images of one size, with labels and captions if the data has them.

    Raises:
        DataError: labels or captions are not one per image, or labels are not indices into `classes`.
    """

    name: str
    images: Tensor | ImageFiles
    """(N, C, H, W), float32 in [-1, 1] or uint8."""
    labels: Tensor | None = None
    """(N,), int64: index into `classes`."""
    classes: tuple[str, ...] | None = None
    """Names of the labels."""
    captions: Sequence[str] | None = None
    """One text per image."""

    def __post_init__(self) -> None:
        for kind, values in (("labels", self.labels), ("captions", self.captions)):
            if values is not None and len(values) != len(self):
                raise DataError(f"{self.name} has {len(self)} images, but {len(values)} {kind}")
        if self.labels is not None and self.classes is not None and len(self.labels):
            low, high, most = int(self.labels.min()), int(self.labels.max()), len(self.classes) - 1
            if low < 0 or high > most:
                raise DataError(f"the labels of {self.name} must be 0 to {most}, but run from {low} to {high}")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.images.shape[2]

    def batch(self, indices: Tensor) -> Batch:
        """The images at `indices` (N,) int64, on the CPU.

        Raises:
            DataError: an image cannot be decoded and the data set is strict.
            OSError: a file cannot be read.
        """
        if isinstance(self.images, ImageFiles):
            indices, images = self.images.read(indices)
        else:
            images = self.images[indices]
        if images.dtype == torch.uint8:
            images = images.float().div_(127.5).sub_(1)
        labels = None if self.labels is None else self.labels[indices]
        captions = None if self.captions is None else [self.captions[index] for index in indices.tolist()]
        return Batch(images, labels, captions)

    def prefetch(self, indices: Tensor) -> None:
        """Starts to decode the images at `indices`, which `batch` will be called with next."""
        if isinstance(self.images, ImageFiles):
            self.images.prefetch(indices)

    def all(self) -> Batch:
        """Every image, in order."""
        return self.batch(torch.arange(len(self), device="cpu"))


@dataclass(frozen=True)
class DomainPair:
    """Two sets of images of one size, which a CycleGAN learns from. They are unpaired: image i of `a` has nothing to do
    with image i of `b`, unless they are aligned."""

    name: str
    a: ImageDataset
    b: ImageDataset
    aligned: bool = False
    """Image i of `b` is the true translation of image i of `a`; only for held-out images, to measure with."""

    @property
    def image_size(self) -> int:
        return self.a.image_size
