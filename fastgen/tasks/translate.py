import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgen.errors import UsageError
from fastgen.models import capabilities


def translate(
    model: Any,
    images: Tensor,
    direction: Literal["a_to_b", "b_to_a"] = "a_to_b",
    *,
    tile: int = 256,
    overlap: int = 64,
) -> Tensor:
    """Translates images of any size from one domain to the other; large ones in overlapping tiles that are blended.

    Tiling changes nothing for a network whose receptive field reaches at most overlap / 4 pixels from a pixel. With
    instance norm it does, since each tile has its own statistics; blending hides the seams.

    Images of a size that the network does not take are padded by their last row and column, and the result is cropped.

    Args:
        model: one that translates; see `fastgen.models.capabilities`.
        images: (N, C, H, W) in [-1, 1].
        tile: height and width of a tile.
        overlap: least number of pixels that neighbouring tiles share.

    Returns:
        (N, C', H, W) in [-1, 1].
    """
    declared = capabilities(model)
    if not declared.directions:
        raise UsageError(f"a {type(model).__name__} does not translate: use a CycleGAN")
    multiple, least = declared.size_multiple, declared.least_size
    return in_tiles(lambda part: model.translate(part, direction), images, tile, overlap, multiple, least)


@torch.no_grad()
def in_tiles(
    function: Callable[[Tensor], Tensor], images: Tensor, tile: int, overlap: int, multiple: int = 1, least: int = 1
) -> Tensor:
    """function(images) computed in tiles; it is called with heights and widths that are multiples of `multiple` and at
    least `least`."""
    grid = math.gcd(multiple, 4)  # tiles start on it, so that strided layers sample the pixels that they would sample
    if tile < least or tile % multiple or not 0 <= overlap <= min(tile // 2, tile - grid):
        sizes = f"a multiple of {multiple}" + (f" from {least} up" if least > multiple else "")
        raise UsageError(f"tile must be {sizes} and at least twice overlap, not {tile} with overlap {overlap}")
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
            weight = torch.outer(
                _ramps(top, rows, part.shape[2], overlap), _ramps(left, columns, part.shape[3], overlap)
            )
            if total is None:
                total = part.new_zeros(len(part), part.shape[1], *images.shape[2:])
            total[:, :, top : top + tile, left : left + tile] += part * weight.to(part)
            weights[top : top + tile, left : left + tile] += weight
    assert total is not None
    return (total / weights.to(total))[:, :, :height, :width]


def _starts(size: int, tile: int, overlap: int, grid: int) -> list[int]:
    """Where tiles start along `size` pixels: evenly spaced, on the grid, the last one at the end."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    while True:
        starts = [index * (size - tile) // (count - 1) // grid * grid for index in range(count)]
        if all(b - a <= tile - overlap for a, b in itertools.pairwise(starts)):
            return starts
        count += 1  # rounding to the grid made a step too long


def _ramps(start: int, starts: list[int], size: int, overlap: int) -> Tensor:
    """Weight of each row of a tile: 0 for a quarter of the overlap, whose surroundings are cut off, then rising to
    1."""
    pixels = torch.arange(overlap, dtype=torch.float32, device="cpu")
    ramp = ((pixels + 0.5 - overlap / 4) / max(overlap / 2, 1)).clamp(0, 1)
    weights = torch.ones(size, dtype=torch.float32, device="cpu")
    if start != starts[0]:
        weights[:overlap] *= ramp
    if start != starts[-1]:
        weights[size - overlap :] *= ramp.flip(0)
    return weights
