from fastgen.metrics.classifier import ClassifierShare, DigitClassifier, classifier_for, classifier_sure_share
from fastgen.metrics.distribution import Figure, Reference
from fastgen.metrics.features import FeatureExtractor, inception, train_classifier
from fastgen.metrics.likelihood import PCAGaussian, vae_log_likelihood

__all__ = [
    "ClassifierShare",
    "DigitClassifier",
    "FeatureExtractor",
    "Figure",
    "PCAGaussian",
    "Reference",
    "classifier_for",
    "classifier_sure_share",
    "inception",
    "train_classifier",
    "vae_log_likelihood",
]
