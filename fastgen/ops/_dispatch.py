"""Which implementation of an op runs: the `impl` argument, then use_impl, then FASTGEN_IMPL, then the best that is
there."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import forward_ad

from fastgen._build import cuda, environment, native
from fastgen._build.native import CUDA_ON_CPU, INTERPRETED
from fastgen.errors import FastgenError, UsageError
from fastgen.ops import _autograd, _memory
from fastgen.ops._settings import Setting

IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")
_WRITTEN: dict[str, tuple[str, ...]] = {}  # op -> the implementations it has
_override = Setting("impl", "auto")  # of use_impl
_used: Counter[tuple[str, str]] = Counter()
_counting = threading.Lock()
_asked = threading.local()  # .tier: of a GPU's, what the call under way asked for; Triton's may be followed by a tile
_defining = threading.Lock()  # a thread that defines an op of fastgen_cuda: no op can be defined twice
_log = logging.getLogger("fastgen")
GPU_TIERS = ("triton", "cuda")  # in auto's order where nothing was measured
OLDEST_GPU = (8, 0)


def register(op: str, *implementations: str) -> None:
    """Names the implementations that an op has, for `choose` and `info`."""
    _WRITTEN[op] = implementations


def _checked(impl: str, source: str) -> str:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise UsageError(f"{source}: unknown implementation {impl!r}; there are auto, {', '.join(IMPLEMENTATIONS)}")
    return impl


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within the context every op whose `impl` is "auto" runs this implementation, or raises with the reason it cannot.

    For the calling thread, and the backward passes that it asks for, as with torch.autocast. Threads that are started
    within it, such as nn.DataParallel's, begin with auto; FASTGEN_IMPL is for all of a process. Raises UsageError for
    an unknown name.
    """
    with _override.set_to(_checked(impl, "use_impl")):
        yield


def asked() -> str:
    """The implementation that use_impl or the environment asks for, or "auto"."""
    impl = _override.get()
    return os.environ.get("FASTGEN_IMPL", "auto") if impl == "auto" else impl


