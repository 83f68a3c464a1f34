"""Measures a trained model of any system."""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.data import Batch, DomainPair, ImageDataset, load_dataset
from fastgen.data.folders import NoTestPartError
from fastgen.errors import DataError
from fastgen.metrics import (
    ClassifierShare,
    DigitClassifier,
    Figure,
    PCAGaussian,
    Reference,
    classifier_for,
    classifier_sure_share,
    inception,
    train_classifier,
    vae_log_likelihood,
)
from fastgen.models import capabilities
from fastgen.training.config import TrainConfig

_log = logging.getLogger(__name__)
_MAX_IMAGES, _MAX_VALUES = 5000, 2**27  # limits of the real images that samples are compared with
_LIKELIHOOD_IMAGES, _LIKELIHOOD_SAMPLES = 200, 64
_TRANSLATED = 200  # images


@dataclass(frozen=True)
class Evaluation:
    """The figures of a trained model."""

    figures: dict[str, Figure]
    recognised: ClassifierShare | None
    """Measured on the samples by the data set's own classifier; None if it has none."""

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"figures": {name: asdict(figure) for name, figure in self.figures.items()}}
        return document if self.recognised is None else document | {"classifier_sure_share": asdict(self.recognised)}


def evaluate_model(
    model: Any, config: TrainConfig, n: int, seed: int, class_names: Sequence[str] | None = None
) -> Evaluation:
    """The figures of a model that was trained with `config`.

    Args:
        n: number of samples; for a CycleGAN and for a VAE's likelihood at most 200 held-out images are used.
        seed: seed of the noise.
        class_names: names of the model's classes, if known.

    Raises:
        DataError: the data set can no longer be loaded, or has other classes, or a figure is not finite.
    """
    with torch.autocast("cpu", enabled=False):
        result = _evaluate(model, config, n, seed, class_names)
    for name, figure in result.figures.items():
        if not math.isfinite(figure.value):
            raise DataError(f"{name} of the model is {figure.value}: its output for some images is not finite")
    return result


def _evaluate(model: Any, config: TrainConfig, n: int, seed: int, class_names: Sequence[str] | None) -> Evaluation:
    try:
        real = _real(config.data, config.image_size)
    except _TooFewError as error:
        _log.warning("no evaluation: %s", error)
        return Evaluation({}, None)
    if isinstance(real, _RealPair):
        return Evaluation(_translation_figures(model, real, min(n, _TRANSLATED), seed), None)
    check_classes(class_names, real.data, config.data)
    figures, batch = _samples(model, real, n, seed)
    if capabilities(model).encodes:
        figures |= _likelihood_figures(model, real, seed)
    recognised = None if real.classifier is None else classifier_sure_share(batch.images, real.classifier)
    return Evaluation(figures, recognised)


