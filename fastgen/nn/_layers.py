"""The PyTorch layers for the names of norms and activations."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastgen.ops._activations import ACTIVATIONS


def norm_module(
    norm: str | None, channels: int, momentum: float | None, num_groups: int | None = None, **options: Any
) -> list[nn.Module]:
    """[the 2-d norm layer of this name], or [] for None."""
    if norm in (None, "none"):
        return []
    if norm not in ("batch", "instance", "group"):
        raise ValueError(f"norm must be 'batch', 'instance', 'group' or None, got {norm!r}")
    if (norm == "group") != (num_groups is not None):
        raise ValueError(f"num_groups must be given for norm 'group' and for no other, got {num_groups} for {norm!r}")
    if num_groups is not None:
        options.pop("track_running_stats", None)
        return [nn.GroupNorm(num_groups, channels, **options)]
    layer: Any = nn.BatchNorm2d if norm == "batch" else nn.InstanceNorm2d
    return [layer(channels, momentum=momentum, **options)]


def activation_module(activation: str | None, negative_slope: float) -> list[nn.Module]:
    """[the activation layer of this name], or [] for None and "identity"."""
    if activation is None or activation == "identity":
        return []
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    layer: Any = ACTIVATIONS[activation].module
    return [layer(negative_slope)] if activation == "leaky_relu" else [layer()]


def norm_options(affine: bool | None, track_running_stats: bool | None) -> dict[str, bool]:
    """The arguments that were given: the norm layers have different defaults for the others."""
    options = {"affine": affine, "track_running_stats": track_running_stats}
    return {name: value for name, value in options.items() if value is not None}
