"""What the kernels share: their launch, the activations, and how memory order is described."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1
# A launch as the kernels' proofs and their traffic model see it: (kernel, grid, arguments by name, options).
Launch = tuple[Any, tuple[int, ...], dict[str, Any], dict[str, Any]]
_recorder: Callable[[Launch], None] | None = None
_MOST = (2**31 - 1, 65535, 65535)  # programs that CUDA launches along each dimension of a grid


@contextlib.contextmanager
def recorded():
    """Within the context launches are written down, in the list that it gives, and not run; tensors may be "meta"."""
    global _recorder
    launches: list[Launch] = []
    before, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = before


def launch(kernel, grid: tuple[int, ...], like: Tensor, *, warps: int = 4, stages: int = 2, maxnreg: int | None = None,
           **arguments: Any) -> None:  # fmt: skip
    """Runs the kernel on the device and current stream of `like`. Raises ValueError for a grid larger than a GPU
    takes."""
    if any(size > most for size, most in zip(grid, _MOST, strict=False)):
        raise ValueError(
            f"{kernel.fn.__name__} needs a grid of {grid} programs, and a GPU takes {_MOST[: len(grid)]}: compute "
            f"fewer "
            "images or groups at a time, or ask for another implementation (impl='reference')"
        )
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": maxnreg} if maxnreg else {})
    if _recorder is not None:
        _recorder((kernel, grid, arguments, options))
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, **options)


def multiprocessors(like: Tensor) -> int:
    """How many programs run at a time; an H200's where there is no GPU to ask."""
    return torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 132


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def wide(*tensors: Tensor | None) -> bool:
    """Whether an index into one of the tensors needs 64 bits. The margin is what a masked tile may reach beyond."""
    return any(t is not None and t.numel() >= 2**31 - 2**20 for t in tensors)


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    """x in one of the two memory orders: itself if it is in it."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class Lines(NamedTuple):
    """`lines` sets of `length` values each, as a dense tensor has them: value k of line i lies at

    i // per_sample * outer_line + i % per_sample * inner_line + k // inner * outer_step + k % inner * inner_step.
    """

    lines: int
    per_sample: int
    outer_line: int
    inner_line: int
    length: int
    inner: int
    outer_step: int
    inner_step: int

    def arguments(self) -> dict[str, int | bool]:
        return {**self._asdict(), "WHOLE": self.inner == self.length}

    def tile(self, values: int = 2048) -> tuple[int, int]:
        """(lines, values of each) of a tile of so many values, the long side along memory."""
        if self.inner_line == 1 and self.inner_step != 1:
            along = min(power_of_2(self.lines), 64)
            return along, min(power_of_2(self.length), values // along)
        along = min(power_of_2(self.length), values)
        return min(power_of_2(self.lines), values // along), along


def one_line(x: Tensor) -> Lines:
    """All of x as one line, for what takes each value alone."""
    return Lines(1, 1, 0, 0, x.numel(), x.numel(), 0, 1)


def pair(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Two new float32 tensors of this shape."""
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


def channel_lines(x: Tensor, channels_last: bool, per_sample: bool, sets: int | None = None) -> Lines:
    """The lines of x (n, c, *) that share a channel, or a set of neighbouring ones; of each sample for itself if
    per_sample."""
    n, c = x.shape[:2]
    s = x.numel() // max(1, n * c)
    sets = c if sets is None else sets
    group = c // sets
    if not per_sample:
        if channels_last or s == 1:
            return Lines(c, c, 0, 1, n * s, n * s, 0, c)
        return Lines(c, c, 0, s, n * s, s, c * s, 1)
    if not channels_last:
        return Lines(n * sets, sets, c * s, group * s, group * s, group * s, 0, 1)
    if group == 1:
        return Lines(n * c, c, c * s, 1, s, s, 0, c)
    return Lines(n * sets, sets, c * s, group, group * s, group, c, 1)


@triton.jit
def tanh_(x):
    """As csrc/shared/activation.h: a polynomial near 0, where 1 - 2 / (exp(2 x) + 1) cancels (Cephes, tanhf.c)."""
    square = x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    magnitude = tl.minimum(tl.abs(x), 20.0)
    large = 1 - 2 / (tl.exp(2 * magnitude) + 1)
    result = tl.where(magnitude < 0.625, small, tl.where(x < 0, -large, large))
    return tl.where(x != x, x, result)


@triton.jit
def sigmoid_(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """activation(z); NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "tanh":
        z = tanh_(z)
    elif ACTIVATION == "sigmoid":
        z = sigmoid_(z)
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def activate_grad(grad, z, slope, ACTIVATION: tl.constexpr):
    """grad * activation'(z)"""
    if ACTIVATION == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * slope)
    elif ACTIVATION == "tanh":
        y = tanh_(z)
        grad = grad * (1 - y * y)
    elif ACTIVATION == "sigmoid":
        y = sigmoid_(z)
        grad = grad * y * (1 - y)
    elif ACTIVATION == "silu":
        y = sigmoid_(z)
        grad = grad * y * (1 + z * (1 - y))
    return grad


@triton.jit
def program_id(WIDE: tl.constexpr):
    """The program's number; with WIDE, all that is computed from it has 64 bits."""
    return tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)


@triton.jit
def line_base(line, per_sample, outer_line, inner_line):
    """Where each line of Lines starts."""
    return line // per_sample * outer_line + line % per_sample * inner_line


@triton.jit
def line_step(k, inner, outer_step, inner_step, WHOLE: tl.constexpr):
    """Where each value of a line lies from the line's start."""
    if WHOLE:
        return k * inner_step
    return k // inner * outer_step + k % inner * inner_step
