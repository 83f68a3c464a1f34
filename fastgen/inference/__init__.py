"""Speed for models that exist: fuse() for anybody's modules."""

from fastgen.inference.fuse import FusedRun, FusionReport, Unfused, fuse, fusion_report

__all__ = ["FusedRun", "FusionReport", "Unfused", "fuse", "fusion_report"]
