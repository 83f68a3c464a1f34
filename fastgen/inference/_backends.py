"""The backends of an Engine: a plan, CUDA graphs, or PyTorch with plans for parts of the model.

Each backend lists its parts, runs, and saves itself or says why it cannot.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError, naming
from fastgen.inference._call import PlannedModule, check_count, check_input, run_plan
from fastgen.inference._graphs import Graphs
from fastgen.runtime import Plan


@dataclass(frozen=True)
class Part:
    """A module of the model and how it runs: "plan", "CUDA graph", or "PyTorch" with the reason.

    If submodules of a module that PyTorch runs are listed as parts too, PyTorch only runs the code of its forward.
    """

    name: str
    runs: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.runs}" + (f" ({self.reason})" if self.reason else "")


class Backend(Protocol):
    parts: tuple[Part, ...]
    plans: tuple[Plan, ...]

    def run(self, *inputs: Tensor) -> Any: ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raises FastgenError if there is no file format for it."""


class PlanBackend:
    """The whole model is one plan."""

    parts: tuple[Part, ...] = (Part("", "plan"),)

    def __init__(self, plan: Plan):
        self.plan = plan
        self.plans: tuple[Plan, ...] = (plan,)

    def run(self, *inputs: Tensor) -> Any:
        return run_plan(self.plan, *inputs)

    def save(self, path: str | os.PathLike[str]) -> None:
        partial = f"{os.fspath(path)}.partial"
        with naming(path):
            try:
                with open(partial, "wb") as file:
                    file.write(self.plan.to_bytes())
                os.replace(partial, path)
            except BaseException:
                if os.path.exists(partial):
                    os.unlink(partial)
                raise


class GraphBackend:
    """The whole model is recorded as CUDA graphs, for one input of this shape."""

    parts: tuple[Part, ...] = (Part("", "CUDA graph"),)
    plans: tuple[Plan, ...] = ()

    def __init__(self, graphs: Graphs, example: Tensor):
        self._graphs, self._input_shape, self._device = graphs, tuple(example.shape[1:]), example.device

    def run(self, *inputs: Tensor) -> Any:
        check_count(inputs, 1)
        check_input("x", inputs[0], self._input_shape, self._device)
        return self._graphs(inputs[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        raise FastgenError("an engine on a GPU cannot be saved: make one of the model on the CPU, and save that")


class TorchBackend:
    """PyTorch runs the model, in which plans may have replaced modules."""

    def __init__(self, module: nn.Module, parts: tuple[Part, ...], device: torch.device):
        self.parts, self._module, self._device, self._process = parts, module, device, os.getpid()
        self.plans = tuple(part.plan for part in module.modules() if isinstance(part, PlannedModule))

    def run(self, *inputs: Tensor) -> Any:
        if os.getpid() != self._process and self._device.type == "cpu" and torch.get_num_threads() > 1:
            raise FastgenError(
                "parts of this engine run through PyTorch, whose threads do not survive a fork: call "
                "torch.set_num_threads(1) in the forked process first"
            )
        with isolated(self._device):
            return self._module(*inputs)

    def save(self, path: str | os.PathLike[str]) -> None:
        parts = "; ".join(str(part) for part in self.parts if part.runs != "plan")
        raise FastgenError(f"the engine cannot be saved, since parts of it run through PyTorch: {parts}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _process=os.getpid())


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """A context without gradients and without the caller's autocast: an engine has its own precision."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
