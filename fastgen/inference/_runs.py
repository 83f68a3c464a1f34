"""Runs: modules that one op computes together. The only file of this package that imports fastgen.nn's patterns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastgen.nn._patterns import fusable, is_plain, kind, steps
from fastgen.nn._run import run

__all__ = ["Run", "first_run", "is_plain", "kind", "steps"]


class Run(NamedTuple):
    """A convolution, norm and activation, each of which alone gets the output of the previous one. One may be
    missing."""

    convolution: nn.Module | None
    norm: nn.Module | None
    activation: nn.Module | None

    @property
    def members(self) -> tuple[nn.Module, ...]:
        return tuple(module for module in self if module is not None)

    def compute(self, input: Tensor) -> Tensor:
        """What calling the members in turn computes; by one op if that is possible and faster."""
        return run(input, *self)


def first_run(modules: Sequence[nn.Module]) -> Run | None:
    """The run at the start of these modules, which are called in turn."""
    *members, end = fusable(modules, 0)
    return Run(*members) if end else None
