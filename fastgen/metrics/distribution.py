"""Distances between generated and real images: FID, KID, Inception Score, precision and recall."""

import importlib
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.errors import DataError, UsageError
from fastgen.metrics._check import check_finite, check_images
from fastgen.metrics.features import FeatureExtractor

_NEIGHBOUR = 3
_KID_SUBSETS = 50


@dataclass(frozen=True)
class Figure:
    """A measured number."""

    value: float
    protocol: str
    """How it was measured, in words: extractor, counts, resize."""
    better: Literal["lower", "higher"]
    baseline: float | None = None
    """The value to compare with."""
    baseline_is: str = "real images"
    """What the baseline is measured on: other real images in place of the generated ones, or a simple method."""


class Reference:
    """The real images that generated ones are compared with, and held-out real images as a baseline.

    Args:
        real: images (N, C, H, W) in [-1, 1].
        held: other real images, none of which is in `real`.
        extractor: computes the features.

    Raises:
        UsageError: fewer than 10 images of either kind, or images of several shapes.
        DataError: an image, or the extractor's output for it, is not finite.
    """

    def __init__(self, real: Tensor, held: Tensor, extractor: FeatureExtractor) -> None:
        check_images("real", real)
        self.shape = real.shape[1:]
        self.extractor = extractor
        self._real, _ = self._features("real", real)
        self._held, self._held_logits = self._features("held", held)

    def _features(self, name: str, images: Tensor, count: int | None = None) -> tuple[Tensor, Tensor | None]:
        check_images(name, images)
        if images.dim() != 4 or len(images) < 10 or images.shape[1:] != self.shape:
            raise UsageError(f"{name} must be 10 or more images of {tuple(self.shape)}, not {tuple(images.shape)}")
        check_finite(name, images)
        return self.extractor(images[:count], name)

    def compare(self, generated: Tensor, *, seed: int = 0) -> dict[str, Figure]:
        """FID, KID, Inception Score, precision and recall of images (N, C, H, W) in [-1, 1], each with the value of the
        held-out images as its baseline.

        These figures depend on the number of images, so at most as many generated images are used as are held out.

        Args:
            seed: seed of KID's subsets and of the Inception Score's splits.

        Returns:
            "fid" (Heusel et al. 2017, arXiv:1706.08500), "kid" (Binkowski et al. 2018, arXiv:1801.01401), "precision"
            and "recall" (Kynkaanniemi et al. 2019, arXiv:1904.06991), and with an extractor of classes
            "inception_score" (Salimans et al. 2016, arXiv:1606.03498).

        Raises:
            UsageError: fewer than 10 images, or images of another shape.
            DataError: an image, or the extractor's output for it, is not finite, or torchmetrics is not installed.
        """
        count = min(len(generated), len(self._held))
        features, logits = self._features("generated", generated, count)
        real, held = self._real, self._held[:count]
        base = (
            f"{count} generated images against {len(real)} real ones; the baseline compares {count} other real images "
            f"with the same; images of {self.shape[2]}x{self.shape[1]}; {self.extractor.description}"
        )
        subset = min(100, count, len(real))
        figures: dict[str, Figure] = {}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # torchmetrics uses the process's default device
            torch.manual_seed(seed)
            figures["fid"] = Figure(_fid(features, real), f"FID, {base}", "lower", _fid(held, real))
            protocol = f"KID, mean of {_KID_SUBSETS} subsets of {subset}, {base}"
            figures["kid"] = Figure(_kid(features, real, subset), protocol, "lower", _kid(held, real, subset))
            if logits is not None and self._held_logits is not None:
                splits = min(10, count // 10)
                scores = (_inception_score(part, splits) for part in (logits, self._held_logits[:count]))
                protocol = f"Inception Score, mean of {splits} splits, {base}"
                figures["inception_score"] = Figure(next(scores), protocol, "higher", next(scores))
        for name, generated_pair, held_pair in (
            ("precision", (features, real), (held, real)),
            ("recall", (real, features), (real, held)),
        ):
            protocol = f"{name} by the {_NEIGHBOUR} nearest neighbours, {base}"
            figures[name] = Figure(_share_inside(*generated_pair), protocol, "higher", _share_inside(*held_pair))
        return figures


class _Identity(nn.Module):
    """Takes the place of torchmetrics' network, since the features are already computed."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _fid(features: Tensor, real: Tensor) -> float:
    metric = _metric("fid", "FrechetInceptionDistance", feature=_Identity(features.shape[1]))
    origin = real.double().mean(0)  # a common shift changes no distance, and this one minimises rounding
    metric.update(real.double() - origin, real=True)
    metric.update(features.double() - origin, real=False)
    return max(0.0, float(metric.compute()))  # rounding leaves equal sets slightly below 0


def _kid(features: Tensor, real: Tensor, subset: int) -> float:
    identity = _Identity(features.shape[1])
    metric = _metric("kid", "KernelInceptionDistance", feature=identity, subsets=_KID_SUBSETS, subset_size=subset)
    metric.update(real.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute()[0])


def _inception_score(logits: Tensor, splits: int) -> float:
    metric = _metric("inception", "InceptionScore", feature=_Identity(logits.shape[1]), splits=splits)
    logits = logits.double()
    # A class without an image would give 0 * log(0); a probability of exp(-500) is 0 in the score too.
    metric.update((logits - logits.amax(1, keepdim=True)).clamp(min=-500))
    return float(metric.compute()[0])


def _metric(module: str, name: str, **options):

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about features kept in memory
            return getattr(importlib.import_module(f"torchmetrics.image.{module}"), name)(**options)
    except ImportError as error:
        raise DataError(f"torchmetrics is not installed: pip install 'fastgen[demo]' ({error})") from error


def _share_inside(points: Tensor, manifold: Tensor) -> float:
    """Fraction of the points (N, D) inside the manifold: nearer to one of its points (M, D) than that point's third
    neighbour."""
    points, manifold = (x.double() - manifold[0].double() for x in (points, manifold))  # so that equal points are at 0
    rounding = 1e-7 * manifold.norm(dim=1).max()  # of distances, computed as roots of differences of products
    radii = torch.cdist(manifold, manifold).kthvalue(_NEIGHBOUR + 1, dim=1).values  # the nearest is the point itself
    return float((torch.cdist(points, manifold) <= radii + rounding).any(1).double().mean())
