from __future__ import annotations

import os
from typing import Any

import numpy as np

from fastgen import _build
from fastgen.errors import FastgenError


class PlanError(FastgenError):
    """A plan file is damaged, cut short, of another version, or no plan."""


class Plan:
    """A network whose weights are packed once, on threads of its own. Several Python threads may call one plan.

    Args:
        data: the bytes of a plan file, as fastgen.Engine.save and `fastgen export` write it: numbers, no code.
        threads: how many to run on at most; None: as many as there are processors for the process, or FASTGEN_THREADS.

    Raises PlanError for bytes that are no whole and undamaged plan of this version, and FastgenError where the native
    module can neither be found nor built.
    """

    def __init__(self, data: bytes, *, threads: int | None = None) -> None:
        try:
            self._open(_build.load_runtime().Plan(bytes(data), _checked(threads)))
        except RuntimeError as error:
            raise PlanError(f"the plan cannot be used: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> Plan:
        """The plan of a file. Raises OSError, and what Plan() raises with the path in front."""
        with open(path, "rb"):  # says why it cannot be opened
            pass
        native = _build.load_runtime()
        plan = cls.__new__(cls)
        try:
            plan._open(native.Plan.load(os.fspath(path), _checked(threads)))
        except RuntimeError as error:
            raise PlanError(f"{os.fspath(path)}: {error}") from None
        return plan

    def _open(self, plan: Any) -> None:
        self._plan = plan
        self.input_shape: tuple[int, ...] = plan.input_shape
        self.output_shape: tuple[int, ...] = plan.output_shape
        self.precision: str = plan.precision

    @property
    def threads(self) -> int:
        return self._plan.threads

    @property
    def images_at_once(self) -> int:
        """How many images of a batch run together, so that what lies between layers stays in the cache."""
        return self._plan.images_at_once

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Runs the network.

        Args:
            z: float32 (N, *input_shape) for any N. For an input of shape (C, 1, 1) also (N, C), and the other way round.

        Returns float32 (N, *output_shape). Raises TypeError and ValueError for other dtypes and shapes.
        """
        if not isinstance(z, np.ndarray):
            raise TypeError(f"z must be a numpy.ndarray, got {type(z).__name__}")
        if z.dtype != np.float32:
            raise TypeError(f"z must be float32, got {z.dtype}: pass z.astype(numpy.float32)")
        if z.ndim < 2 or _squeezed(z.shape[1:]) != _squeezed(self.input_shape):
            expected = ", ".join(map(str, ("N", *self.input_shape)))
            raise ValueError(f"z must be of shape ({expected}), got {z.shape}")
        z = np.ascontiguousarray(z)
        out = np.empty((z.shape[0], *self.output_shape), np.float32)
        self.run(z.shape[0], z.ctypes.data, out.ctypes.data)
        return out

    def run(self, n: int, z: int, out: int) -> None:
        """The same for `n` images on addresses of contiguous float32 memory; nothing is checked."""
        self._plan.run(n, z, out)

    def tune(self, n: int) -> list[int]:
        """Measures the algorithms of each convolution for `n` images and uses the fastest; see Engine."""
        return self._plan.tune(n)

    def profile(self, n: int = 1, repeats: int = 20) -> list[float]:
        """The least seconds that each step takes alone for `n` images."""
        return self._plan.profile(n, repeats)


def _checked(threads: int | None) -> int:
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be a positive integer or None, got {threads!r}")
    return threads or 0


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if shape[1:] == (1, 1) else shape