def why_not(op: str, impl: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why an implementation cannot run an op on a device ("cpu", "cuda:0") and a dtype; None if it can."""
    if impl == "reference":
        return None
    if impl not in _WRITTEN[op]:
        return f"fastgen {_version()} has no {impl} kernel for it"
    if impl in GPU_TIERS:
        return _why_no_gpu(impl, device, dtype)
    return f"cpp kernels run on the CPU, the input is on {device}" if device != "cpu" else native.load()


@functools.cache
def _why_no_gpu(tier: str, device: str, dtype: torch.dtype | None) -> str | None:
    """Why a GPU's tier cannot run on a device and a dtype; builds what it needs where nothing else is in its way."""
    if reason := why_not_there(tier, device, dtype):
        return reason
    if tier == "cuda":
        return cuda.load() or (_why_no_code(device) if device.startswith("cuda") else None)
    return _why_no_driver() if device.startswith("cuda") else None


def _why_no_code(device: str) -> str | None:
    """Why the CUDA kernels, which may have been built elsewhere, cannot run on this GPU."""
    index = torch.device(device).index
    with _defining:
        has_code = _cuda_op("has_code")
    if has_code(torch.cuda.current_device() if index is None else index):
        return None
    chip = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return (
        f"the CUDA kernels were built for other GPUs than {device}, of compute capability {chip}: "
        f"build them with TORCH_CUDA_ARCH_LIST={chip} or without it on this machine"
    )


def _why_no_driver() -> str | None:
    """What keeps Triton from the GPU's driver, for which it compiles a file of C at its first use on a machine."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # no compiler, no Python.h, a library or a driver that does not fit
        return f"triton cannot use the GPU's driver: {' '.join(str(error).split())}"
    return None


def why_not_there(tier: str, device: str, dtype: torch.dtype | None) -> str | None:
    """The same, but for the build."""
    if tier == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if dtype == torch.float64:
        return f"{tier} kernels compute float32, bfloat16 and float16, not float64"
    if CUDA_ON_CPU if tier == "cuda" else INTERPRETED:
        if device != "cpu":
            return f"the {tier} kernels run on the CPU here, the input is on {device}"
        return None
    if not device.startswith("cuda"):
        hint = " (TRITON_INTERPRET=1 runs them on the CPU, slowly)" if tier == "triton" else ""
        return f"{tier} kernels run on a GPU, the input is on {device}{hint}"
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device or driver: see nvidia-smi"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if (found := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"the GPU {device} has compute capability {found[0]}.{found[1]}, the kernels need 8.0 (Ampere) or newer"
    return None


def kernels(name: str) -> ModuleType:
    """A module of fastgen.kernels; from the repository's folder where fastgen runs from a checkout that is not
    installed."""
    if "fastgen.kernels" not in sys.modules and importlib.util.find_spec("fastgen.kernels") is None:
        folder = Path(__file__).parents[2] / "kernels"
        spec = importlib.util.spec_from_file_location(
            "fastgen.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise FastgenError("fastgen.kernels is not installed: install fastgen again")
        module = sys.modules["fastgen.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(f"fastgen.kernels.{name}")


def kernel(
    op: str, launcher: str = "", leading: int = 0, dtype: int | None = None, cuda: bool = True
) -> Callable[[Callable], Callable]:
    """Registers a function as an op's default kernel, and for a GPU's tensors fastgen.kernels' launcher,
    "module.function", and the CUDA kernel fastgen_cuda::<op>, if there is one.

    Where neither can run, or the tier that would has none, the default does. leading: which argument's device and dtype
    say so, a tensor or a list; dtype: which argument is the dtype instead.
    """
    module, _, function = launcher.partition(".")
    on_cpu = INTERPRETED or CUDA_ON_CPU

    def registered(default: Callable) -> Callable:
        def run(*args):
            like = args[leading]
            like = like[0] if isinstance(like, list | tuple) else like
            tier, tile = _tier(op, str(like.device), like.dtype if dtype is None else args[dtype])
            match tier:
                case "triton" if launcher:
                    return getattr(kernels(module), function)(*args, **({"tile": tile} if tile else {}))
                case "cuda" if cuda:
                    return _cuda_kernel(op)(*args)
            return default(*args)

        torch.library.impl(f"fastgen::{op}", "CompositeExplicitAutograd")(default)
        torch.library.impl(f"fastgen::{op}", "cpu" if on_cpu else "cuda")(run)
        return default

    return registered


def _tier(op: str, device: str, dtype: torch.dtype) -> tuple[str | None, str]:
    """The GPU's tier that runs a registered op, the one asked for, else the first in auto's order; and the tile asked
    for."""
    wanted, _, tile = (getattr(_asked, "tier", None) or asked()).partition(" ")
    order = _order(op, device)
    order = (wanted, *order) if wanted in order else order
    return next((tier for tier in order if _why_no_gpu(tier, device, dtype) is None), None), tile


def _order(op: str, device: str) -> tuple[str, ...]:
    """A GPU's tiers, that first which was measured faster for an op and its gradient."""
    from fastgen.ops import _choices  # here: it asks this module what can run

    first = _choices.faster_tier(op.removesuffix("_backward").removesuffix("_group"), device)
    return tuple(sorted(GPU_TIERS, key=lambda tier: tier != first))


_OF_CUDA_ALONE = {"allow_tf32": "(bool allowed) -> ()", "has_code": "(int device) -> bool"}


@functools.cache
def _cuda_op(op: str) -> Callable:
    schema = _OF_CUDA_ALONE.get(op) or str(getattr(torch.ops.fastgen, op).default._schema)
    torch.library.define(f"fastgen_cuda::{op}", schema[schema.index("(") :])
    return getattr(torch.ops.fastgen_cuda, op).default


def _cuda_kernel(op: str) -> Callable:
    """fastgen_cuda::<op>, which has the schema of fastgen::<op>; it multiplies float32 as PyTorch's convolutions do."""
    with _defining:
        allow_tf32, kernel = _cuda_op("allow_tf32"), _cuda_op(op)
    allow_tf32(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
    return kernel


def call(op: str, impl: str, *args):
    """torch.ops.fastgen.<op>(*args) by the implementation that `choose` gave.

    Of a GPU's two tiers a compiled graph takes the one of use_impl or FASTGEN_IMPL, or the first in auto's order.
    """
    if impl.partition(" ")[0] not in GPU_TIERS or torch.compiler.is_compiling():
        return _autograd.call(op, *args)
    before, _asked.tier = getattr(_asked, "tier", None), impl
    try:
        return _autograd.call(op, *args)
    finally:
        _asked.tier = before


@_memory.constant
def _choose(op: str, impl: str, device: str, dtype: torch.dtype, best: str, counted: bool) -> str:
    source = "impl"
    if impl == "auto":
        impl, source = _checked(os.environ.get("FASTGEN_IMPL", "auto"), "FASTGEN_IMPL"), "FASTGEN_IMPL"
    if impl == "auto":
        own = own_kernels(device, dtype, op)
        reason = "" if own is None else why_not(op, own, device, dtype)
        if own in GPU_TIERS and reason and dtype != torch.float64:
            _say_once(own, reason)
        impl = "reference" if own is None or reason else own if best == "own" else best
    elif reason := why_not(op, _checked(impl, source), device, dtype):
        raise FastgenError(f"{source}={impl!r} cannot run {op}: {reason}")
    if counted:
        count(op, impl.partition(" ")[0])
    return impl


def own_kernels(device: str, dtype: torch.dtype | None = None, op: str = "") -> str | None:
    """The implementation that auto takes on a device, if it can run: cpp, one of a GPU's, or none."""
    if device.startswith("cuda") or (device == "cpu" and (INTERPRETED or CUDA_ON_CPU)):
        order = _order(op, device)
        return next((tier for tier in order if _why_no_gpu(tier, device, dtype) is None), order[0])
    return "cpp" if device == "cpu" else None


@functools.cache
def _say_once(tier: str, reason: str) -> None:
    _log.warning("the %s kernels are not available, PyTorch's own ops are used: %s", tier, reason)


def runs_auto() -> bool:
    """Whether no implementation is asked for by use_impl or the environment: auto chooses, among those for a CPU."""
    return asked() == "auto" and not INTERPRETED and not CUDA_ON_CPU


def choose(op: str, impl: str, x: torch.Tensor, wins: str | None = "own", counted: bool = True) -> str:
    """The implementation that runs op on a tensor like x. Raises if one was asked for that cannot.

    auto is the one that `wins`, for Triton's kernels with a tile if one was measured; where None does, "composed":
    PyTorch's convolution and fastgen's norm_act. counted: whether implementations_used is to know.
    """
    device = x.device.type if x.device.index is None else f"{x.device.type}:{x.device.index}"
    best = wins or "composed"  # under torch.compile with dynamic sizes, `wins` becomes a guard here
    if impl == "auto":
        impl = "reference" if is_pytorchs() else _override.get()
    return _choose(op, impl, device, x.dtype, best, counted)


def is_pytorchs() -> bool:
    """Whether the calls under way are for what knows PyTorch's ops alone, forward derivatives and ONNX, and no
    implementation is asked for."""
    return (forward_ad._current_level >= 0 or exports_onnx()) and asked() == "auto"


def exports_onnx() -> bool:
    is_traced = torch.compiler.is_exporting() if torch.compiler.is_compiling() else torch._C._is_tracing()
    return is_traced and _is_in_onnx_export()


@_memory.constant
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def count(op: str, impl: str) -> None:
    """Adds a call to implementations_used."""
    with _counting:
        _used[op, impl] += 1


if hasattr(os, "register_at_fork"):  # a child begins with the lock free, whatever other threads were at
    os.register_at_fork(before=_counting.acquire, after_in_parent=_counting.release, after_in_child=_counting.release)


def implementations_used() -> dict[str, dict[str, int]]:
    """Calls so far in this process: op -> implementation -> count (a compiled graph counts once)."""
    used: dict[str, dict[str, int]] = {}
    with _counting:
        counts = sorted(_used.items())
    for (op, impl), count in counts:
        used.setdefault(op, {})[impl] = count
    return used


def _version() -> str:
    from fastgen import __version__

    return __version__


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> str:
    """A table op x implementation with the reason for each absence, and what this machine is. Builds nothing.

    Raises UsageError for a variable of the environment that has no meaning.
    """
    environment.check()
    _checked(asked(), "FASTGEN_IMPL")
    build = native.status()
    lines = [
        f"fastgen {_version()}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"CPU instruction set: {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}",
        f"C++ kernels: {f'{build.how}, {build.path}' if build.path else build.reason}; compiler: "
        f"{build.compiler or 'none'}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}",
        f"Triton: {_triton_version()}",
        "",
        f"{'op':32}" + "".join(f"{impl:>11}" for impl in IMPLEMENTATIONS),
    ]
    notes: dict[str, int] = {}
    for op, written in _WRITTEN.items():
        cells = []
        for impl in IMPLEMENTATIONS:
            if impl == "cpp" and impl in written:
                reason = None if build.path else build.reason
            elif impl in GPU_TIERS and impl in written:
                on_cpu = CUDA_ON_CPU if impl == "cuda" else INTERPRETED
                reason = why_not_there(impl, "cpu" if on_cpu else "cuda", None)
                if impl == "cuda" and reason is None and not on_cpu and not (found := cuda.status()).path:
                    reason = found.reason
            else:
                reason = why_not(op, impl, "cpu")
            cells.append("yes" if reason is None else f"no [{notes.setdefault(reason, len(notes) + 1)}]")
        lines.append(f"{op:32}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines + [f"[{number}] {reason}" for reason, number in notes.items()])
