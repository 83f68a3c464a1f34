"""What PyTorch's layers say to the fused ops: which of them fuse, and the arguments that stand for them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from fastgen import ops
from fastgen.errors import UsageError
from fastgen.nn.spectral_norm import undivided
from fastgen.ops import _over_sigma, _processor, _rules
from fastgen.ops._check import FLOATING
from fastgen.ops._dispatch import count, is_pytorchs, runs_auto
from fastgen.ops._geometry import Geometry
from fastgen.ops._layout import Like
from fastgen.ops.norm_act import Tail

# Where the forward pre-hooks are defined that do nothing but compute a module's weight.
_WEIGHT_HOOKS = (
    "torch.nn.utils.spectral_norm", "torch.nn.utils.weight_norm", "torch.nn.utils.prune", "fastgen.nn.spectral_norm",
)  # fmt: skip
SMALL = {True: 100_000_000, False: 20_000_000}  # multiplications of a convolution, with gradients and without
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# How many dimensions their batches have; for the other norms any number from 2.
_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,),
    nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,),
}  # fmt: skip
_ACTIVATIONS = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (*_BATCH, *_INSTANCE, nn.GroupNorm)
_NORMS_OF_IMAGES = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm)
_KINDS = dict.fromkeys([*_CONVOLUTIONS, *_NORMS, *_ACTIVATIONS])


def fusable(
    modules: Sequence[nn.Module], start: int
) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None, int]:
    """(convolution, norm, activation, end) of the run of modules from `start` that one op computes; end == start: none.

    Such a run is Conv2d or ConvTranspose2d -> [norm] -> [activation], at least two members, or norm -> activation.
    Kinds are compared exactly, since a subclass may compute something else, and modules with hooks keep their calls.
    """
    at = start

    def take(types: Container[type[nn.Module]]) -> nn.Module | None:
        nonlocal at
        if at < len(modules) and kind(modules[at]) in types and is_plain(modules[at]):
            at += 1
            return modules[at - 1]
        return None

    convolution: Any = take(_CONVOLUTIONS)
    if convolution is not None and not _pads_fusably(convolution):
        return None, None, None, start
    norm = take(_NORMS if convolution is None else _NORMS_OF_IMAGES)
    activation = take(_ACTIVATIONS)
    return convolution, norm, activation, at if at - start > 1 else start


def _pads_fusably(convolution: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether its padding is one that the ops have."""
    return convolution.padding_mode in ("zeros", "reflect") and not isinstance(convolution.padding, str)


def kind(module: nn.Module) -> type[nn.Module]:
    """The module's class, past those that parametrizations and fastgen.fuse put in its place: they compute the same."""
    cls = type(module)
    if cls in _KINDS:  # the usual case
        return cls
    base = cls.__bases__[0] if cls.__module__ == "torch.nn.utils.parametrize" else cls
    return getattr(base, "stands_for", base)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward alone, and before it hooks that compute a convolution's
    weight: no other hooks of its own, nor of all modules."""
    return not (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or module._forward_hooks
        or (module._forward_pre_hooks and not _computes_weight(module))
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _computes_weight(module: nn.Module) -> bool:
    """Whether a module's forward pre-hooks are old spectral_norm, weight_norm or pruning, of a convolution."""
    kinds = [type(hook).__module__ for hook in module._forward_pre_hooks.values()]
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and all(kind in _WEIGHT_HOOKS for kind in kinds)


def before_forward(module: nn.Module | None, x: Tensor) -> None:
    """What calling a plain module does before its forward: its hooks, which compute its weight."""
    for hook in module._forward_pre_hooks.values() if module is not None else ():
        hook(module, (x,))


