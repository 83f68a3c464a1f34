"""Checks of the ops' arguments. Each error names the argument, what was passed and what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.ops._geometry import HW, for_both_axes

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def to_2d(name: str, value: int | Sequence[int], least: int) -> HW:
    """value as (height, width); both at least `least`. One number, alone or in a sequence, is for both."""
    values = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, Sequence)) else ()
    pair = for_both_axes(values)
    if len(pair) != 2 or not (isinstance(pair[0], int) and isinstance(pair[1], int)):
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    if pair[0] < least or pair[1] < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return pair


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def same_kind(name: str, tensor: Tensor, x: Tensor) -> None:
    """Checks that the tensor has the input's dtype and device."""
    floating(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, input on {x.device}: move one of them")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, input is {x.dtype}: convert one of them")


def per_channel(name: str, tensor: Tensor | None, channels: int, x: Tensor) -> None:
    """Checks that the tensor has one value per channel, on the input's device, in its dtype or float32."""
    if tensor is None:
        return
    floating(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, input on {x.device}: move one of them")
    if tensor.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64 and tensor.dtype != torch.float64):
        raise TypeError(f"{name} is {tensor.dtype}, input is {x.dtype}: convert {name} to {x.dtype}")
    if tuple(tensor.shape) != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), one value per channel, got {tuple(tensor.shape)}")
