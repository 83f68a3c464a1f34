"""Speed for models that exist: fuse() for anybody's modules, and Engine for inference alone."""

from fastgen.inference.engine import Engine, Part
from fastgen.inference.fuse import FusedRun, FusionReport, Unfused, fuse, fusion_report
from fastgen.inference._tune import Tuned, TuningReport, tune

__all__ = [
    "Engine",
    "FusedRun",
    "FusionReport",
    "Part",
    "Tuned",
    "TuningReport",
    "Unfused",
    "fuse",
    "fusion_report",
    "tune",
]
