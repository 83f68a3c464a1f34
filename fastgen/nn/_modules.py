"""What PyTorch's layers say to the fused ops: which of them fuse, and the arguments that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastgen import ops

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_ACTIVATIONS = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}


def fusable(
    modules: Sequence[nn.Module], start: int
) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None, int]:
    """(convolution, norm, activation, end) of the run of modules from `start` that one op computes; end == start: none.

    Such a run is ConvTranspose2d -> [norm] -> [activation] with at least two members, or norm -> activation. Types are compared
    exactly, since a subclass may compute something else, and modules with hooks keep their calls.
    """
    at = start

    def take(*types: type[nn.Module]) -> nn.Module | None:
        nonlocal at
        if at < len(modules) and type(modules[at]) in types and not _has_hooks(modules[at]):
            at += 1
            return modules[at - 1]
        return None

    convolution = take(nn.ConvTranspose2d)
    norm = take(*(_BATCH + _INSTANCE if convolution is None else (nn.BatchNorm2d, nn.InstanceNorm2d)))
    activation = take(*_ACTIVATIONS)
    return convolution, norm, activation, at if at - start > 1 else start


def _has_hooks(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def run(x: Tensor, convolution: nn.Module | None, norm: nn.Module | None, activation: nn.Module | None) -> Tensor:
    """What calling the three modules in turn computes, in one op."""
    arguments: dict[str, Any] = {"activation": _ACTIVATIONS[type(activation)] if activation is not None else "identity"}
    if isinstance(activation, nn.LeakyReLU):
        arguments["negative_slope"] = activation.negative_slope
    arguments.update(_norm_arguments(norm, x))
    if not isinstance(convolution, nn.ConvTranspose2d):
        return ops.norm_act(x, **arguments)
    return ops.conv_transpose2d_norm_act(
        x,
        convolution.weight,
        convolution.bias,
        stride=convolution.stride,
        padding=convolution.padding,  # type: ignore[arg-type]  # a transposed one has no padding by name
        output_padding=convolution.output_padding,
        groups=convolution.groups,
        dilation=convolution.dilation,
        **arguments,
    )


def _norm_arguments(norm: nn.Module | None, x: Tensor) -> dict[str, Any]:
    """The norm's parameters, and what its forward does: counters, cumulative averages, statistics that are not tracked."""
    if norm is None:
        return {"norm": "none"}
    assert isinstance(norm, (*_BATCH, *_INSTANCE))
    momentum = 0.0 if norm.momentum is None else norm.momentum
    tracks = norm.track_running_stats
    if isinstance(norm, _BATCH):
        if x.dim() not in {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(norm)]:
            raise ValueError(f"{type(norm).__name__} does not take an input of shape {tuple(x.shape)}")
        if norm.training and tracks and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:  # a cumulative average
                momentum = 1.0 / float(norm.num_batches_tracked)
    use_running = tracks or not norm.training
    training = norm.training or (norm.running_mean is None if isinstance(norm, _BATCH) else not tracks)
    return {
        "norm": "batch" if isinstance(norm, _BATCH) else "instance",
        "running_mean": norm.running_mean if use_running else None,
        "running_var": norm.running_var if use_running else None,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "training": training,
        "momentum": momentum,
        "eps": norm.eps,
    }


def norm_module(norm: str | None, channels: int, **options: Any) -> list[nn.Module]:
    """[the 2-d norm layer of this name], or [] for None."""
    if norm in (None, "none"):
        return []
    if norm not in ("batch", "instance"):
        raise ValueError(f"norm must be 'batch', 'instance' or None, got {norm!r}")
    return [(nn.BatchNorm2d if norm == "batch" else nn.InstanceNorm2d)(channels, **options)]


def activation_module(activation: str | None, negative_slope: float) -> list[nn.Module]:
    """[the activation layer of this name], or [] for None and "identity"."""
    if activation in (None, "identity"):
        return []
    for layer, name in _ACTIVATIONS.items():
        if name == activation:
            return [layer(negative_slope)] if name == "leaky_relu" else [layer()]
    raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS.values())} or None, got {activation!r}")


def norm_options(affine: bool | None, track_running_stats: bool | None) -> dict[str, bool]:
    """Those that were given: the norm layers' own defaults differ."""
    options = {"affine": affine, "track_running_stats": track_running_stats}
    return {name: value for name, value in options.items() if value is not None}
