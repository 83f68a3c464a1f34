"""Which runs of PyTorch's layers one op computes."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from fastgen.ops._activations import ACTIVATIONS as _ROWS
from fastgen.ops._geometry import HW

# Where the forward pre-hooks are defined that do nothing but compute a module's weight.
_WEIGHT_HOOKS = (
    "torch.nn.utils.spectral_norm", "torch.nn.utils.weight_norm", "torch.nn.utils.prune", "fastgen.nn.spectral_norm",
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# How many dimensions their batches have; for the other norms any number from 2.
DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,),
    nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,),
}  # fmt: skip
ACTIVATIONS = {row.module: name for name, row in _ROWS.items()}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm)
_NORMS_OF_IMAGES = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm)
_KINDS = dict.fromkeys([*_CONVOLUTIONS, *_NORMS, *ACTIVATIONS])


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
    activation = take(ACTIVATIONS)
    return convolution, norm, activation, at if at - start > 1 else start


def _pads_fusably(convolution: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether its padding is one that the ops have, the same on both sides."""
    return convolution.padding_mode in ("zeros", "reflect") and padding(convolution) is not None


def padding(convolution: nn.Conv2d | nn.ConvTranspose2d) -> HW | None:
    """Its padding in numbers; None for padding="same" where an even kernel's is not the same on both sides."""
    if not isinstance(convolution.padding, str):
        return convolution.padding  # type: ignore[return-value]
    if convolution.padding == "valid":
        return 0, 0
    height, width = (d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True))
    return None if height % 2 or width % 2 else (height // 2, width // 2)


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
