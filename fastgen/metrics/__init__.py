from fastgen.metrics.classifier import ClassifierShare, DigitClassifier, classifier_for, classifier_sure_share

__all__ = ["ClassifierShare", "DigitClassifier", "classifier_for", "classifier_sure_share"]
