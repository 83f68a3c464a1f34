"""Engine: a trained model for inference alone, its weights prepared once, with no Python between its layers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError, UsageError, naming
from fastgen.inference import _members, _plan
from fastgen.inference._graphs import Graphs, multiplying
from fastgen.inference._lower import lower
from fastgen.inference._readers import UnsupportedError
from fastgen.inference._record import tensors
from fastgen.inference._trace import clone
from fastgen.nn import _modules
from fastgen.runtime import Plan
from fastgen.runtime._file import encode

_log = logging.getLogger("fastgen")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_MOST_ERROR = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 0.05, "bf16": 0.2}  # beyond it something else is wrong than rounding
Inputs: TypeAlias = tuple[Tensor, ...]
_FEW, _MANY = 1, 16  # images for which algorithms are measured


@dataclass(frozen=True)
class Part:
    """A module of the model and what runs it: "plan", "CUDA graph", or "PyTorch" with the reason."""

    name: str
    runs: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.runs}" + (f" ({self.reason})" if self.reason else "")


class Engine:
    """Runs a model as model.eval() computes it, without gradients.

    At creation the model is run on the example and what it computes is written down as a plan: norms with fixed statistics
    folded into the weights, padding, residual sums and activations inside the convolutions, the algorithm of each convolution
    chosen by a short measurement, one set of buffers. What the plan cannot compute runs through PyTorch, and `parts` and a
    warning to the logger "fastgen" say so. The output is compared with the module's, for the example and for another number of
    images; `error` is the largest difference relative to the largest entry. The engine keeps its own copy of the weights.

    On a GPU (model and example there) the model is fused, its weights laid out for the kernels, and each number of images is
    recorded as a CUDA graph at its first call, that of the example at creation. What cannot be recorded runs through PyTorch.

    Not while another thread runs a model: recording changes how PyTorch's functions are called. Afterwards several threads
    may call one engine.

    Args:
        model: any module that takes tensors and returns one, or several as a tuple or list.
        example_inputs: an input (N, C) or (N, C, H, W), or a tuple of inputs, where integers (N,) are labels for nn.Embedding
            or one_hot. Other N work later, other C, H, W do not.
        precision: "fp32"; "tf32" is the same on a CPU. "bf16": weights, and values between layers, are bfloat16, and sums
            float32; inputs and outputs stay float32. A processor that does not multiply bfloat16 runs it as "fp32".
            "fp16": the same with float16, on a GPU alone.
        impl: "auto"; "cpp": the whole model must lie in the plan; on a GPU "triton" or "cuda" for fastgen's ops; "reference":
            all through PyTorch.

    Raises TypeError and UsageError for arguments that cannot be meant, and FastgenError if impl="cpp" cannot run, with the
    reason, or if the plan's output is not the module's.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Inputs,
        *,
        precision: str = "fp32",
        impl: str = "auto",
    ) -> None:
        example = _check(model, example_inputs, precision, impl)
        self.precision = precision
        self.parts: tuple[Part, ...] = ()
        self.error = 0.0
        self.plan: Plan | None = None
        self._graphs: Graphs | None = None
        self._example = example
        self._module: nn.Module | None = clone(model, share=False).eval()
        _members.unfuse(self._module)
        if impl != "reference" and example[0].is_cuda:
            self._make_graphs(impl)
        elif impl != "reference":
            self._make(impl)
        else:
            self.parts = (Part("", "PyTorch", "impl='reference'"),)
        del self._example

    def _make(self, impl: str) -> None:
        example, module = self._example, self._module
        assert module is not None
        reason = _why_not(example, module)
        takes_one = len(example) == 1
        if not reason:
            try:
                self.plan, self._data = _make_plan(module, example, self.precision == "bf16")
                self.error = _compare(self._call_plan, module, example, self.precision)
                self.parts, self._module = (Part("", "plan"),), None
                return
            except (UnsupportedError, FastgenError) as error:
                reason, self.plan = str(error), None
        if impl == "cpp":
            raise FastgenError(f"impl='cpp' cannot run the whole model: {reason}")
        if takes_one and not _why_not(example, module):
            parts: list[Part] = []
            planned = clone(module, share=False)
            _plan_within(planned, "", _inputs(planned, example[0]), parts, self.precision == "bf16")
            if any(part.runs == "plan" for part in parts):
                try:
                    self.error = _compare(planned, module, example, self.precision)
                    self._module, self.parts = planned, tuple(parts)
                except Exception as error:  # the model's own code meets modules that it does not expect
                    reason += f"; nor in parts: {error}"
        self.parts = self.parts or (Part("", "PyTorch", reason),)
        said = "; ".join(str(part) for part in self.parts if part.runs != "plan") or reason
        _log.warning("Engine: not all of %s is in a plan: %s", type(module).__name__, said)

    def _make_graphs(self, impl: str) -> None:
        example, module = self._example, self._module
        assert module is not None
        self._input_shape, self._device = tuple(example[0].shape[1:]), example[0].device
        try:
            if len(example) != 1 or not example[0].is_floating_point():
                raise UnsupportedError("a CUDA graph takes one input, of a floating point dtype")
            self._graphs = Graphs(clone(module, share=False), self.precision, impl)
            with multiplying("fp32"):  # the module: by PyTorch's own switches its error may be the larger one
                self.error = _compare(self._call_graphs, module, example, self.precision)
            self.parts, self._module = (Part("", "CUDA graph"),), None
        except Exception as error:  # synchronisation, a wrong result, too little memory, the model's own code
            if impl != "auto":
                raise FastgenError(f"impl={impl!r} cannot run the whole model: {error}") from error
            self._graphs, reason = None, (str(error) or type(error).__name__).splitlines()[0]
            self.parts = (Part("", "PyTorch", reason),)
            _log.warning("Engine: %s is not a CUDA graph: %s", type(module).__name__, reason)

    def __call__(self, *inputs: Tensor) -> Any:
        """The model's output for inputs (N, ...) as in the example: a new tensor, or a tuple where the model returns several.
        The inputs are float32 tensors, labels int64 or int32, on the CPU where the model is a plan, on the example's GPU where
        it is a CUDA graph. Raises TypeError and ValueError for other dtypes and shapes, IndexError for labels out of range."""
        if self.plan is not None:
            return self._call_plan(*inputs)
        if self._graphs is not None:
            return self._call_graphs(*inputs)
        assert self._module is not None
        with torch.no_grad():
            return self._module(*inputs)

    def _call_plan(self, *inputs: Tensor) -> Any:
        return _run(cast(Plan, self.plan), *inputs)

    def _call_graphs(self, *inputs: Tensor) -> Any:
        _check_count(inputs, 1)
        _check_input("x", inputs[0], self._input_shape, self._device)
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
                    file.write(self._data)
                os.replace(partial, path)
            except BaseException:
                if os.path.exists(partial):
                    os.unlink(partial)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Engine:
        """The engine that was saved. Raises OSError and fastgen.runtime.PlanError."""
        engine = cls.__new__(cls)
        engine.plan = Plan.load(path, threads=torch.get_num_threads())
        with open(path, "rb") as file:
            engine._data = file.read()
        engine.precision, engine.error = engine.plan.precision, 0.0
        engine.parts, engine._module, engine._graphs = (Part("", "plan"),), None, None
        return engine

    def __repr__(self) -> str:
        return (
            f"Engine(precision={self.precision!r}, error={self.error:.1e}, parts=[{', '.join(map(str, self.parts))}])"
        )


