"""Divides a model into plans: one for the whole model, or one for each of the largest parts that plans can compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.inference._analysis import is_sequential
from fastgen.inference._backends import Part
from fastgen.inference._call import PlannedModule, run_plan
from fastgen.inference._compare import changes, images_like, relative_error
from fastgen.inference._lower import lower
from fastgen.inference._readers import UnsupportedError, first_line
from fastgen.inference._record import tensors
from fastgen.inference._sandbox import Inputs, clone, copy_inputs
from fastgen.ops._processor import ALGORITHMS
from fastgen.runtime import Plan
from fastgen.runtime._file import encode
from fastgen.runtime._steps import Convolution, Precision, Step

TORCHSCRIPT = "it is a TorchScript module, whose calls cannot be seen"
_WORTH = nn.Conv2d | nn.ConvTranspose2d | nn.Linear  # without one of these, calling a plan costs more than it saves

_SPLIT = ALGORITHMS.index("amx_bf16x3")
_EXACT = 1e-5  # the largest error over a whole plan with which a fast algorithm counts as float32


class Planner:
    """Makes plans from a copy of a model; the model is not changed."""

    def __init__(self, model: nn.Module, example: Inputs, precision: Precision):
        self.model, self.example, self.precision = clone(model), example, precision
        self.changing = changes(self.model, example)
        self.parts: list[Part] = []
        self.replacements: list[tuple[str, nn.Module]] = []  # (name of a module, module that replaces it)
        self.seen: set[nn.Module] = set()
        self.inputs: dict[nn.Module, Inputs | None] = {}

    def plan_model(self) -> Plan:
        """The plan of the whole model. Raises UnsupportedError and FastgenError."""
        return self._make_plan(self.model, self.example)

    def plan_parts(self, reason: str) -> None:
        """Makes the plans for parts; `reason` says why there is no plan for the whole model."""
        self.inputs = _inputs_of_modules(self.model, self.example)
        self._descend(self.model, "", reason)

    def replace_parts(self, model: nn.Module) -> nn.Module:
        """The planner's copy of the model, with plans in place of the modules that they compute."""
        for name, module in self.replacements:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._modules[last] = module
        return model

    def _make_plan(self, module: nn.Module, inputs: Inputs) -> Plan:
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):
                raise UnsupportedError(TORCHSCRIPT)
            if part in self.changing:
                raise UnsupportedError(f"{self.changing[part]} changes with every call, also in evaluation mode")
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                raise UnsupportedError(f"plans take dense weights on the CPU, not {tensor.layout} on {tensor.device}")
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise UnsupportedError(f"plans compute float32, not {tensor.dtype}")
        try:
            steps = lower(module, *inputs)
        except UnsupportedError:
            raise
        except Exception as error:  # the model's own code may fail only while it is recorded
            raise UnsupportedError(f"it cannot be recorded: {type(error).__name__}: {first_line(error)}") from error
        if module is not self.model and not _is_worth_it(module):
            raise UnsupportedError("a plan for it alone would gain nothing")
        threads = torch.get_num_threads()
        plan = Plan(encode(steps, precision=self.precision), threads=threads)
        for n in plan.batches_to_tune:
            if _SPLIT in plan.tune(n) and _difference_from_direct(plan, steps, inputs, n) > _EXACT:
                plan.tune(n, split=False)
        return Plan(plan.to_bytes(), threads=threads)  # a new plan, without the memory that measuring took

    def _plan_run(self, modules: list[nn.Module]) -> Plan:
        """The plan of modules that are called in turn."""
        if isinstance(modules[0], torch.jit.ScriptModule):
            raise UnsupportedError(TORCHSCRIPT)
        inputs = self.inputs[modules[0]]
        if inputs is None:
            raise UnsupportedError("it is called with arguments other than tensors, or with several shapes")
        return self._make_plan(modules[0] if len(modules) == 1 else nn.Sequential(*modules), inputs)

    def _plan_runs(self, children: list[tuple[str, nn.Module]], prefix: str) -> None:
        """Makes a plan of each longest run of these (name, module), which are called in turn."""
        names, modules = [f"{prefix}{name}" for name, _ in children], [module for _, module in children]
        at = 0
        while at < len(modules):
            reason, end = "", len(modules)
            for end in range(len(modules), at, -1):
                try:
                    plan = self._plan_run(modules[at:end])
                except (UnsupportedError, FastgenError) as error:
                    reason = str(error)  # the last one is the reason for the single module
                else:
                    self.replacements.append((names[at], PlannedModule(plan)))
                    self.replacements += [(name, nn.Identity()) for name in names[at + 1 : end]]
                    self.parts.append(Part(names[at] + (f" to {names[end - 1]}" if end > at + 1 else ""), "plan"))
                    break
            else:
                self._descend(modules[at], names[at], reason)
            at = end

    def _descend(self, module: nn.Module, name: str, reason: str) -> None:
        """Lets PyTorch run the module itself, and plans run the parts of it that they support."""
        if module in self.seen:
            return
        self.seen.add(module)
        is_called, prefix = self._is_called(module), f"{name}." if name else ""
        has_parts = _is_worth_it(module) and not isinstance(module, torch.jit.ScriptModule)
        if has_parts and is_called and is_sequential(module):
            return self._plan_runs(list(module._modules.items()), prefix)  # type: ignore[arg-type]
        if is_called:
            self.parts.append(Part(name, "PyTorch", reason))
        for child_name, child in module._modules.items() if has_parts else ():
            if child is None:
                continue
            if self._is_called(child):
                self._plan_runs([(child_name, child)], prefix)
            else:  # modules in it may be called
                self._descend(child, f"{prefix}{child_name}", "")

    def _is_called(self, module: nn.Module) -> bool:
        # A ScriptModule does not accept hooks that would see its calls.
        return module in self.inputs or isinstance(module, torch.jit.ScriptModule)


def _is_worth_it(module: nn.Module) -> bool:
    return any(isinstance(part, _WORTH) for part in module.modules())


def _inputs_of_modules(model: nn.Module, example: Inputs) -> dict[nn.Module, Inputs | None]:
    """The inputs of each module that is called; None if some are not tensors or their shapes differ between calls."""
    found: dict[nn.Module, Inputs | None] = {}

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        are_tensors = bool(args) and not kwargs and all(isinstance(x, Tensor) for x in args)
        inputs = tuple(x.clone() for x in args) if are_tensors else None
        before = found.get(module, inputs)
        same = inputs is not None and before is not None and [x.shape for x in inputs] == [x.shape for x in before]
        found[module] = inputs if same else None

    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    hooks = [module.register_forward_pre_hook(see, prepend=True, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            model(*copy_inputs(example))
    finally:
        for hook in hooks:
            hook.remove()
    return cast(dict[nn.Module, Inputs | None], found)


def _difference_from_direct(plan: Plan, steps: Sequence[Step], inputs: Inputs, n: int) -> float:
    """The relative L2 difference from the same plan with direct convolutions, for n images."""
    direct = ALGORITHMS.index("direct")
    exact = [replace(step, algorithm=(direct, direct)) if isinstance(step, Convolution) else step for step in steps]
    batch = tuple(images_like(x, n) for x in inputs)
    found, expected = (tensors(run_plan(each, *batch)) for each in (plan, Plan(encode(exact), threads=plan.threads)))
    try:
        return relative_error([found], [expected])
    except UnsupportedError:  # values that are not finite
        return float("inf")
