"""Checks of the arguments of ops: each names the argument, what was found and what is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu")


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """value as (height, width); both at least `least`."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, Sequence)) else ()
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


def alike(name: str, tensor: Tensor, x: Tensor) -> None:
    """The tensor has x's dtype and device."""
    floating(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move one of them")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, x is {x.dtype}: convert one of them")


def per_channel(name: str, tensor: Tensor | None, channels: int, x: Tensor) -> None:
    """The tensor has one value a channel, on x's device, in x's dtype or float32."""
    if tensor is None:
        return
    floating(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move one of them")
    if tensor.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64 and tensor.dtype != torch.float64):
        raise TypeError(f"{name} is {tensor.dtype}, x is {x.dtype}: convert {name} to {x.dtype}")
    if tuple(tensor.shape) != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), one value a channel, got {tuple(tensor.shape)}")


def tail(
    x: Tensor,
    sizes: Sequence[int],
    norm: str,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    num_groups: int | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    inplace: bool,
    process_group: object,
) -> bool:
    """Checks what norm_act and the fused convolutions share, for values of these sizes before the norm.

    Returns whether the statistics are those of the values.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if residual is not None:
        alike("residual", residual, x)
        if tuple(residual.shape) != tuple(sizes):
            raise ValueError(f"residual must have the output's shape {tuple(sizes)}, got {tuple(residual.shape)}")
    if (norm == "group") != (num_groups is not None):
        raise ValueError(f"num_groups goes with norm='group', got num_groups={num_groups} and norm={norm!r}")
    if num_groups is not None and (num_groups < 1 or sizes[1] % num_groups):
        raise ValueError(f"num_groups must divide the {sizes[1]} channels, got {num_groups}")
    if process_group is not None and norm != "batch":
        raise ValueError(f"process_group goes with norm='batch', got norm={norm!r}")
    if norm == "none":
        return False
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if norm == "group" and running_mean is not None:
        raise ValueError("running_mean and running_var have no meaning for norm='group'")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
    ):
        per_channel(name, tensor, sizes[1], x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if norm == "batch" and running_mean is None and not training:
        raise ValueError("running_mean and running_var must be given when training=False and norm='batch'")
    if not training and running_mean is not None:
        return False
    spatial = math.prod(sizes[2:])
    if norm == "batch" and sizes[0] * spatial == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(sizes)}")
    if norm == "instance" and spatial == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {tuple(sizes)}")
    if norm == "group" and sizes[0] * (sizes[1] // (num_groups or 1)) * spatial == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(sizes)}")
    return True
