import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgen.errors import UsageError


def translate(
    model: Any,
    images: Tensor,
    direction: Literal["a_to_b", "b_to_a"] = "a_to_b",
    *,
    tile: int = 256,
    overlap: int = 64,
) -> Tensor:
    """Images of one domain as of the other, of any size: large ones in overlapping tiles that fade into each other.

    A network that sees at most overlap / 4 pixels around a pixel gives the same with tiles as without. One with
    instance norm does not, as each tile has statistics of its own; the fading leaves no edge.

    Args:
        model: with `translate(images, direction)`, a CycleGAN.
        images: (N, C, H, W) in [-1, 1].
        tile: height and width of a tile.
        overlap: pixels that neighbours share at least.

    A picture that is smaller than the network takes, or of a size that it does not take, is continued by its last row
    and column; the result is cut to its size.

    Returns:
        (N, C', H, W) in [-1, 1].
    """
    if not hasattr(model, "translate"):
        raise UsageError(f"a {type(model).__name__} translates nothing: it takes a CycleGAN")
    config = model.config
    unet = getattr(config, "generator", "") == "unet"
    multiple, least = (2**config.unet_depth,) * 2 if unet else (4, 8)
    return in_tiles(lambda part: model.translate(part, direction), images, tile, overlap, multiple, least)


@torch.no_grad()
def in_tiles(
    function: Callable[[Tensor], Tensor], images: Tensor, tile: int, overlap: int, multiple: int = 1, least: int = 1
) -> Tensor:
    """function(images) computed in tiles; heights and widths it is given are multiples of `multiple` from `least`
    up."""
    grid = math.gcd(multiple, 4)  # where tiles start: strided layers see them as they see the whole
    if tile < least or tile % multiple or not 0 <= overlap <= min(tile // 2, tile - grid):
        wanted = f"a multiple of {multiple}" + (f" from {least}" if least > multiple else "")
        raise UsageError(f"tile must be {wanted} and at least twice overlap, not {tile} with overlap {overlap}")
    if images.dim() != 4 or min(images.shape[1:]) < 1:
        raise UsageError(f"images must be (N, C, H, W) with C, H and W above 0, got shape {tuple(images.shape)}")
    height, width = images.shape[2:]
    bottom, right = (max(-size % (grid if size > tile else multiple), least - size) for size in (height, width))
    images = pad(images, (0, right, 0, bottom), "replicate")
    rows, columns = (_starts(size, tile, overlap, grid) for size in images.shape[2:])
    if len(rows) == len(columns) == 1:
        return function(images)[:, :, :height, :width]
    total, weights = None, torch.zeros(images.shape[2:], dtype=torch.float32, device="cpu")
    for top in rows:
        for left in columns:
            part = function(images[:, :, top : top + tile, left : left + tile]).float()
            fade = torch.outer(_fade(top, rows, part.shape[2], overlap), _fade(left, columns, part.shape[3], overlap))
            if total is None:
                total = part.new_zeros(len(part), part.shape[1], *images.shape[2:])
            total[:, :, top : top + tile, left : left + tile] += part * fade.to(part)
            weights[top : top + tile, left : left + tile] += fade
    assert total is not None
    return (total / weights.to(total))[:, :, :height, :width]


def _starts(size: int, tile: int, overlap: int, grid: int) -> list[int]:
    """Where tiles start along `size` pixels: evenly, on a grid, the last at the end."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    while True:
        starts = [index * (size - tile) // (count - 1) // grid * grid for index in range(count)]
        if all(b - a <= tile - overlap for a, b in itertools.pairwise(starts)):
            return starts
        count += 1  # the grid made a step too long


def _fade(start: int, starts: list[int], size: int, overlap: int) -> Tensor:
    """Weight of each of a tile's pixels: 0 for a quarter of the overlap, whose surroundings are cut off, then up to
    1."""
    pixels = torch.arange(overlap, dtype=torch.float32, device="cpu")
    ramp = ((pixels + 0.5 - overlap / 4) / max(overlap / 2, 1)).clamp(0, 1)
    weights = torch.ones(size, dtype=torch.float32, device="cpu")
    if start != starts[0]:
        weights[:overlap] *= ramp
    if start != starts[-1]:
        weights[size - overlap :] *= ramp.flip(0)
    return weights
