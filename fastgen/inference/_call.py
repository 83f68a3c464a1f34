"""A plan called with tensors."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.runtime import Plan

Inputs: TypeAlias = tuple[Tensor, ...]
_MODES = torch._C._TorchDispatchModeKey
_TRACERS = (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL)  # of make_fx, torch.compile and torch.export


def run(plan: Plan, *inputs: Tensor) -> Any:
    """The plan's output for tensors, as Engine.__call__ says it."""
    check_count(inputs, len(plan.inputs))
    given = []
    for i, (x, wanted) in enumerate(zip(inputs, plan.inputs, strict=True)):
        name, labels = f"inputs[{i}]" if len(inputs) > 1 else "x", wanted.classes is not None
        check_input(name, x, wanted.shape, torch.device("cpu"), labels)
        if len(x) != len(inputs[0]):
            raise ValueError(f"{name} must be of {len(inputs[0])} images as inputs[0] is, got shape {tuple(x.shape)}")
        given.append(_array(name, x, np.int64 if labels else np.float32))
    n = len(inputs[0])
    out = tuple(torch.empty((n, *shape), dtype=torch.float32, device="cpu") for shape in plan.output_shapes)
    plan.run(n, [array.ctypes.data for array in given], [y.data_ptr() for y in out])
    return out if len(out) > 1 else out[0]


def _array(name: str, x: Tensor, dtype: type) -> np.ndarray:
    # NumPy's copy, where one is needed, starts no threads of OpenMP, which would wait for ever in a forked process.
    try:
        return np.ascontiguousarray(x.numpy(force=True), dtype)
    except RuntimeError:  # of torch.func, or of a compiler or exporter
        raise TypeError(f"{name} must be a tensor with values: a plan can neither be transformed nor traced") from None


def check_count(inputs: Inputs, count: int) -> None:
    if torch.jit.is_tracing() or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS):
        raise FastgenError("an engine cannot be traced or exported, since it runs outside of PyTorch: take its model")
    if len(inputs) != count:
        raise TypeError(f"the model takes {count} input{'s' if count > 1 else ''}, got {len(inputs)}")


def check_input(name: str, x: object, shape: tuple[int, ...], device: torch.device, labels: bool = False) -> None:
    dtypes, kind = ((torch.int64, torch.int32), "an int64") if labels else ((torch.float32,), "a float32")
    if not isinstance(x, Tensor) or x.dtype not in dtypes or x.device != device or x.layout != torch.strided:
        found = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        found += f" of layout {x.layout}" if isinstance(x, Tensor) and x.layout != torch.strided else ""
        place = "the CPU" if device.type == "cpu" else str(device)
        raise TypeError(f"{name} must be {kind} tensor on {place}, got {found}")
    if x.dim() < 1 or tuple(x.shape[1:]) != shape:
        expected = ", ".join(map(str, ("N", *shape))) + ("," if not shape else "")
        raise ValueError(f"{name} must be of shape ({expected}), got {tuple(x.shape)}")


class Planned(nn.Module):
    """Stands in a model where a module was that runs as a plan."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def forward(self, *inputs: Tensor) -> Any:
        return run(self.plan, *inputs)

    __call__ = forward  # hooks of all modules have none of the planned ones to see
