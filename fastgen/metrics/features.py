"""The features by which images are compared: those of a network that was trained to classify images."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from fastgen.data import Batch, ImageDataset
from fastgen.errors import DataError, FastgenError, UsageError, out_of_memory
from fastgen.metrics._check import check_finite, check_images

_BATCH = 256
_SIDE = 32  # the small classifier sees images of at most this size


@dataclass(frozen=True)
class FeatureExtractor:
    """A network by whose features images are compared; any network will do."""

    network: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Images (N, C, H, W) in [-1, 1] -> features (N, D), and logits of classes (N, K) or None if it has no classes."""
    description: str
    """What it is, what it was trained on and how it resizes images: part of the protocol of each figure."""

    @torch.no_grad()
    def __call__(self, images: Tensor, name: str = "images") -> tuple[Tensor, Tensor | None]:
        """Features (N, D) and logits (N, K) or None, float32 on the CPU, computed in batches.

        Args:
            images: (N, C, H, W) in [-1, 1].
            name: what errors call the images.

        Raises:
            DataError: an image, or the network's output for it, is not finite.
            UsageError: the network returns anything but features and logits.
        """
        check_images(name, images)
        check_finite(name, images)
        with torch.autocast(images.device.type, enabled=False):
            parts = [self._checked(batch) for batch in images.detach().float().split(_BATCH)]
        features = torch.cat([part for part, _ in parts]).float().cpu()
        check_finite(f"the features of {name}", features)
        batches = [logits for _, logits in parts if logits is not None]
        if not batches:
            return features, None
        logits = torch.cat(batches).float().cpu()
        check_finite(f"the logits of {name}", logits)
        return features, logits

    def _checked(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        result = self.network(images)
        if not isinstance(result, tuple) or len(result) != 2:
            raise UsageError(f"network must return features and logits (or None), not a {type(result).__name__}")
        for name, value in zip(("features (N, D)", "logits (N, K)"), result, strict=True):
            if value is None and name.startswith("logits"):
                continue
            if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != len(images):
                actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"network must return {name} for N images, not {actual} for {len(images)}")
        return result


class _Classifier(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        where: Any = {"device": "cpu", "dtype": torch.float32}
        for inputs, outputs, stride in ((channels, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, **where)
            layers += [convolution, nn.BatchNorm2d(outputs, **where), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes, **where)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        side = min(_SIDE, images.shape[2])
        if images.shape[2] != side:
            images = interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        features = self.features(images).mean((2, 3))
        return features, self.head(features)


@torch.inference_mode(False)
@torch.enable_grad()
def train_classifier(data: ImageDataset, held: ImageDataset | None = None, *, steps: int = 200) -> FeatureExtractor:
    """Trains a small convolutional classifier of a real data set, whose last hidden layer has 64 features.

    Without labels it learns by how many quarter turns an image was rotated (Gidaris et al. 2018, arXiv:1803.07728), and
    returns no logits. Deterministic; the state of torch's global generator does not change.

    Args:
        data: the training data.
        held: images that are not trained on; the description gives the accuracy on them.
        steps: number of batches of 128 images.

    Raises:
        DataError: an image is not finite, or there are none.
        UsageError: steps below 1.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    for part in (data,) if held is None else (data, held):
        if len(part) < 1:
            raise DataError(f"{part.name} holds no images")
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):  # whatever defaults the process has set
        return _train_classifier(data, held, steps)


def _train_classifier(data: ImageDataset, held: ImageDataset | None, steps: int) -> FeatureExtractor:
    for images in (data.images, None if held is None else held.images):
        if isinstance(images, Tensor) and images.is_floating_point():
            check_finite(data.name, images)
    classes = None if data.labels is None or data.classes is None else len(data.classes)
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Classifier(data.channels, classes or 4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        batch = data.batch(torch.randint(len(data), (128,), generator=draw))
        images, targets = _lesson(batch, classes, draw)
        dy, dx = torch.randint(-2, 3, (2,), generator=draw).tolist()
        optimizer.zero_grad()
        cross_entropy(model(images.roll((dy, dx), (2, 3)))[1], targets).backward()
        optimizer.step()
        schedule.step()
    model.requires_grad_(False).eval()
    first = model(_some(data, draw).images)[0]
    mean, std = first.mean(0), first.std()  # so that figures of different data sets have one magnitude
    std = std.where(std > 0, 1)  # 0 if all images are equal
    task = f"its {classes} classes" if classes else "quarter turns, as there are no labels"
    side = min(_SIDE, data.image_size)
    resize = (
        ""
        if side == data.image_size
        else f", to which images of {data.image_size} are scaled down (bilinear, antialiased)"
    )
    description = (
        f"64 features of a classifier (4 convolutions) trained on {len(data)} real images of {data.name} for {task}, "
        f"at {side}x{side} pixels{resize}"
    )
    if held is not None and (held.labels is not None or not classes):
        images, targets = _lesson(_some(held, draw), classes, draw)
        correct = (model(images)[1].argmax(1) == targets).float().mean().item()
        description += f"; its accuracy on {len(images)} others is {correct:.1%}"

    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = model(images.cpu())
        return (features - mean) / std, logits if classes else None

    return FeatureExtractor(network, description)


def _some(data: ImageDataset, draw: torch.Generator) -> Batch:
    """At most 1024 random images."""
    return data.batch(torch.randperm(len(data), generator=draw)[:1024])


def _lesson(batch: Batch, classes: int | None, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and their targets: labels, or numbers of quarter turns."""
    if classes and batch.labels is not None:
        return batch.images, batch.labels
    turns = torch.randint(4, (len(batch),), generator=draw)
    return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(batch.images, turns, strict=True)]), turns


def inception() -> FeatureExtractor | None:
    """The Inception v3 of published figures (Heusel et al. 2017, arXiv:1706.08500), if its weights are on this machine.

    They are the TorchScript file `inception-2015-12-05.pt` of NVlabs/stylegan3, at the path in FASTGEN_INCEPTION or in
    torch.hub's folder of checkpoints. The network itself resizes images to 299x299. Nothing is downloaded.

    Returns:
        None if there is no such file.

    Raises:
        FastgenError: FASTGEN_INCEPTION is not the path of a file, or the file cannot be read.
    """
    named = os.environ.get("FASTGEN_INCEPTION")
    path = Path(named) if named else Path(torch.hub.get_dir()) / "checkpoints" / "inception-2015-12-05.pt"
    if not path.is_file():
        if named:
            raise FastgenError(f"FASTGEN_INCEPTION is {named}, but there is no such file")
        return None
    try:
        model = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise FastgenError(f"{path} is not a TorchScript file that can be read: {error}") from error

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((images.expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255).byte().cpu()
        try:
            shares = model(pixels, no_output_bias=True).clamp(min=torch.finfo(torch.float32).tiny)
            return model(pixels, return_features=True), shares.log()
        except RuntimeError as error:  # TorchScript raises it for anything
            if out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise FastgenError(f"{path} is not the Inception of NVlabs/stylegan3: {reason}") from error

    return FeatureExtractor(network, "2048 features of Inception v3 (2015-12-05), which resizes to 299x299")
