"""The minimum time of a call of an op on a GPU: its bytes and its operations divided by the chip's rates.

`work` counts them from the shapes of the call, `as_launched` from the launches of Triton's kernels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.cases import OpCase


@dataclass(frozen=True)
class Chip:
    """Rates of a GPU, measured with random data: bytes (read + written) and operations per second."""

    name: str
    copy: float
    matrix: dict[str, float]  # of matrix products, by precision


# The rates for 16 bits were measured; the others are the vendor's for dense data, and so only a rough guide.
H200 = Chip("NVIDIA H200", 4.3e12, {"16 bits": 785e12, "tf32": 495e12, "ieee": 67e12})


@dataclass(frozen=True)
class Work:
    """The bytes that a call moves, and its number of multiplications and additions."""

    bytes: int
    flops: int

    def floor(self, chip: Chip, kind: str) -> float:
        """Seconds: the larger of the two times."""
        return max(self.bytes / chip.copy, self.flops / chip.matrix[kind])


def work(case: OpCase, dtype: torch.dtype, backward: bool = False) -> Work:
    """The work of fastgen's passes. Forward: each input is read and the output written; with batch statistics, the
    convolution's result is also written and read again. Backward: two passes over the norm, and two more products."""
    moved, flops = case.bytes(dtype), case.flops()
    out = 1
    for size in case._output_shape():
        out *= size
    out *= dtype.itemsize
    if case.batch_stats:
        moved += out if not flops else 2 * out
    if backward:
        inputs = case.bytes(dtype) - out
        moved += (5 * out if case.batch_stats else 3 * out) + (2 * out + 2 * inputs if flops else 0)
        flops *= 3
    return Work(moved, flops)


def as_launched(launches: Iterable[tuple], chip: Chip) -> float:
    """Seconds of the launches that `fastgen.kernels._launch.recorded` recorded, one after another."""
    return sum(of_launch(launch).floor(chip, _kind(launch[2])) for launch in launches)


def of_launch(launch: tuple) -> Work:
    """Counts each tensor among the kernel's arguments once (including partial sums, statistics and copies), and all
    products of its tiles, including masked ones."""
    kernel, grid, arguments, _ = launch
    leaves = [t for value in arguments.values() for t in (value if isinstance(value, tuple) else (value,))]
    tensors = {id(t): t for t in leaves if isinstance(t, Tensor)}
    return Work(sum(t.numel() * t.itemsize for t in tensors.values()), _products(kernel.__name__, grid, arguments))


def _products(name: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> int:
    if name not in ("convolve", "correlate"):
        return 0
    depth, taps = arguments["DEPTH"], arguments["KH"] * arguments["KW"]
    tile = 2 * arguments["ROWS"] * arguments["COLUMNS"] * depth
    if name == "correlate":  # the weight's gradient: splits divide the pixels
        return grid[0] * grid[1] * math.ceil(arguments["pixels"] / depth) * tile
    groups, channels = arguments["GROUPS"], arguments["channels"]
    phases = grid[1] // groups  # which divide the taps
    flat = phases * math.ceil(math.ceil(taps / phases) * channels / depth)
    return grid[0] * groups * (flat if arguments["FLAT"] else taps * math.ceil(channels / depth)) * tile


def _kind(arguments: dict[str, Any]) -> str:
    factor = arguments.get("outer", arguments.get("x"))
    return arguments["PRECISION"] if "PRECISION" in arguments and factor.dtype == torch.float32 else "16 bits"