def sample_like(model: Any, data: ImageDataset, n: int, seed: int) -> Batch:
    """`n` images of the model, with the labels or captions that it drew them with, if it takes any: each class in
    turn, or the captions of random images of the data.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    known: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for condition in capabilities(model).conditions:
        if condition.classes is not None:
            values[condition.name] = torch.arange(n, device="cpu") % condition.classes
        else:
            if not known:
                draw = torch.Generator("cpu").manual_seed(seed)
                known = vars(data.batch(torch.randint(len(data), (n,), generator=draw, device="cpu")))
            if known.get(condition.name) is None:
                raise DataError(f"the model draws with {condition.name}, and {data.name} has none")
            values[condition.name] = known[condition.name]
    return Batch(**{**known, **values, "images": model.sample(n, generator=generator, **values)})


def check_classes(class_names: Sequence[str] | None, data: ImageDataset, name: str) -> None:
    """Raises DataError if a model is known to have been trained on other classes than those of `data`."""
    now = data.classes
    if class_names is not None and now is not None and tuple(class_names) != now:
        changed = sorted({*class_names} ^ {*now}) or ["their order"]
        raise DataError(f"the classes of {name} are not those that the model learned: {', '.join(changed[:5])} changed")


class _TooFewError(DataError):
    pass


class _Real:
    """The real images of a data set, and the models fitted to them."""

    def __init__(self, data: ImageDataset, held: ImageDataset, classifier: DigitClassifier | None, note: str) -> None:
        self.data, self.held, self.classifier, self.note = data, held, classifier, note
        self.extractor = inception() or train_classifier(data, held)
        self.reference = Reference(data.all().images, held.all().images, self.extractor)

    def predict(self, images: Tensor) -> Tensor | None:
        """The class of each image, according to a classifier; None if there is none."""
        if self.classifier is not None:
            return torch.from_numpy(self.classifier.probabilities(images).argmax(1))
        _, logits = self.extractor(images)
        return logits.argmax(1) if logits is not None and "Inception" not in self.extractor.description else None


class _RealPair:
    """Two domains, and a classifier that tells them apart."""

    def __init__(self, pair: DomainPair, held: DomainPair, note: str) -> None:
        self.held, self.note = held, note
        data, others = (_joined(part) for part in (pair, held))
        self.classifier = train_classifier(data, others)
        self.reference = {
            "a_to_b": Reference(pair.b.all().images, held.b.all().images, self.classifier),
            "b_to_a": Reference(pair.a.all().images, held.a.all().images, self.classifier),
        }


@functools.lru_cache(maxsize=4)
def _real(name: str, image_size: int) -> _Real | _RealPair:
    data = load_dataset(name, image_size)
    try:
        held = load_dataset(name, image_size, split="test")
        note = "the held-out images are the data set's own test part"
    except NoTestPartError:
        note = "there is no test part, so half of the images, which the model was trained on, take its place"
        if isinstance(data, DomainPair):
            (a, held_a), (b, held_b) = _halves(data.a), _halves(data.b)
            data, held = DomainPair(data.name, a, b), DomainPair(data.name, held_a, held_b)
        else:
            data, held = _halves(data)
    if isinstance(data, DomainPair) and isinstance(held, DomainPair):
        few = min(len(part) for part in (data.a, data.b, held.a, held.b))
        pair = DomainPair(data.name, _some(data.a), _some(data.b))
        # one order for both domains keeps aligned images together
        others = DomainPair(held.name, _some(held.a, _TRANSLATED), _some(held.b, _TRANSLATED), held.aligned)
    else:
        assert isinstance(data, ImageDataset) and isinstance(held, ImageDataset)
        few = min(len(data), len(held))
    if few < 10:
        raise _TooFewError(f"{name} has fewer than 10 images to measure with")
    if isinstance(data, DomainPair):
        return _RealPair(pair, others, note)
    assert isinstance(held, ImageDataset)
    return _Real(_some(data), _some(held, 1000), classifier_for(name) if image_size >= 8 else None, note)


def _halves(data: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    first, second = _shuffled(data).tensor_split(2)
    return _subset(data, first), _subset(data, second)


def _some(data: ImageDataset, most: int = _MAX_IMAGES) -> ImageDataset:
    most = min(most, max(10, _MAX_VALUES // (data.channels * data.image_size**2)))
    return _subset(data, _shuffled(data)[:most])


def _shuffled(data: ImageDataset) -> Tensor:
    return torch.randperm(len(data), generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def _subset(data: ImageDataset, indices: Tensor) -> ImageDataset:
    batch = data.batch(indices)
    return ImageDataset(data.name, batch.images, batch.labels, data.classes, batch.captions)


def _joined(pair: DomainPair) -> ImageDataset:
    images = torch.cat([pair.a.all().images, pair.b.all().images])
    labels = (torch.arange(len(images), device="cpu") >= len(pair.a)).long()
    return ImageDataset(pair.name, images, labels, ("a", "b"))


def _samples(model: Any, real: _Real, n: int, seed: int) -> tuple[dict[str, Figure], Batch]:
    batch = sample_like(model, real.data, n, seed)
    figures = {}
    if n >= 10:
        figures = real.reference.compare(batch.images, seed=seed)
    else:
        _log.warning("FID, KID, precision and recall are left out: they take 10 samples or more, not %d", n)
    held = real.held.all()
    if capabilities(model).discriminator is not None:
        figures["discriminator"] = Figure(
            _judged(model, batch),
            f"mean output (a logit) of the run's own discriminator for {n} generated images; the baseline is for "
            f"{len(held)} real images that it was not trained on",
            "higher",
            _judged(model, held),
        )
    predicted, truth = real.predict(batch.images), real.predict(held.images)
    if predicted is not None and truth is not None and batch.labels is not None and held.labels is not None:
        figures["as_asked"] = Figure(
            predicted.eq(batch.labels).double().mean().item(),
            f"share of {n} samples that a classifier assigns to the requested class: "
            f"{(real.classifier or real.extractor).description}",
            "higher",
            truth.eq(held.labels).double().mean().item(),
        )
    return figures, batch


@torch.no_grad()
def _judged(model: Any, batch: Batch) -> float:
    """Mean output of the discriminator for the images and their conditions."""
    declared, outputs = capabilities(model), []
    assert declared.discriminator is not None
    for start in range(0, len(batch), 256):
        part = slice(start, start + 256)
        conditions = [condition.encode(getattr(batch, condition.name)[part]) for condition in declared.conditions]
        outputs.append(declared.discriminator(batch.images[part], *conditions).double().flatten())
    return torch.cat(outputs).mean().item()


def _likelihood_figures(model: Any, real: _Real, seed: int) -> dict[str, Figure]:
    held = real.held.all().images[:_LIKELIHOOD_IMAGES]
    draw = torch.Generator("cpu").manual_seed(seed)
    elbo, bound = vae_log_likelihood(model, held, samples=_LIKELIHOOD_SAMPLES, generator=draw)
    gaussian = model.config.likelihood == "gaussian"
    mu, _ = model.encode(held)
    latent, fitted = mu.shape[1], None
    if gaussian and latent < min(len(real.data), held[0].numel()):
        fitted = -PCAGaussian(real.data.all().images, latent).log_likelihood(held).mean().item()
    units = f"nats per image of {held.shape[3]}x{held.shape[2]}, mean of {len(held)} held-out images ({real.note}), "
    units += "density of pixels in [-1, 1], " if gaussian else "cross-entropy of grey levels in [0, 1], "
    baseline = f"a Gaussian by PCA with {latent} directions, fitted to {len(real.data)} images"
    reconstruction = model.decode(mu)
    return {
        "nll": Figure(
            -bound.mean().item(),
            f"-log p(x), importance-weighted with {_LIKELIHOOD_SAMPLES} samples per image, {units}likelihood "
            f"{model.config.likelihood}",
            "lower",
            fitted,
            baseline,
        ),
        "elbo": Figure(elbo.mean().item(), f"ELBO with {_LIKELIHOOD_SAMPLES} samples per image, {units}", "higher"),
        "reconstruction_psnr": Figure(
            psnr(reconstruction, held), f"dB, of {len(held)} held-out images and their reconstructions", "higher"
        ),
    }


def _translation_figures(model: Any, real: _RealPair, n: int, seed: int) -> dict[str, Figure]:
    figures = {}
    a, b = (part.all().images[:n] for part in (real.held.a, real.held.b))
    for index, (direction, source, true) in enumerate((("b_to_a", b, a), ("a_to_b", a, b))):
        translated = torch.cat([model.translate(part, direction) for part in source.split(16)])
        if len(translated) >= 10:
            for name, figure in real.reference[direction].compare(translated, seed=seed).items():
                if name != "inception_score":
                    figures[f"{direction}_{name}"] = figure
        shares = []
        for images in (translated, true):
            _, logits = real.classifier(images)
            assert logits is not None
            shares.append((logits.argmax(1) == index).double().mean().item())
        figures[f"{direction}_recognised"] = Figure(
            shares[0],
            f"share of {len(translated)} translated held-out images that a classifier assigns to the other domain: "
            f"{real.classifier.description}",
            "higher",
            shares[1],
        )
        if real.held.aligned:
            figures[f"{direction}_psnr"] = Figure(
                psnr(translated, true),
                f"dB, mean of {len(true)} held-out images, whose true translation is known",
                "higher",
                psnr(source, true) if source.shape == true.shape else None,
                "the untranslated image",
            )
    return figures


def psnr(images: Tensor, true: Tensor) -> float:
    """Mean over the images of 10 log10(4 / mean squared error), as values run from -1 to 1."""
    error = (images.double() - true).square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * (4 / error).log10()).mean().item()
