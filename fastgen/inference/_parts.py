"""What of a model becomes plans: all of it, or the largest parts that plans can compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.inference import _plan
from fastgen.inference._call import Inputs, Planned
from fastgen.inference._compare import changes, copies
from fastgen.inference._lower import lower
from fastgen.inference._readers import UnsupportedError, first_line
from fastgen.inference._trace import clone
from fastgen.runtime import Plan
from fastgen.runtime._file import encode
from fastgen.runtime._steps import Precision

_FEW, MANY = 1, 16  # images for which algorithms are measured
FROM_MANY = 8  # images from which on those for many are taken, kFew in csrc/plan/plan.cpp
TORCHSCRIPT = "it is a TorchScript module, whose calls cannot be seen"
_WORTH = nn.Conv2d | nn.ConvTranspose2d | nn.Linear  # without these a plan costs more, there and back, than it saves


@dataclass(frozen=True)
class Part:
    """A module of the model and what runs it: "plan", "CUDA graph", or "PyTorch" with the reason.

    Where a module runs by PyTorch whose submodules are parts of their own, it is the code of its forward that does.
    """

    name: str
    runs: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.runs}" + (f" ({self.reason})" if self.reason else "")


class Planner:
    """Makes plans of a model, which stays as it is: a copy runs."""

    def __init__(self, model: nn.Module, example: Inputs, bfloat16: bool):
        self.model, self.example, self.bfloat16 = clone(model, share=False), example, bfloat16
        self.changing = changes(self.model, example)
        self.parts: list[Part] = []
        self.planned: list[tuple[str, nn.Module]] = []  # what stands in the place of the module of this name
        self.seen: set[nn.Module] = set()
        self.inputs: dict[nn.Module, Inputs | None] = {}

    def whole(self) -> Plan:
        """The plan of the whole model. Raises UnsupportedError and FastgenError."""
        return self._make(self.model, self.example)

    def find_parts(self, reason: str) -> None:
        """Makes the plans of parts; `reason` says why there is none of the whole."""
        self.inputs = _inputs(self.model, self.example)
        self._leave(self.model, "", reason)

    def put_in(self, model: nn.Module) -> nn.Module:
        """The model, a copy of the one that was given, with the plans in the places of their modules."""
        for name, module in self.planned:
            above, _, last = name.rpartition(".")
            model.get_submodule(above)._modules[last] = module
        return model

    def _make(self, module: nn.Module, inputs: Inputs) -> Plan:
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):
                raise UnsupportedError(TORCHSCRIPT)
            if part in self.changing:
                raise UnsupportedError(f"{self.changing[part]} changes with every call, also in evaluation mode")
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                raise UnsupportedError(f"plans take weights on the CPU, dense, not {tensor.layout} on {tensor.device}")
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise UnsupportedError(f"plans compute float32, not {tensor.dtype}")
        try:
            steps = lower(module, *inputs)
        except UnsupportedError:
            raise
        except Exception as error:  # the model's own code, which ran, meets what records it
            raise UnsupportedError(f"it cannot be recorded: {type(error).__name__}: {first_line(error)}") from error
        if module is not self.model and not _is_worth_it(module):
            raise UnsupportedError("a plan of it alone would gain nothing")
        threads = torch.get_num_threads()
        precision = Precision.bfloat16 if self.bfloat16 else Precision.float32
        plan = Plan(encode(steps, precision=precision), threads=threads)
        plan.tune(_FEW)
        if plan.images_at_once >= FROM_MANY:
            plan.tune(MANY)
        return Plan(plan.to_bytes(), threads=threads)  # without the memory that measuring took

    def _make_part(self, modules: list[nn.Module]) -> Plan:
        """That of modules which follow each other."""
        if isinstance(modules[0], torch.jit.ScriptModule):
            raise UnsupportedError(TORCHSCRIPT)
        given = self.inputs[modules[0]]
        if given is None:
            raise UnsupportedError("it is called with other things than tensors, or with several shapes")
        return self._make(modules[0] if len(modules) == 1 else nn.Sequential(*modules), given)

    def _leave(self, module: nn.Module, name: str, reason: str) -> None:
        """PyTorch runs the module itself, plans what they can of those in it."""
        if module in self.seen:
            return
        self.seen.add(module)
        is_called, prefix = self._is_called(module), f"{name}." if name else ""
        has_parts = _is_worth_it(module) and not isinstance(module, torch.jit.ScriptModule)
        if has_parts and is_called and _plan.is_sequential(module):
            return self._find_runs(list(module._modules.items()), prefix)
        if is_called:
            self.parts.append(Part(name, "PyTorch", reason))
        for child_name, child in module._modules.items() if has_parts else ():
            if child is None:
                continue
            if self._is_called(child):
                self._find_runs([(child_name, child)], prefix)
            else:  # what is in it may be called
                self._leave(child, f"{prefix}{child_name}", "")

    def _is_called(self, module: nn.Module) -> bool:
        # A ScriptModule takes no hooks that would see its calls.
        return module in self.inputs or isinstance(module, torch.jit.ScriptModule)

    def _find_runs(self, members: list, prefix: str) -> None:
        """The longest runs of the members, which follow each other, become a plan each."""
        names, modules = [f"{prefix}{name}" for name, _ in members], [module for _, module in members]
        at = 0
        while at < len(modules):
            reason, end = "", len(modules)
            for end in range(len(modules), at, -1):
                try:
                    plan = self._make_part(modules[at:end])
                except (UnsupportedError, FastgenError) as error:
                    reason = str(error)  # at last the one of the module alone
                else:
                    self.planned.append((names[at], Planned(plan)))
                    self.planned += [(name, nn.Identity()) for name in names[at + 1 : end]]
                    self.parts.append(Part(names[at] + (f" to {names[end - 1]}" if end > at + 1 else ""), "plan"))
                    break
            else:
                self._leave(modules[at], names[at], reason)
            at = end


def _is_worth_it(module: nn.Module) -> bool:
    return any(isinstance(part, _WORTH) for part in module.modules())


def _inputs(model: nn.Module, example: Inputs) -> dict[nn.Module, Inputs | None]:
    """The inputs of each module that is called; None: not always tensors alone, and of the same shapes."""
    found: dict[nn.Module, Inputs | None] = {}

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        fits = bool(args) and not kwargs and all(isinstance(x, Tensor) for x in args)
        given = tuple(x.clone() for x in args) if fits else None
        before = found.get(module, given)
        same = given is not None and before is not None and [x.shape for x in given] == [x.shape for x in before]
        found[module] = given if same else None

    parts = [part for part in model.modules() if not isinstance(part, torch.jit.ScriptModule)]
    hooks = [part.register_forward_pre_hook(see, prepend=True, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            model(*copies(example))
    finally:
        for hook in hooks:
            hook.remove()
    return cast(dict[nn.Module, Inputs | None], found)
