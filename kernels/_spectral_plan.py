"""The table in which each program of the spectral norm kernels finds its weight and its part of that weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from fastgen.kernels._layout import is_channels_last
from torch import Tensor

ROWS, COLUMNS = 16, 128  # a tile of the products
PARTS, WIDTH = 16, 128  # a tile of the parts of the summed product
CHUNK = 2048  # elements per program of the passes over elements
FIELDS = tl.constexpr(12)  # per weight in the table


def matrix(weight: Tensor, dim: int) -> tuple[int, int, int, int]:
    """rows, inner, columns and spread of a dense weight: see `part_of` in kernels/spectral_norm.py."""
    rows = weight.shape[dim]
    columns = weight.numel() // rows
    if not is_channels_last(weight):
        return rows, math.prod(weight.shape[dim + 1 :]), columns, 1
    return (rows, columns, columns, weight.shape[1]) if dim == 0 else (rows, 1, columns, 1)


class Plan:
    """The programs of each step for weights of these shapes, and the tables in which they find their parts."""

    def __init__(self, matrices: Sequence[tuple[int, int, int, int]], transposed: bool, device: torch.device) -> None:
        lines, sums, vectors, elements, fields = [], [], [], [], []
        self.t = self.parts = self.s = 0  # sizes of the scratch tensors
        for index, (rows, inner, columns, spread) in enumerate(matrices):
            t_size, s_size = (columns, rows) if transposed else (rows, columns)
            tiles, chunks = triton.cdiv(t_size, ROWS), triton.cdiv(s_size, WIDTH)
            fields += [
                rows, inner, columns, spread, self.t, self.parts, self.s, len(lines), tiles, len(sums), chunks,
                len(elements),
            ]  # fmt: skip
            lines += [(index, tile) for tile in range(tiles)]
            sums += [(index, chunk) for chunk in range(chunks)]
            vectors += [(index, chunk) for chunk in range(triton.cdiv(max(rows, columns), CHUNK))]
            elements += [(index, chunk) for chunk in range(triton.cdiv(max(rows * columns, rows, columns), CHUNK))]
            self.t, self.parts, self.s = self.t + t_size, self.parts + tiles * s_size, self.s + s_size
        self.count = len(matrices)
        self.table, self.lines, self.sums, self.elements, self.vectors = _permanent(
            (fields, lines, sums, elements, vectors), device
        )

    @staticmethod
    @functools.cache  # a CUDA graph reads its plan for as long as it exists
    def of(matrices: tuple[tuple[int, int, int, int], ...], transposed: bool, device: torch.device) -> Plan:
        return Plan(matrices, transposed, device)


def _permanent(tables: Sequence[list], device: torch.device) -> list[Tensor]:
    """int32 tensors of the tables, which outlive any CUDA graph.

    A thread that warms up or records a CUDA graph allocates from the graph's memory, which must not be kept
    (torch.compile checks that), so another thread creates them.
    """
    with ThreadPoolExecutor(1) as thread:
        return list(thread.map(lambda table: torch.tensor(table, dtype=torch.int32, device=device), tables))
