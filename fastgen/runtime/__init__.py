"""Runs an exported generator without torch: NumPy in, NumPy out."""

from fastgen.runtime._plan import Plan, PlanError

__all__ = ["Plan", "PlanError"]
