"""Finds the runs of PyTorch's layers that one op can compute."""

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
from fastgen.ops._geometry import HW, for_both_axes

# Modules whose forward pre-hooks do nothing but compute a module's weight.
_WEIGHT_HOOKS = (
    "torch.nn.utils.spectral_norm", "torch.nn.utils.weight_norm", "torch.nn.utils.prune", "fastgen.nn.spectral_norm",
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Number of dimensions of a batch; other norms accept any number from 2.
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
    """(convolution, norm, activation, end) of the run of modules from `start` that one op computes; end == start if
    there is none.

    A run is Conv2d or ConvTranspose2d -> [norm] -> [activation] with at least two members, or norm -> activation.
    Classes are compared exactly, since a subclass may compute something else. Modules with hooks are not fused, so that
    their hooks are called.
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
    """Whether the ops support the convolution's padding: zeros or reflection, the same on both sides."""
    return convolution.padding_mode in ("zeros", "reflect") and padding(convolution) is not None


def padding(convolution: nn.Conv2d | nn.ConvTranspose2d) -> HW | None:
    """The convolution's padding as (height, width); None if padding="same" differs between the sides, as it may for an
    even kernel."""
    if not isinstance(convolution.padding, str):
        return convolution.padding  # type: ignore[return-value]
    if convolution.padding == "valid":
        return 0, 0
    dilation = for_both_axes(convolution.dilation)
    height, width = (d * (k - 1) for d, k in zip(dilation, convolution.kernel_size, strict=True))
    return None if height % 2 or width % 2 else (height // 2, width // 2)


def kind(module: nn.Module) -> type[nn.Module]:
    """The module's original class: parametrizations and fastgen.fuse replace it by a subclass that computes the
    same."""
    cls = type(module)
    if cls in _KINDS:  # the usual case
        return cls
    base = cls.__bases__[0] if cls.__module__ == "torch.nn.utils.parametrize" else cls
    return getattr(base, "stands_for", base)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs only its class's forward and, before it, hooks that compute a convolution's
    weight: it has no other hooks, and no global hooks are registered."""
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
    """Whether the module is a convolution and all its forward pre-hooks are those of the old spectral_norm, of
    weight_norm or of pruning."""
    kinds = [type(hook).__module__ for hook in module._forward_pre_hooks.values()]
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and all(kind in _WEIGHT_HOOKS for kind in kinds)


def before_forward(module: nn.Module | None, x: Tensor) -> None:
    """Does what calling a plain module does before its forward: runs the hooks that compute its weight."""
    for hook in module._forward_pre_hooks.values() if module is not None else ():
        hook(module, (x,))


def steps(sequential: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The (name, module) pairs that a Sequential calls in turn; a plain Sequential among them is replaced by its own
    steps."""
    for name, module in sequential._modules.items():
        if isinstance(module, nn.Sequential) and kind(module).forward is nn.Sequential.forward and is_plain(module):
            yield from steps(module, f"{prefix}{name}.")
        elif module is not None:
            yield f"{prefix}{name}", module
