from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import numpy as np

from fastgen._build import runtime
from fastgen.errors import FastgenError

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # the file's names -> Engine's names


class PlanError(FastgenError):
    """A plan file is damaged, cut short, of another version, or not a plan."""


class Input(NamedTuple):
    """An input of a plan: an image's shape, or for labels (integers of shape ()) the number of classes."""

    shape: tuple[int, ...]
    classes: int | None = None


class Plan:
    """A network whose weights are packed once and which runs on its own threads. Several Python threads may call one
    plan, and so may forked processes; copy, deepcopy and pickle build it again from its bytes, with the same threads=.

    Args:
        data: the bytes of a plan file, as fastgen.Engine.save and `fastgen export` write it: numbers, no code.
        threads: maximum number of threads; None: FASTGEN_THREADS, or the number of processors that the process may use.

    Raises PlanError for bytes that are not a complete, undamaged plan of this version, and FastgenError if the native
    module can neither be found nor built.
    """

    def __init__(self, data: bytes, *, threads: int | None = None) -> None:
        try:
            self._open(runtime.load().Plan(bytes(data), _checked(threads)), threads)
        except RuntimeError as error:
            raise PlanError(f"the plan cannot be used: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> Plan:
        """Loads a plan file. Raises OSError, and what Plan() raises with the path in front of the message."""
        with open(path, "rb"):  # raises the error if the file cannot be opened
            pass
        native = runtime.load()
        plan = cls.__new__(cls)
        try:
            plan._open(native.Plan.load(os.fspath(path), _checked(threads)), threads)
        except RuntimeError as error:
            raise PlanError(f"{os.fspath(path)}: {error}") from None
        return plan

    def _open(self, plan: Any, threads: int | None) -> None:
        self._plan, self._threads = plan, threads
        self.inputs = tuple(Input(shape, None if shape else rows) for shape, rows in plan.inputs)
        self.output_shapes: tuple[tuple[int, ...], ...] = tuple(shape for shape, _ in plan.outputs)
        self.precision = _PRECISIONS[plan.precision]  # the file's
        self.runs_as = _PRECISIONS[plan.runs_as]  # on this processor: "fp32" if it cannot multiply bfloat16

    @property
    def error(self) -> float:
        """The relative L2 error that fastgen.Engine measured when it made the plan; NaN if it was not measured."""
        return self._plan.error

    @error.setter
    def error(self, error: float) -> None:
        if error < 0 or math.isinf(error):
            raise ValueError(f"error must be a finite number of at least 0, or NaN, got {error}")
        self._plan.error = error

    def to_bytes(self) -> bytes:
        """The bytes of a plan file, with the algorithms that tune() chose."""
        return self._plan.file()

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (self.to_bytes(), self._threads)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image of the first input; `inputs` has all inputs."""
        return self.inputs[0].shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one image of the first output; `output_shapes` has all of them."""
        return self.output_shapes[0]

    @property
    def threads(self) -> int:
        return self._plan.threads

    @property
    def images_at_once(self) -> int:
        """How many images of a batch run together, so that the values between layers stay in the cache."""
        return self._plan.images_at_once

    @property
    def batches_to_tune(self) -> list[int]:
        """The batch sizes for which tune() should be called: a small one, and a large one if that many images run
        together."""
        return self._plan.batches_to_tune

    def __call__(self, z: np.ndarray, *others: np.ndarray) -> Any:
        """Runs the network.

        Args:
            z: float32 (N, *input_shape) for any N. An input of shape (C, 1, 1) may be given as (N, C), and vice versa.
                Labels are integers (N,).
            others: the other inputs, if the network has several, with the same N.

        Returns float32 (N, *output_shape), or a tuple if there are several outputs. Raises TypeError and ValueError for
        other dtypes and shapes, and IndexError for a label that is out of range.
        """
        inputs = (z, *others)
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the plan takes {len(self.inputs)} inputs, got {len(inputs)}")
        names = [f"inputs[{i}]" for i in range(len(inputs))] if others else ["z"]
        arrays = [_array(*each) for each in zip(names, inputs, self.inputs, strict=True)]
        n = arrays[0].shape[0]
        for name, array in zip(names, arrays, strict=True):
            if array.shape[0] != n:
                raise ValueError(f"{name} must have {n} images as inputs[0] has, got shape {array.shape}")
        outputs = tuple(np.empty((n, *shape), np.float32) for shape in self.output_shapes)
        self.run(n, [array.ctypes.data for array in arrays], [out.ctypes.data for out in outputs])
        return outputs if len(outputs) > 1 else outputs[0]

    def run(self, n: int, inputs: list[int], outputs: list[int]) -> None:
        """The same for `n` images at addresses of contiguous memory: float32, or int64 for labels. The only check of
        the contents is that labels are in range."""
        self._plan.run(n, inputs, outputs)

    def tune(self, n: int, split: bool = True) -> list[int]:
        """Measures the algorithms of each convolution for `n` images and uses the fastest; see Engine.

        split: a convolution of float32 may use sums of products of two bfloat16 per number on a processor with AMX. Its
        error is about 4e-6.
        """
        return self._plan.tune(_positive("n", n), split)

    def profile(self, n: int = 1, repeats: int = 20) -> list[float]:
        """The time in seconds of each step in a run of `n` images: the minimum over `repeats` runs."""
        return self._plan.profile(_positive("n", n), _positive("repeats", repeats))


def _from_bytes(data: bytes, threads: int | None) -> Plan:
    return Plan(data, threads=threads)


def _checked(threads: int | None) -> int:
    if threads is None:
        return 0
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a positive integer or None, got {threads!r}")
    return min(threads, 1 << 16)  # the plan uses at most as many as there are processors


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _array(name: str, value: object, expected: Input) -> np.ndarray:
    """The value as the plan reads it."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(value).__name__}")
    if expected.classes is not None:
        if not np.issubdtype(value.dtype, np.integer):
            raise TypeError(f"{name} must be labels of an integer dtype, got {value.dtype}")
        if value.ndim != 1:
            raise ValueError(f"{name} must be of shape (N,), got {value.shape}")
        return np.ascontiguousarray(value, np.int64)
    if value.dtype != np.float32:
        raise TypeError(f"{name} must be float32, got {value.dtype}: pass {name}.astype(numpy.float32)")
    if value.ndim < 2 or _squeezed(value.shape[1:]) != _squeezed(expected.shape):
        shape = ", ".join(map(str, ("N", *expected.shape)))
        raise ValueError(f"{name} must be of shape ({shape}), got {value.shape}")
    return np.ascontiguousarray(value)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if shape[1:] == (1, 1) else shape
