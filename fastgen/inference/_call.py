"""Calls a plan with tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.inference._sandbox import Inputs
from fastgen.runtime import Plan

_MODES = torch._C._TorchDispatchModeKey
_TRACING_MODES = (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL)  # of make_fx, torch.compile and torch.export


def run_plan(plan: Plan, *inputs: Tensor) -> Any:
    """The plan's output for tensors, as documented at Engine.__call__."""
    check_count(inputs, len(plan.inputs))
    arrays = []
    for i, (x, expected) in enumerate(zip(inputs, plan.inputs, strict=True)):
        name, are_labels = f"inputs[{i}]" if len(inputs) > 1 else "x", expected.classes is not None
        check_input(name, x, expected.shape, torch.device("cpu"), are_labels)
        if len(x) != len(inputs[0]):
            raise ValueError(f"{name} must have {len(inputs[0])} images as inputs[0] has, got shape {tuple(x.shape)}")
        arrays.append(_array(name, x, np.int64 if are_labels else np.float32))
    n = len(inputs[0])
    outputs = tuple(torch.empty((n, *shape), dtype=torch.float32, device="cpu") for shape in plan.output_shapes)
    plan.run(n, [array.ctypes.data for array in arrays], [y.data_ptr() for y in outputs])
    return outputs if len(outputs) > 1 else outputs[0]


def _array(name: str, x: Tensor, dtype: type) -> np.ndarray:
    # If a copy is needed, NumPy makes it without OpenMP threads, which would wait for ever in a forked process.
    try:
        return np.ascontiguousarray(x.numpy(force=True), dtype)
    except RuntimeError:  # of torch.func, or of a compiler or exporter
        raise TypeError(f"{name} must be a tensor with values: a plan cannot be transformed or traced") from None


def check_count(inputs: Inputs, count: int) -> None:
    if torch.jit.is_tracing() or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING_MODES):
        raise FastgenError(
            "an engine cannot be traced or exported, since it runs outside of PyTorch: trace or export its model"
        )
    if len(inputs) != count:
        raise TypeError(f"the model takes {count} input{'s' if count > 1 else ''}, got {len(inputs)}")


def check_input(name: str, x: object, shape: tuple[int, ...], device: torch.device, are_labels: bool = False) -> None:
    dtypes, expected = ((torch.int64, torch.int32), "an int64") if are_labels else ((torch.float32,), "a float32")
    if not isinstance(x, Tensor) or x.dtype not in dtypes or x.device != device or x.layout != torch.strided:
        found = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        found += f" of layout {x.layout}" if isinstance(x, Tensor) and x.layout != torch.strided else ""
        where = "the CPU" if device.type == "cpu" else str(device)
        raise TypeError(f"{name} must be {expected} tensor on {where}, got {found}")
    if x.dim() < 1 or tuple(x.shape[1:]) != shape:
        expected_shape = ", ".join(map(str, ("N", *shape))) + ("," if not shape else "")
        raise ValueError(f"{name} must be of shape ({expected_shape}), got {tuple(x.shape)}")


class PlannedModule(nn.Module):
    """Takes the place of a module that runs as a plan."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def forward(self, *inputs: Tensor) -> Any:
        return run_plan(self.plan, *inputs)

    __call__ = forward  # global hooks do not see it, as they do not see modules within a plan