class _Planned(nn.Module):
    """Stands in the model where a module was that runs as a plan."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def forward(self, x: Tensor) -> Any:
        return _run(self.plan, x)


def _check_count(inputs: Inputs, count: int) -> None:
    if len(inputs) != count:
        raise TypeError(f"the model takes {count} input{'s' if count > 1 else ''}, got {len(inputs)}")


def _check_input(name: str, x: object, shape: tuple[int, ...], device: torch.device, labels: bool = False) -> None:
    dtypes, kind = ((torch.int64, torch.int32), "an int64") if labels else ((torch.float32,), "a float32")
    if not isinstance(x, Tensor) or x.dtype not in dtypes or x.device != device:
        found = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        place = "the CPU" if device.type == "cpu" else str(device)
        raise TypeError(f"{name} must be {kind} tensor on {place}, got {found}")
    if x.dim() < 1 or tuple(x.shape[1:]) != shape:
        expected = ", ".join(map(str, ("N", *shape))) + ("," if not shape else "")
        raise ValueError(f"{name} must be of shape ({expected}), got {tuple(x.shape)}")


def _run(plan: Plan, *inputs: Tensor) -> Any:
    _check_count(inputs, len(plan.inputs))
    given = []
    for i, (x, wanted) in enumerate(zip(inputs, plan.inputs, strict=True)):
        name, labels = f"inputs[{i}]" if len(inputs) > 1 else "x", wanted.classes is not None
        _check_input(name, x, wanted.shape, torch.device("cpu"), labels)
        if len(x) != len(inputs[0]):
            raise ValueError(f"{name} must be of {len(inputs[0])} images as inputs[0] is, got shape {tuple(x.shape)}")
        given.append((x.long() if labels else x).contiguous())
    n = len(inputs[0])
    out = tuple(torch.empty((n, *shape)) for shape in plan.output_shapes)
    plan.run(n, [x.data_ptr() for x in given], [y.data_ptr() for y in out])
    return out if len(out) > 1 else out[0]


def _check(model: object, example_inputs: object, precision: str, impl: str) -> Inputs:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"example_inputs must be a tensor or a tuple of tensors, got {[type(i).__name__ for i in inputs]}"
        )
    for x in inputs:
        if x.dim() < (2 if x.is_floating_point() else 1) or x.shape[0] < 1:
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


def _why_not(example: Inputs, module: nn.Module) -> str:
    for i, x in enumerate(example):
        if not x.is_floating_point() and (x.dim() != 1 or x.dtype not in (torch.int64, torch.int32)):
            return f"input {i} is {x.dtype} {tuple(x.shape)}, where plans take labels as int64 (N,)"
    for tensor in (*example, *module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu":
            return f"plans run on the CPU, not on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"plans compute float32, not {tensor.dtype}"
    return ""


def _make_plan(module: nn.Module, inputs: Inputs, bfloat16: bool) -> tuple[Plan, bytes]:
    """The plan of module(*inputs), and the file of it."""
    steps, input_shape, output_shape = lower(module, *inputs)
    threads = torch.get_num_threads()
    plan = Plan(encode(steps, input_shape, output_shape, bfloat16=bfloat16), threads=threads)
    few = plan.tune(_FEW)
    many = plan.tune(_MANY) if plan.images_at_once >= 8 else few  # kFew in csrc/plan/plan.cpp
    for step, *algorithm in zip(steps, few, many, strict=True):
        step.algorithm = algorithm
    data = encode(steps, input_shape, output_shape, bfloat16=bfloat16)
    return Plan(data, threads=threads), data


def _compare(call: Callable[..., Any], module: nn.Module, example: Inputs, precision: str) -> float:
    """The largest difference of call(*inputs) from module(*inputs), relative to the largest entry of the output; for the
    example and a larger batch."""
    with torch.no_grad():
        return max(
            _differ(tensors(call(*x)), tensors(module(*x)), precision) for x in (example, tuple(map(_twice, example)))
        )


def _twice(x: Tensor) -> Tensor:
    """A batch with as many images more, others where that is easy."""
    other = x if not x.is_floating_point() else x.flip(-1) if x.dim() == 4 else -x
    return torch.cat([x, other.flip(0)])


def _differ(found_outputs: Inputs, expected_outputs: Inputs, precision: str) -> float:
    worst = 0.0
    if len(found_outputs) != len(expected_outputs):
        raise UnsupportedError(
            f"the plan gives {len(found_outputs)} outputs where the module gives {len(expected_outputs)}"
        )
    for found, expected in zip(found_outputs, expected_outputs, strict=True):
        if found.shape != expected.shape:
            raise UnsupportedError(
                f"the plan gives {tuple(found.shape)} where the module gives {tuple(expected.shape)}"
            )
        scale = expected.abs().max().clamp_min(1e-6) if expected.numel() else torch.ones(())
        worst = max(worst, float((found - expected).abs().max() / scale) if expected.numel() else 0.0)
        if not torch.equal(found.isfinite(), expected.isfinite()):
            raise UnsupportedError("the plan's output has other non-finite entries than the module's")
        if worst > _MOST_ERROR[precision]:
            raise UnsupportedError(f"the plan's output differs from the module's by {worst:.1e} of its largest entry")
    return worst


def _inputs(model: nn.Module, example: Tensor) -> dict[nn.Module, Tensor]:
    """The input of each submodule that takes one tensor, and the same shape at every call."""
    found: dict[nn.Module, Any] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fits = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        same = module not in found or (
            isinstance(found[module], Tensor) and fits and found[module].shape == args[0].shape
        )
        found[module] = args[0].clone() if fits and same else None

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: x for module, x in found.items() if x is not None}


def _plan_within(
    parent: nn.Module, prefix: str, inputs: dict[nn.Module, Tensor], parts: list[Part], bfloat16: bool
) -> None:
    """Puts plans in the place of the largest submodules that plans can compute."""
    if _plan.is_sequential(parent) and parent in inputs:
        return _plan_runs(cast(nn.Sequential, parent), prefix, inputs, parts, bfloat16)
    for name, child in list(parent.named_children()):
        full = f"{prefix}{name}"
        if not any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) for module in child.modules()):
            continue
        try:
            if child not in inputs:
                raise UnsupportedError("it is not called with one tensor")
            plan, _ = _make_plan(child, (inputs[child],), bfloat16)
        except (UnsupportedError, FastgenError) as error:
            if next(child.children(), None) is not None:
                _plan_within(child, f"{full}.", inputs, parts, bfloat16)
            else:
                parts.append(Part(full, "PyTorch", str(error)))
            continue
        setattr(parent, name, _Planned(plan))
        parts.append(Part(full, "plan"))


def _plan_runs(
    sequential: nn.Sequential, prefix: str, inputs: dict[nn.Module, Tensor], parts: list[Part], bfloat16: bool
) -> None:
    """The same within a Sequential: the longest runs of its members become one plan each."""
    names = [name for name, _ in sequential.named_children()]
    at = 0
    while at < len(names):
        for end in range(len(names), at, -1):
            members = [sequential._modules[name] for name in names[at:end]]
            first = cast(nn.Module, members[0])
            if first not in inputs or not all(_modules.is_plain(cast(nn.Module, m)) for m in members):
                continue
            try:
                plan, _ = _make_plan(nn.Sequential(*cast(list[nn.Module], members)), (inputs[first],), bfloat16)
            except (UnsupportedError, FastgenError) as error:
                reason = str(error)
                continue
            sequential._modules[names[at]] = _Planned(plan)
            for name in names[at + 1 : end]:
                sequential._modules[name] = nn.Identity()
            parts.append(
                Part(f"{prefix}{names[at]}" + (f" to {prefix}{names[end - 1]}" if end > at + 1 else ""), "plan")
            )
            at = end
            break
        else:
            module = cast(nn.Module, sequential._modules[names[at]])
            before = len(parts)
            _plan_within(module, f"{prefix}{names[at]}.", inputs, parts, bfloat16)
            if len(parts) == before:
                parts.append(
                    Part(f"{prefix}{names[at]}", "PyTorch", reason if module in inputs else "it is not called")
                )
            at += 1
