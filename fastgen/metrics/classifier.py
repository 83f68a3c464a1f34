from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fastgen.data.bundled import load_digit_bitmaps
from fastgen.errors import UsageError
from fastgen.metrics._check import check_finite

SURE = 0.9  # least probability at which the classifier counts as sure


@dataclass(frozen=True)
class ClassifierShare:
    """How many samples a classifier of the real data recognises, and as which classes."""

    share: float
    """Fraction of the samples whose most probable class has a probability of at least 0.9."""
    class_shares: dict[str, float]
    """Fraction of the samples for which this class is the most probable; they sum to 1."""
    sure_class_shares: dict[str, float]
    """Fraction of the samples that the classifier is sure belong to this class; they sum to `share`."""
    n: int
    """Number of samples."""
    real_share: float
    """`share` of the real images that the classifier was not fitted on."""
    protocol: str
    """Classifier, split of the real data, resize and counts, in words."""


class DigitClassifier:
    """Ten support vector machines, one digit against the rest each, with calibrated probabilities (Platt 1999).

    Fitted on three quarters of the real 8x8 digits. The ten probabilities are not normalised to sum to 1, so that for
    an image of no digit all are small; normalised, they would make the classifier sure of noise. Fitting takes less
    than a second and is deterministic. Images of other sizes are averaged down to 8x8.

    Raises:
        DataError: scikit-learn is not installed.
    """

    classes = tuple("0123456789")

    def __init__(self) -> None:
        fit, held = load_digit_bitmaps("train"), load_digit_bitmaps("test")
        fit_x, fit_y = fit[0].flatten(1).numpy(), fit[1].numpy()
        held_x, held_y = held[0].flatten(1).numpy(), held[1].numpy()
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.svm import SVC

        one = CalibratedClassifierCV(SVC(C=10, gamma=0.001), method="sigmoid", ensemble=False)
        self._svms = OneVsRestClassifier(one).fit(fit_x, fit_y).estimators_
        held_out = self._predict(held_x)
        self.real_share = float((held_out.max(1) >= SURE).mean())
        self.accuracy = float((held_out.argmax(1) == held_y).mean())
        self.description = (
            f"ten SVCs, one per digit (RBF, C=10, gamma=0.001, Platt scaling), fitted on {len(fit_y)} real digits; "
            f"on the other {len(held_y)} its accuracy is {self.accuracy:.1%}, and it is at least {SURE:.0%} sure of "
            f"{self.real_share:.1%}; images are averaged down to 8x8"
        )

    def probabilities(self, images: Tensor) -> np.ndarray:
        """Independent probability of each class, (N, 10), for images (N, 1, H, W) in [-1, 1], H and W at least 8.

        Raises:
            UsageError: images of another shape.
            DataError: an image is not finite.
        """
        if images.dim() != 4 or images.shape[1] != 1 or min(images.shape[2:]) < 8:
            raise UsageError(f"images must be (N, 1, H, W) with H and W at least 8, not {tuple(images.shape)}")
        bitmaps = (adaptive_avg_pool2d(images.detach().float().cpu(), 8) + 1) * 8
        check_finite("images", bitmaps)
        return self._predict(bitmaps.flatten(1).numpy())

    def _predict(self, features: np.ndarray) -> np.ndarray:
        return np.stack([svm.predict_proba(features)[:, 1] for svm in self._svms], 1)


def classifier_for(data: str) -> DigitClassifier | None:
    """A newly fitted classifier of the data set `data`; None if there is none."""
    return DigitClassifier() if data == "digits" else None


def classifier_sure_share(images: Tensor, classifier: DigitClassifier | None = None) -> ClassifierShare:
    """Fraction of the images that the classifier is at least 90% sure of, and their distribution over the classes.

    Args:
        images: (N, 1, H, W) in [-1, 1], N > 0.
        classifier: by default a new DigitClassifier.
    """
    if len(images) == 0:
        raise UsageError("images must hold at least one image")
    classifier = classifier or DigitClassifier()
    probabilities = classifier.probabilities(images)
    n, predicted, sure = len(images), probabilities.argmax(1), probabilities.max(1) >= SURE

    def shares(chosen: np.ndarray) -> dict[str, float]:
        return {name: float((chosen & (predicted == index)).mean()) for index, name in enumerate(classifier.classes)}

    return ClassifierShare(
        share=float(sure.mean()),
        class_shares=shares(np.ones_like(sure)),
        sure_class_shares=shares(sure),
        n=n,
        real_share=classifier.real_share,
        protocol=f"share of {n} samples that a classifier is at least {SURE:.0%} sure of: {classifier.description}",
    )
