"""Engine: a trained model for inference alone, its weights prepared once, with no Python between its layers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from fastgen.errors import FastgenError, UsageError, naming
from fastgen.inference import _members
from fastgen.inference._call import Inputs, check_count, check_input, run
from fastgen.inference._compare import changes, compare
from fastgen.inference._graphs import Graphs, multiplying
from fastgen.inference._parts import FROM_MANY, MANY, TORCHSCRIPT, Part, Planner
from fastgen.inference._readers import UnsupportedError, first_line
from fastgen.inference._trace import clone
from fastgen.runtime import Plan

_log = logging.getLogger("fastgen")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


class Engine:
    """Runs a model as model.eval() computes it, without gradients.

    At creation the model is run on the example and what it computes is written down as a plan: norms with fixed
    statistics folded into the weights, padding, residual sums and activations inside the convolutions, the algorithm of
    each convolution chosen by a short measurement, one set of buffers. What no plan can compute runs through PyTorch:
    `parts` names each such module with the reason, and so does a warning to the logger "fastgen". The engine keeps its
    own copy of the weights.

    A plan keeps what the example showed: height, width and channels, which way each branch of the model's code went,
    what its hooks computed. The number of images is free: where the model's code asks for it, it is tried for some 35
    numbers up to 1025 and must call the same functions for each, or else runs through PyTorch. The output is compared
    with the module's for several inputs and numbers of images; `error` is the relative L2 difference, and one that
    rounding to the precision does not explain is refused, as is a module whose parameters, buffers or other attributes
    change from call to call, or that draws random numbers (fastgen/inference/_compare.py says the bounds). A state
    elsewhere, in globals or in other objects, is not seen.

    An engine has a precision of its own: the caller's autocast changes nothing, nor do grad mode, the default dtype and
    device or the number of threads, which is torch.get_num_threads() at creation. Where hooks of all modules are
    registered then, which a plan would not call, the model runs through PyTorch; those registered later see what runs
    through PyTorch alone. copy.deepcopy and pickle, also of modules that hold an engine, make it anew. A forked process
    may call it; for what runs through PyTorch it must call torch.set_num_threads(1) first, since PyTorch would wait for
    threads that are not there.

    On a GPU (model and example there) the model is fused, its weights laid out for the kernels, and each number of
    images is recorded as a CUDA graph at its first call, that of the example at creation. What cannot be recorded runs
    through PyTorch.

    Not while another thread runs a model: recording changes how PyTorch's functions are called. Afterwards several
    threads may call one engine.

    Args:
        model: any module that takes tensors and returns one, or several as a tuple or list.
        example_inputs: an input (N, C) or (N, C, H, W), or a tuple of inputs, where integers (N,) are labels for
            nn.Embedding or one_hot. Other N work later, other C, H, W do not.
        precision: "fp32"; "tf32" is the same on a CPU. "bf16": weights, and values between layers, are bfloat16, and
            sums float32; inputs and outputs stay float32. A processor that does not multiply bfloat16 runs it as
            "fp32". "fp16": the same with float16, on a GPU alone.
        impl: "auto"; "cpp": the whole model must lie in the plan; on a GPU "triton" or "cuda" for fastgen's ops;
            "reference": all through PyTorch.

    Raises TypeError and UsageError for arguments that cannot be meant, and FastgenError if impl="cpp" cannot run, with
    the reason, or if the plan's output is not the module's.
    """

    precision: str
    parts: tuple[Part, ...]
    error: float
    plan: Plan | None
    _graphs: Graphs | None
    _module: nn.Module | None

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Inputs,
        *,
        precision: str = "fp32",
        impl: str = "auto",
    ) -> None:
        example = _check(model, example_inputs, precision, impl)
        self._start(precision, example[0].device)
        # Tensors of inference mode could not change, as a module's state may, outside of it. The module's error may be
        # the larger one where PyTorch multiplies as the process's switches say.
        with torch.inference_mode(False), self._alone(), multiplying("fp32"):
            module = clone(model, share=False).eval()
            _members.unfuse(module)
            self._module = module
            given = tuple(x.clone() for x in example)
            if impl == "reference":
                self.parts = (Part("", "PyTorch", "impl='reference'"),)
            elif example[0].is_cuda:
                self._make_graphs(module, given, impl)
            else:
                self._make(module, given, impl)

    def _start(self, precision: str, device: torch.device) -> None:
        self.precision, self._device, self._process = precision, device, os.getpid()
        self.parts, self.error = (), 0.0
        self.plan = self._graphs = self._module = None

    def _make(self, module: nn.Module, example: Inputs, impl: str) -> None:
        n, planner = len(example[0]), None
        numbers = dict.fromkeys((2 * n, n, 1))
        reason = _why_not(module)
        if not reason and self._device.type != "cpu":
            reason = f"plans run on the CPU, not on {self._device}"
        if not reason:
            planner = Planner(module, example, self.precision == "bf16")
            try:
                plan = planner.whole()
                if plan.images_at_once >= FROM_MANY:  # small images: quickly done, and by other algorithms
                    numbers[MANY + 1] = None
                self.error = compare(partial(run, plan), module, example, self.precision, [*numbers])
                self.plan, self.parts, self._module = plan, (Part("", "plan"),), None
                return
            except (UnsupportedError, FastgenError) as error:
                reason = str(error)
        if impl == "cpp":
            raise FastgenError(f"impl='cpp' cannot run the whole model: {reason}")
        if planner is not None:
            planner.find_parts(reason)
        if planner is not None and planner.planned:
            try:
                planned = planner.put_in(clone(module, share=False))
                self.error = compare(planned, module, example, self.precision, [*numbers])
                self._module, self.parts = planner.put_in(module), tuple(planner.parts)
            except Exception as error:  # the model's own code meets modules that it does not expect
                reason += f"; nor in parts: {first_line(error)}"
        self.parts = self.parts or (Part("", "PyTorch", reason),)
        said = "; ".join(str(part) for part in self.parts if part.runs != "plan")
        _log.warning("Engine: not all of %s is in a plan: %s", type(module).__name__, said)

    def _make_graphs(self, module: nn.Module, example: Inputs, impl: str) -> None:
        self._input_shape, n = tuple(example[0].shape[1:]), len(example[0])
        try:
            if reason := _why_not(module):
                raise UnsupportedError(reason)
            if len(example) != 1 or not example[0].is_floating_point():
                raise UnsupportedError("a CUDA graph takes one input, of a floating point dtype")
            for name in changes(clone(module, share=False), example).values():
                raise UnsupportedError(f"{name} changes with every call, also in evaluation mode")
            self._graphs = Graphs(clone(module, share=False), self.precision, impl)
            self.error = compare(self._call_graphs, module, example, self.precision, (2 * n, n))
            self.parts, self._module = (Part("", "CUDA graph"),), None
        except Exception as error:  # synchronisation, a wrong result, too little memory, the model's own code
            if impl != "auto":
                raise FastgenError(f"impl={impl!r} cannot run the whole model: {error}") from error
            self._graphs, reason = None, first_line(error)
            self.parts = (Part("", "PyTorch", reason),)
            _log.warning("Engine: %s is not a CUDA graph: %s", type(module).__name__, reason)

    def __call__(self, *inputs: Tensor) -> Any:
        """The model's output for inputs (N, ...) as in the example: a new tensor, or a tuple where the model returns
        several. The inputs are float32 tensors, labels int64 or int32, on the CPU where the model is a plan, on the
        example's GPU where it is a CUDA graph. Raises TypeError and ValueError for other dtypes and shapes, IndexError
        for labels out of range."""
        if self.plan is not None:
            return run(self.plan, *inputs)
        if self._graphs is not None:
            return self._call_graphs(*inputs)
        if os.getpid() != self._process and self._device.type == "cpu" and torch.get_num_threads() > 1:
            raise FastgenError(
                "parts of this engine run through PyTorch, whose threads do not survive a fork: call "
                "torch.set_num_threads(1) in the forked process first"
            )
        with self._alone():
            return cast(nn.Module, self._module)(*inputs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _process=os.getpid())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Without gradients, and without the caller's autocast: an engine has a precision of its own."""
        kind = self._device.type
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield

    def _call_graphs(self, *inputs: Tensor) -> Any:
        check_count(inputs, 1)
        check_input("x", inputs[0], self._input_shape, self._device)
        return cast(Graphs, self._graphs)(inputs[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan: one file of numbers, no code, which Engine.load and fastgen.runtime.Plan.load read.

        Raises FastgenError where parts run through PyTorch, and on a GPU.
        """
        if self.plan is None:
            if self._graphs is not None:
                raise FastgenError(
                    "an engine on a GPU cannot be saved: make one of the model on the CPU, and save that"
                )
            parts = "; ".join(str(part) for part in self.parts if part.runs != "plan")
            raise FastgenError(f"the engine cannot be saved, since parts of it run through PyTorch: {parts}")
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

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Engine:
        """The engine that was saved. Raises OSError and fastgen.runtime.PlanError."""
        engine = cls.__new__(cls)
        plan = Plan.load(path, threads=torch.get_num_threads())
        engine._start(plan.precision, torch.device("cpu"))
        engine.plan, engine.parts = plan, (Part("", "plan"),)
        return engine

    def __repr__(self) -> str:
        return (
            f"Engine(precision={self.precision!r}, error={self.error:.1e}, parts=[{', '.join(map(str, self.parts))}])"
        )


def _check(model: object, example_inputs: object, precision: str, impl: str) -> Inputs:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"example_inputs must be a tensor or a tuple of tensors, got {[type(i).__name__ for i in inputs]}"
        )
    if any(nn.parameter.is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        raise UsageError("model has lazy modules that have not seen an input: call it once before")
    for x in inputs:
        if x.is_nested:
            raise TypeError("example_inputs must be tensors of one shape, got a nested one")
        if x.dim() < (2 if x.is_floating_point() and len(inputs) == 1 else 1) or x.shape[0] < 1:
            raise UsageError(f"example_inputs must be a batch of at least one, got shape {tuple(x.shape)}")
        if x.shape[0] != inputs[0].shape[0]:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise UsageError(f"example_inputs must be of one number of images, got shapes {shapes}")
    devices = {x.device for x in inputs}
    theirs = {t.device for t in (*model.parameters(), *model.buffers())} or devices
    if len(devices) > 1 or not devices <= theirs:
        found, place = (", ".join(sorted(map(str, places))) for places in (devices, theirs))
        raise UsageError(
            f"example_inputs must be where the model is, got {found} and a model on {place}: move one of them"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    on_gpu = inputs[0].is_cuda
    if precision == "fp16" and not on_gpu:
        raise UsageError("precision 'fp16' has no kernels on a CPU: use 'bf16' or 'fp32'")
    allowed = ("auto", "triton", "cuda", "reference") if on_gpu else ("auto", "cpp", "reference")
    if impl not in allowed:
        place = "a GPU" if on_gpu else "a CPU"
        raise UsageError(f"impl must on {place} be one of {', '.join(map(repr, allowed))}, got {impl!r}")
    return tuple(x.detach() for x in inputs)


def _why_not(module: nn.Module) -> str:
    """Why neither a plan nor a CUDA graph can stand for any part of the module."""
    if isinstance(module, torch.jit.ScriptModule):
        return TORCHSCRIPT
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "hooks of all modules are registered (register_module_forward_hook), and expect to be called"
    return ""
