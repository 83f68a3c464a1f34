"""Selects and calls an op's implementation. In order of precedence: the `impl` argument, use_impl, FASTGEN_IMPL, the
policy's choice among those that can run on this machine."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from fastgen.errors import FastgenError
from fastgen.ops import _autograd, _policy, _requested, _tiers
from fastgen.ops._info import count
from fastgen.ops._memo import dynamo_constant
from fastgen.ops._question import Choice
from fastgen.ops._requested import requested_impl
from fastgen.ops._tiers import GPU_TIERS

# .choice: the GPU tier (for Triton perhaps with a tile) that has to compute the current call.
_current_call = threading.local()
_log = logging.getLogger("fastgen")
ANY = Choice("")  # any of fastgen's kernels: the requested tier, else the first in auto's order


def kernel(
    op: str, launcher: str = "", leading: int = 0, dtype: int | None = None, cuda: bool = True
) -> Callable[[Callable], Callable]:
    """Registers a function as an op's default kernel. For tensors on a GPU it registers a launcher of fastgen.kernels
    ("module.function") and, unless cuda is False, the CUDA kernel fastgen_cuda::<op>.

    Where neither can run, or the selected tier has no kernel for the op, the default kernel runs. leading: the index of
    the argument (a tensor or a list) whose device and dtype decide; dtype: the index of a dtype argument to use
    instead.
    """
    module, _, function = launcher.partition(".")

    def registered(default: Callable) -> Callable:
        def run(*args):
            tensor = args[leading]
            tensor = tensor[0] if isinstance(tensor, list | tuple) else tensor
            tier, tile = _tier(op, str(tensor.device), tensor.dtype if dtype is None else args[dtype])
            match tier:
                case "triton" if launcher:
                    launch = getattr(_tiers.triton.kernels(module), function)
                    return launch(*args, **({"tile": tile} if tile else {}))
                case "cuda" if cuda:
                    return _tiers.nvcc.kernel(op)(*args)
            return default(*args)

        torch.library.impl(f"fastgen::{op}", "CompositeExplicitAutograd")(default)
        torch.library.impl(f"fastgen::{op}", "cpu" if _tiers.ON_CPU else "cuda")(run)
        return default

    return registered


def _tier(op: str, device: str, dtype: torch.dtype) -> tuple[str | None, str]:
    """(tier, tile): the GPU tier that runs a registered op, which is the requested one or else the first in auto's
    order, and the requested tile."""
    requested = getattr(_current_call, "choice", None) or Choice(requested_impl())
    order = _policy.gpu_tiers(op, device)
    order = (requested.implementation, *order) if requested.implementation in order else order
    return next((tier for tier in order if _tiers.unavailable(tier, device, dtype) is None), None), requested.tile


def call(op: str, choice: Choice, *args):
    """torch.ops.fastgen.<op>(*args) by the implementation that `choose` or the policy gave.

    On a GPU, a compiled graph uses the tier of use_impl or FASTGEN_IMPL, or else the first in auto's order.
    """
    if choice.implementation not in GPU_TIERS or torch.compiler.is_compiling():
        return _autograd.call(op, *args)
    before, _current_call.choice = getattr(_current_call, "choice", None), choice
    try:
        return _autograd.call(op, *args)
    finally:
        _current_call.choice = before


def choose(op: str, impl: str, x: torch.Tensor, fastest: Choice | None = None, counted: bool = True) -> Choice:
    """The implementation that runs op on a tensor like x. Raises FastgenError if the requested one cannot run.

    fastest: the policy's choice, for ops that have one; if it is PyTorch's convolution, the op runs "unfused".
    counted: whether to count the call in implementations_used.
    """
    device = x.device.type if x.device.index is None else f"{x.device.type}:{x.device.index}"
    if impl == "auto":
        impl = "reference" if is_pytorchs() else _requested.override.get()
    chosen = _choose(op, impl, device, x.dtype, fastest.implementation if fastest is not None else "", counted)
    return fastest if fastest is not None and chosen == fastest.implementation else Choice(chosen)


@dynamo_constant
def _choose(op: str, impl: str, device: str, dtype: torch.dtype, fastest: str, counted: bool) -> str:
    source = "impl"
    if impl == "auto":
        impl, source = _requested.checked(_requested.requested_by_environment(), "FASTGEN_IMPL"), "FASTGEN_IMPL"
    if impl == "auto":
        tier = _policy.auto_tier(op, device, dtype)
        reason = "" if tier is None else _tiers.why_not(op, tier, device, dtype)
        if tier in GPU_TIERS and reason and dtype != torch.float64:
            _warn_once(tier, reason)
        impl = "reference" if tier is None or reason else "unfused" if fastest == "torch" else fastest or tier
    elif reason := _tiers.why_not(op, _requested.checked(impl, source), device, dtype):
        raise FastgenError(f"{source}={impl!r} cannot run {op}: {reason}")
    if counted:
        count(op, impl)
    return impl


@functools.cache
def _warn_once(tier: str, reason: str) -> None:
    _log.warning("the %s kernels are not available, PyTorch's own ops are used: %s", tier, reason)


def has_kernels(x: torch.Tensor) -> bool:
    """Whether fastgen's convolutions can run on a tensor like x."""
    device = str(x.device)
    tier = _policy.auto_tier("conv2d_norm_act", device, x.dtype)
    return tier is not None and _tiers.unavailable(tier, device, x.dtype) is None


def is_pytorchs() -> bool:
    """Whether only PyTorch's ops can be used (in forward-mode differentiation and ONNX export) and no implementation
    is requested."""
    return (forward_ad._current_level >= 0 or exports_onnx()) and requested_impl() == "auto"


def exports_onnx() -> bool:
    is_traced = torch.compiler.is_exporting() if torch.compiler.is_compiling() else torch._C._is_tracing()
    return is_traced and _is_in_onnx_export()


@dynamo_constant
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()
