"""The tiles of the matrix products, and the choice of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """Rows, columns and depth of a program's product, its warps, and the stages in which loads are pipelined."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


# All tiles, larger ones first, designed only for registers and shared memory; fastgen.tune measures them. "gathered":
# tensor cores, with loads of one value at a time (channels apart in memory, or not a multiple of 16 of them).
TILES = {
    "16 bits": (
        Tile(128, 128, 32, 8, 4),
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 32, 64, 4, 3),
        Tile(128, 16, 64, 4, 3),
        Tile(16, 64, 128, 4, 3),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(128, 32, 32, 8, 3),
        Tile(128, 16, 32, 4, 3),
        Tile(16, 64, 64, 4, 3),
    ),
    "gathered": (Tile(64, 64, 32, 8, 3), Tile(64, 16, 32, 4, 3), Tile(16, 64, 32, 4, 3)),
    "ieee": (Tile(64, 64, 16, 8, 2), Tile(64, 16, 16, 4, 2), Tile(16, 64, 16, 4, 2)),
}


def precision_of(x: Tensor) -> str:
    """float32 uses the precision that torch.backends.cudnn sets for convolutions."""
    if x.dtype != torch.float32:
        return "16 bits"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def kind_of(x: Tensor, channels_last: bool, channels: int) -> str:
    """The kind of TILES for an input with this many channels per group."""
    precision = precision_of(x)
    return "gathered" if precision != "ieee" and is_gathered(channels_last, channels) else precision


def is_gathered(channels_last: bool, channels: int) -> bool:
    return not channels_last or channels % 16 != 0


def choose_tile(kind: str, rows: int, columns: int, products: int, programs: int, measured: str = "") -> Tile:
    """The tile for `products` products of this size on a chip with this many multiprocessors: the one measured to be
    fastest (its str()) if it is of this kind, else the largest that fills the chip."""
    tiles = TILES[kind]
    for tile in tiles:
        if str(tile) == measured:
            return tile
    width = min(
        (tile.columns for tile in tiles if tile.columns >= columns), default=max(tile.columns for tile in tiles)
    )
    fitting = [tile for tile in tiles if tile.rows > 16 and (tile.columns == width or 64 <= tile.columns < width)]
    if rows <= 32:
        return tiles[-1]
    for tile in fitting:
        if products * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= programs:
            return tile
    return fitting[-1]


def splits_of(programs: int, steps: int, target: int, max_splits: int = 32) -> int:
    """The number of parts of the sum: enough to fill the chip, with at least 4 steps each."""
    return max(1, min(target // max(1, programs), steps // 4, max_splits))