def steps(sequential: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The (name, module) that a Sequential calls in turn; for a plain Sequential among them, its own."""
    for name, module in sequential._modules.items():
        if isinstance(module, nn.Sequential) and kind(module).forward is nn.Sequential.forward and is_plain(module):
            yield from steps(module, f"{prefix}{name}.")
        elif module is not None:
            yield f"{prefix}{name}", module


def run(x: Tensor, convolution: nn.Module | None, norm: nn.Module | None, activation: nn.Module | None) -> Tensor:
    """What calling the three modules in turn computes, in one op, unless their own are faster or no op takes x as they
    do."""
    if not _is_batch(x, convolution, norm) or is_pytorchs():
        return _in_turn(x, convolution, norm, activation)
    if convolution is not None and _synchronizes(norm) is None and _is_small(x, convolution):
        count("conv2d_norm_act" if kind(convolution) is nn.Conv2d else "conv_transpose2d_norm_act", "reference")
        return _in_turn(x, convolution, norm, activation)
    try:
        y = _in_one(x, convolution, norm, activation)
    except UsageError:  # the environment names no implementation or instruction set
        raise
    except (TypeError, ValueError):
        # An op's check refuses it: the modules know better, or theirs is the error to see.
        return _in_turn(x, convolution, norm, activation)
    if isinstance(norm, _BATCH) and _counts(norm):
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    return y


def _in_turn(x: Tensor, *modules: nn.Module | None) -> Tensor:
    for module in modules:
        x = x if module is None else kind(module).forward(module, x)
    return x


def _is_batch(x: Tensor, convolution: Any, norm: Any) -> bool:
    """Whether x is what the ops are written for: a batch of as many dimensions and channels as the modules say, of a
    dtype and layout that kernels have. The modules know what to do with others: with an image alone, which some take,
    or integers."""
    if not _is_dense(x):
        return False
    if convolution is not None:
        weight = convolution._parameters.get("weight")  # None where a parametrization computes it
        return x.dim() == 4 and x.shape[1] == convolution.in_channels and (weight is None or _is_dense(weight))
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    dimensions = _DIMENSIONS.get(kind(norm))
    return (x.dim() > 1 if dimensions is None else x.dim() in dimensions) and x.shape[1] == channels


def _is_dense(x: Tensor) -> bool:
    known = type(x) is Tensor or type(x) is nn.Parameter or type(x).__module__.startswith("torch._subclasses.")
    return known and x.dtype in FLOATING and x.layout is torch.strided and not (x.is_nested or x.is_meta)


def _in_one(x: Tensor, convolution: nn.Module | None, norm: nn.Module | None, activation: nn.Module | None) -> Tensor:
    arguments: dict[str, Any] = {"activation": _ACTIVATIONS[kind(activation)] if activation is not None else "identity"}
    if isinstance(activation, nn.LeakyReLU):
        arguments.update(negative_slope=activation.negative_slope, inplace=activation.inplace)
    arguments.update(_norm_arguments(norm))
    if convolution is None:
        return ops.norm_act(x, **arguments)
    assert isinstance(convolution, (nn.Conv2d, nn.ConvTranspose2d))
    for name in ("stride", "padding", "groups", "dilation"):
        arguments[name] = getattr(convolution, name)
    arguments["memory_efficient"] = getattr(convolution, "memory_efficient", False)
    y = None if arguments["memory_efficient"] or norm is not None else _run_over_sigma(x, convolution, arguments)
    if y is not None:
        return y
    if isinstance(convolution, nn.Conv2d):
        arguments["padding_mode"] = convolution.padding_mode
        return ops.conv2d_norm_act(x, convolution.weight, convolution.bias, **arguments)
    arguments["output_padding"] = convolution.output_padding
    return ops.conv_transpose2d_norm_act(x, convolution.weight, convolution.bias, **arguments)


def _run_over_sigma(x: Tensor, convolution: nn.Conv2d | nn.ConvTranspose2d, arguments: dict[str, Any]) -> Tensor | None:
    """The run of a convolution under spectral norm that divides by sigma what its kernel computes; None if none
    does."""
    found = undivided(convolution)
    if found is None:
        return None
    norm, weight = found
    geometry = _geometry(convolution)
    slope, inplace = arguments.get("negative_slope", 0.01), arguments.get("inplace", False)
    tail = Tail("none", *(None,) * 4, False, 0.0, 0.0, None, None, arguments["activation"], slope, inplace)
    if not _over_sigma.serves(x, weight, geometry, tail):
        return None
    return _over_sigma.convolution(x, *norm.parts(weight), convolution.bias, geometry, tail)


def _geometry(convolution: nn.Conv2d | nn.ConvTranspose2d) -> Geometry:
    output_padding = convolution.output_padding if isinstance(convolution, nn.ConvTranspose2d) else ()
    return Geometry.of(
        convolution.stride, convolution.padding, output_padding, convolution.groups, convolution.dilation,
        convolution.padding_mode == "reflect",
    )  # fmt: skip


def _is_small(x: Tensor, convolution: Any) -> bool:
    """Whether a convolution on the CPU takes less time than a fused op's way there and back (benchmarks/NOTES.md).

    Not where another implementation is asked for, nor where memory is to be saved, nor in a graph that is compiled.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not runs_auto():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    processor = _processor.here()
    if not processor.torch_multiplies(dtype):
        return False
    if dtype == torch.bfloat16:
        # Not its weight: each access to that may be a power iteration.
        weight = Like(torch.Size((1, 1, *convolution.kernel_size)), dtype, x.device, False)
        if _rules.torch_is_wrong(processor, _geometry(convolution), x.shape, weight):
            return False
    n, _, height, width = x.shape
    pixels = n * height * width
    if kind(convolution) is nn.Conv2d:
        pixels //= convolution.stride[0] * convolution.stride[1]
    weights = convolution.in_channels * convolution.out_channels // convolution.groups
    products = pixels * weights * convolution.kernel_size[0] * convolution.kernel_size[1]
    return products < SMALL[torch.is_grad_enabled()] and not getattr(convolution, "memory_efficient", False)


def _counts(norm: Any) -> bool:
    """Whether a batch norm counts this batch."""
    return norm.training and norm.track_running_stats and norm.num_batches_tracked is not None


def _norm_arguments(norm: nn.Module | None) -> dict[str, Any]:
    """The norm's parameters, and what its forward does: cumulative averages, statistics that are not tracked."""
    if norm is None:
        return {"norm": "none"}
    if isinstance(norm, nn.GroupNorm):
        affine = {"norm_weight": norm.weight, "norm_bias": norm.bias}
        return {"norm": "group", "num_groups": norm.num_groups, "eps": norm.eps, **affine}
    assert isinstance(norm, (*_BATCH, *_INSTANCE))
    momentum = 0.0 if norm.momentum is None else norm.momentum
    tracks = norm.track_running_stats
    if isinstance(norm, _BATCH) and norm.momentum is None and _counts(norm):
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0)  # type: ignore[arg-type]  # a cumulative average
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
        "process_group": _synchronizes(norm),
    }


def _synchronizes(norm: nn.Module | None) -> Any:
    """The process group over whose ranks a SyncBatchNorm takes its statistics, if it does."""
    if norm is None or kind(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


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
