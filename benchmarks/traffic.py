"""The least time that a call of an op can take on a GPU: its bytes and its operations over the chip's rates."""

from dataclasses import dataclass

import torch

from tests.cases import OpCase


@dataclass(frozen=True)
class Chip:
    """Rates that were seen on such a GPU, by random data: bytes a second (read + written) and operations a second."""

    name: str
    copy: float
    matrix: dict[str, float]  # of tensor cores, by kind of number


# 16 bits: seen; the others from the vendor's sheet, dense, and so leads.
H200 = Chip("NVIDIA H200", 4.3e12, {"16 bits": 785e12, "tf32": 495e12, "ieee": 67e12})


@dataclass(frozen=True)
class Work:
    """Of one call: the bytes of its passes through memory, and its multiplications and additions."""

    bytes: int
    flops: int

    def floor(self, chip: Chip, kind: str) -> float:
        """Seconds: the larger of the two times."""
        return max(self.bytes / chip.copy, self.flops / chip.matrix[kind])


def work(case: OpCase, dtype: torch.dtype, backward: bool = False) -> Work:
    """What fastgen's own passes move. Forward: each input read and the output written; with statistics of the batch also what
    the convolution leaves is written and read again. Backward: two passes over the norm, and two more products."""
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
