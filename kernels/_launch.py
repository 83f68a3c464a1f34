"""The launch of a kernel, and properties of tensors and the chip that launchers need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1
# A launch as tests and benchmarks see it: (kernel, grid, arguments by name, options).
Launch = tuple[Any, tuple[int, ...], dict[str, Any], dict[str, Any]]
_recorder: Callable[[Launch], None] | None = None
_MAX_GRID = (2**31 - 1, 65535, 65535)  # programs that CUDA launches along each dimension of a grid


@contextlib.contextmanager
def recorded():
    """A context in which launches are not run but appended to the list that it yields; tensors may be on "meta"."""
    global _recorder
    launches: list[Launch] = []
    previous, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = previous


def launch(
    kernel,
    grid: tuple[int, ...],
    like: Tensor,
    *,
    warps: int = 4,
    stages: int = 2,
    maxnreg: int | None = None,
    **arguments: Any,
) -> None:
    """Runs the kernel on the device and the current stream of `like`. Raises ValueError if the grid is too large for a
    GPU."""
    if any(size > limit for size, limit in zip(grid, _MAX_GRID, strict=False)):
        raise ValueError(
            f"{kernel.fn.__name__} needs a grid of {grid} programs, but a GPU launches at most "
            f"{_MAX_GRID[: len(grid)]}: compute fewer images or groups at a time, or use another implementation "
            "(impl='reference')"
        )
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": maxnreg} if maxnreg else {})
    if _recorder is not None:
        _recorder((kernel, grid, arguments, options))
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, **options)


def multiprocessors(like: Tensor) -> int:
    """The number of the GPU's multiprocessors, or of an H200's if there is no GPU."""
    return torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 132


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def wide(*tensors: Tensor | None) -> bool:
    """Whether an index into one of the tensors needs 64 bits. The margin covers masked indices of a tile beyond the
    tensor's end."""
    return any(t is not None and t.numel() >= 2**31 - 2**20 for t in tensors)


def strides(prefix: str, t: Tensor, dimensions: str = "nchw") -> dict[str, int]:
    """The strides as a kernel's arguments: xn, xc, xh and xw for the prefix x."""
    return {prefix + dimension: stride for dimension, stride in zip(dimensions, t.stride(), strict=True)}


def new_pair(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Two new float32 tensors of this shape."""
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


@triton.jit
def program_id(WIDE: tl.constexpr):
    """The program's index; with WIDE it has 64 bits, and so does everything computed from it."""
    return tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
