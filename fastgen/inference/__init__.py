"""Speed for models that exist: fuse() for anybody's modules, and Engine for inference alone."""

from fastgen.inference._explain import Explained, Explanation, explain
from fastgen.inference._tune import Tuned, TuningReport, tune
from fastgen.inference.engine import Engine, Part
from fastgen.inference.fuse import FusedRun, FusionReport, Unfused, fuse, fusion_report

__all__ = [
    "Engine",
    "Explained",
    "Explanation",
    "FusedRun",
    "FusionReport",
    "Part",
    "Tuned",
    "TuningReport",
    "Unfused",
    "explain",
    "fuse",
    "fusion_report",
    "tune",
]
