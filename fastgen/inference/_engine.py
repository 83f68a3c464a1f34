"""Engine: a trained model for inference only, its weights prepared once, with no Python between its layers."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from fastgen.errors import FastgenError, UsageError
from fastgen.inference._backends import Backend, GraphBackend, Part, PlanBackend, TorchBackend, isolated
from fastgen.inference._call import run_plan
from fastgen.inference._classes import unfuse
from fastgen.inference._compare import changes, compare
from fastgen.inference._graphs import Graphs, Recorder, multiplying, record
from fastgen.inference._planner import TORCHSCRIPT, Planner
from fastgen.inference._readers import UnsupportedError, first_line
from fastgen.inference._sandbox import Inputs, clone
from fastgen.runtime import Plan
from fastgen.runtime._steps import Precision

_log = logging.getLogger("fastgen")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


class Engine:
    """Runs a model in inference: what model.eval() computes, without gradients.

    At creation the model runs on the example, and what it computes is recorded as a plan: norms with fixed statistics
    are folded into the weights; padding, residual sums and activations are part of the convolutions; the algorithm of
    each convolution is chosen by a short measurement; all layers share one set of buffers. Modules that no plan can
    compute run through PyTorch: `parts` names each of them with the reason, and so does a warning to the logger
    "fastgen". The engine has its own copy of the weights.

    The example fixes a plan's height, width and channels, the side that each branch of the model's code takes, and what
    its hooks compute. The batch size may vary: if the model's code reads it, some 35 batch sizes up to 1025 are tried,
    and the model must call the same functions for each, or it runs through PyTorch. The output is compared with the
    module's for several inputs and batch sizes. `error` is the relative L2 difference (NaN if it was not measured). A
    difference that rounding to the precision does not explain is refused, and so is a module whose parameters, buffers
    or other attributes change from call to call, or that draws random numbers (fastgen/inference/_compare.py has the
    bounds). State elsewhere, in globals or in other objects, is not detected.

    The caller's settings do not change an engine: autocast, grad mode, the default dtype and device, and the number of
    threads, which is torch.get_num_threads() at creation. If global hooks, which a plan would not call, are registered
    at creation, the model runs through PyTorch; global hooks that are registered later see only modules that run
    through PyTorch. An engine, or a module that contains one, can be copied with copy.deepcopy and pickled. A forked
    process may call it; if parts run through PyTorch, it must call torch.set_num_threads(1) first, since PyTorch would
    wait for threads that do not exist there.

    If model and example are on a GPU, the model is fused, its weights are laid out for the kernels, and each batch size
    is recorded as a CUDA graph at its first call (the example's at creation). A model that cannot be recorded runs
    through PyTorch.

    Do not create an engine while another thread runs a model: recording changes how PyTorch's functions are called.
    Afterwards several threads may call one engine.

    Args:
        model: any module that takes tensors and returns one, or several as a tuple or list.
        example_inputs: an input (N, C) or (N, C, H, W), or a tuple of inputs, where integers (N,) are labels for
            nn.Embedding or one_hot. Later calls may have another N, but not another C, H or W.
        precision: "fp32"; "tf32" is the same on a CPU. "bf16": weights and values between layers are bfloat16, sums are
            float32, and inputs and outputs stay float32. On a processor that cannot multiply bfloat16 it runs as
            "fp32"; `parts` and a warning say so. "fp16": like "bf16" with float16, only on a GPU.
        impl: "auto"; "cpp": the whole model must be one plan; on a GPU "triton" or "cuda" for fastgen's ops;
            "reference": PyTorch runs all of it.

    Raises TypeError and UsageError for invalid arguments, and FastgenError with the reason if impl="cpp" cannot run, or
    if the plan's output differs from the module's.
    """

    precision: str
    error: float
    _backend: Backend

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Inputs,
        *,
        precision: str = "fp32",
        impl: str = "auto",
    ) -> None:
        example = _check(model, example_inputs, precision, impl)
        device = example[0].device
        # A module's state may change in a call, which is impossible for tensors made in inference mode. The module that
        # the backend is compared with runs in float32: with the process's TF32 switches its error might be the larger.
        with torch.inference_mode(False), isolated(device), multiplying("fp32"):
            module = clone(model).eval()
            unfuse(module)
            example = tuple(x.clone() for x in example)
            backend: Backend
            if impl == "reference":
                backend, error = TorchBackend(module, (Part("", "PyTorch", "impl='reference'"),), device), 0.0
            elif example[0].is_cuda:
                backend, error = graph_backend(module, example, precision, impl)
            else:
                backend, error = plan_backend(module, example, precision, impl)
        self._set(backend, precision, error)

    def _set(self, backend: Backend, precision: str, error: float) -> None:
        """Sets all attributes of an engine."""
        self._backend, self.precision, self.error = backend, precision, error
        if note := self._precision_note():
            _log.warning("Engine: precision %r runs %s", precision, note)

    def _precision_note(self) -> str:
        """How the plans run on this processor, if not in `precision`; otherwise empty."""
        if all(plan.runs_as == plan.precision for plan in self._backend.plans):
            return ""
        return "as fp32: this processor does not multiply bfloat16"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The modules, and how each runs."""
        note = self._precision_note()
        return tuple(
            replace(part, reason=note) if note and part.runs == "plan" else part for part in self._backend.parts
        )

    @property
    def plan(self) -> Plan | None:
        """The plan, if it is the whole model."""
        return self._backend.plan if isinstance(self._backend, PlanBackend) else None

    def __call__(self, *inputs: Tensor) -> Any:
        """The model's output for inputs (N, ...) as in the example: a new tensor, or a tuple if the model returns
        several. Inputs are float32 and labels int64 or int32; they are on the CPU for a plan, and on the example's GPU
        for a CUDA graph. Raises TypeError and ValueError for other dtypes and shapes, IndexError for labels out of
        range."""
        return self._backend.run(*inputs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan and `error`: one file of numbers, no code, which Engine.load and fastgen.runtime.Plan.load
        read.

        Raises FastgenError if parts run through PyTorch, and on a GPU.
        """
        self._backend.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Engine:
        """Loads a saved engine, with its `error`. Raises OSError and fastgen.runtime.PlanError."""
        plan = Plan.load(path, threads=torch.get_num_threads())
        engine = cls.__new__(cls)  # there is no model to prepare
        engine._set(PlanBackend(plan), plan.precision, plan.error)
        return engine

    def __repr__(self) -> str:
        error = "not measured" if math.isnan(self.error) else f"{self.error:.1e}"
        return f"Engine(precision={self.precision!r}, error={error}, parts=[{', '.join(map(str, self.parts))}])"


def plan_backend(module: nn.Module, example: Inputs, precision: str, impl: str) -> tuple[Backend, float]:
    """(backend, error) for a module on a CPU, which uses plans where possible."""
    n, device = len(example[0]), example[0].device
    planner: Planner | None = None
    parts: tuple[Part, ...] = ()
    batch_sizes = dict.fromkeys((2 * n, n, 1))
    reason = _why_unseen(module)
    if not reason and device.type != "cpu":
        reason = f"plans run on the CPU, not on {device}"
    if not reason:
        planner = Planner(module, example, Precision.bfloat16 if precision == "bf16" else Precision.float32)
        try:
            plan = planner.plan_model()
            # Other batch sizes run other algorithms. Their images are small, so that comparing many is quick.
            for tuned_for in plan.batches_to_tune[1:]:
                batch_sizes[tuned_for + 1] = None
            error = compare(partial(run_plan, plan), module, example, precision, [*batch_sizes])
            plan.error = error
            return PlanBackend(plan), error
        except (UnsupportedError, FastgenError) as unsupported:
            reason = str(unsupported)
    if impl == "cpp":
        raise FastgenError(f"impl='cpp' cannot run the whole model: {reason}")
    error = 0.0
    if planner is not None:
        planner.plan_parts(reason)
        if planner.replacements:
            try:
                planned = planner.replace_parts(clone(module))
                error = compare(planned, module, example, precision, [*batch_sizes])
                module, parts = planner.replace_parts(module), tuple(planner.parts)
            except Exception as failure:  # the model's own code may not expect the modules that replace its own
                reason += f"; nor in parts: {first_line(failure)}"
    backend = TorchBackend(module, parts or (Part("", "PyTorch", reason),), device)
    by_pytorch = "; ".join(str(part) for part in backend.parts if part.runs != "plan")
    _log.warning("Engine: not all of %s is in a plan: %s", type(module).__name__, by_pytorch)
    return backend, error


def graph_backend(
    module: nn.Module, example: Inputs, precision: str, impl: str, record: Recorder = record
) -> tuple[Backend, float]:
    """(backend, error) for a module on a GPU, which uses CUDA graphs if possible."""
    n, device = len(example[0]), example[0].device
    try:
        if reason := _why_unseen(module):
            raise UnsupportedError(reason)
        if len(example) != 1 or not example[0].is_floating_point():
            raise UnsupportedError("a CUDA graph takes one input of a floating point dtype")
        for name in changes(clone(module), example).values():
            raise UnsupportedError(f"{name} changes with every call, also in evaluation mode")
        backend = GraphBackend(Graphs(clone(module), precision, impl, record), example[0])
        return backend, compare(backend.run, module, example, precision, (2 * n, n))
    except Exception as error:  # synchronization, a wrong result, too little memory, the model's own code
        if impl != "auto":
            raise FastgenError(f"impl={impl!r} cannot run the whole model: {error}") from error
        reason = first_line(error)
    _log.warning("Engine: %s is not a CUDA graph: %s", type(module).__name__, reason)
    return TorchBackend(module, (Part("", "PyTorch", reason),), device), 0.0


def _check(model: object, example_inputs: object, precision: str, impl: str) -> Inputs:
    """The example's inputs. Raises TypeError and UsageError for invalid arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"example_inputs must be a tensor or a tuple of tensors, got {[type(i).__name__ for i in inputs]}"
        )
    if any(nn.parameter.is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        raise UsageError("model has uninitialized lazy modules: call it once first")
    for x in inputs:
        if x.is_nested:
            raise TypeError("example_inputs must be dense tensors, got a nested tensor")
        if x.dim() < (2 if x.is_floating_point() and len(inputs) == 1 else 1) or x.shape[0] < 1:
            raise UsageError(f"example_inputs must be batches of at least one image, got shape {tuple(x.shape)}")
        if x.shape[0] != inputs[0].shape[0]:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise UsageError(f"example_inputs must all have the same batch size, got shapes {shapes}")
    devices = {x.device for x in inputs}
    model_devices = {t.device for t in (*model.parameters(), *model.buffers())} or devices
    if len(devices) > 1 or not devices <= model_devices:
        found, expected = (", ".join(sorted(map(str, each))) for each in (devices, model_devices))
        raise UsageError(
            f"example_inputs must be on the model's device, got {found} and a model on {expected}: move one of them"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    on_gpu = inputs[0].is_cuda
    if precision == "fp16" and not on_gpu:
        raise UsageError("precision 'fp16' has no kernels on a CPU: use 'bf16' or 'fp32'")
    allowed = ("auto", "triton", "cuda", "reference") if on_gpu else ("auto", "cpp", "reference")
    if impl not in allowed:
        device = "a GPU" if on_gpu else "a CPU"
        raise UsageError(f"impl must be one of {', '.join(map(repr, allowed))} on {device}, got {impl!r}")
    return tuple(x.detach() for x in inputs)


def _why_unseen(module: nn.Module) -> str:
    """Why neither a plan nor a CUDA graph can replace any part of the module; None if one may."""
    if isinstance(module, torch.jit.ScriptModule):
        return TORCHSCRIPT
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "global hooks are registered (register_module_forward_hook), which a plan or graph would not call"
    return ""
