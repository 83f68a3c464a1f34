import pytest
import torch

pytest.importorskip("sklearn")

from fastgen.data import load_dataset
from fastgen.errors import UsageError
from fastgen.metrics import DigitClassifier, classifier_for, classifier_sure_share


@pytest.fixture(scope="module")
def classifier():
    return DigitClassifier()


def test_real_digits_are_recognised(classifier):
    assert classifier.accuracy > 0.97 and classifier.real_share > 0.9
    data = load_dataset("digits")
    result = classifier_sure_share(data.images, classifier)
    assert result.share > 0.9 and result.n == 1347 and result.real_share == classifier.real_share
    assert sum(result.class_shares.values()) == pytest.approx(1)
    assert sum(result.sure_class_shares.values()) == pytest.approx(result.share)
    assert min(result.class_shares.values()) > 0.09
    predicted = classifier.probabilities(data.images).argmax(1)
    assert (predicted == data.labels.numpy()).mean() > 0.98
    assert "1347 samples" in result.protocol and "1347 real digits" in result.protocol and "8x8" in result.protocol


def test_noise_and_grey_are_not(classifier):
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert classifier_sure_share(noise, classifier).share < 0.02
    assert classifier_sure_share(torch.zeros(4, 1, 32, 32), classifier).share == 0


def test_misuse_and_data_without_classifier(classifier):
    assert classifier_for("horses") is None
    with pytest.raises(UsageError, match="at least one image"):
        classifier_sure_share(torch.zeros(0, 1, 8, 8), classifier)
    with pytest.raises(UsageError, match=r"not \(2, 3, 8, 8\)"):
        classifier_sure_share(torch.zeros(2, 3, 8, 8), classifier)
