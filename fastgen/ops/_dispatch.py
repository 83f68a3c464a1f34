"""Which implementation of an op runs: the `impl` argument, then use_impl, then FASTGEN_IMPL, then the best that is there."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections import Counter
from collections.abc import Iterator

import torch

from fastgen import _build
from fastgen.errors import FastgenError, UsageError

IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")
_WRITTEN: dict[str, tuple[str, ...]] = {}  # op -> the implementations it has
_override = "auto"  # set by use_impl
_used: Counter[tuple[str, str]] = Counter()
_log = logging.getLogger("fastgen")


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

    Process-wide, not per thread. Raises UsageError for an unknown name.
    """
    global _override
    before, _override = _override, _checked(impl, "use_impl")
    try:
        yield
    finally:
        _override = before


def why_not(op: str, impl: str, device: str) -> str | None:
    """Why an implementation cannot run an op on a device type; None if it can."""
    if impl == "reference":
        return None
    if impl not in _WRITTEN[op]:
        return f"fastgen {_version()} has no {impl} kernel for it"
    if impl == "cpp":
        return f"cpp kernels run on the CPU, the input is on {device}" if device != "cpu" else _build.load()
    return "no CUDA device" if not torch.cuda.is_available() else None


@torch.compiler.assume_constant_result
def _choose(op: str, impl: str, device: str, best: str) -> str:
    source = "impl"
    if impl == "auto":
        impl, source = _checked(os.environ.get("FASTGEN_IMPL", "auto"), "FASTGEN_IMPL"), "FASTGEN_IMPL"
    if impl == "auto":
        here = device == "cpu" and why_not(op, "cpp", device) is None
        impl = best if here else "reference"
    elif reason := why_not(op, _checked(impl, source), device):
        raise FastgenError(f"{source}={impl!r} cannot run {op}: {reason}")
    _used[op, impl] += 1
    return impl


def choose(op: str, impl: str, device: torch.device, wins: bool = True) -> str:
    """The implementation that runs op on a tensor of this device. Raises if one was asked for that cannot.

    Where the whole op's kernel does not win, auto is "composed": PyTorch's convolution and fastgen's norm_act.
    """
    best = "cpp" if wins else "composed"  # under torch.compile with dynamic sizes, `wins` becomes a guard here
    return _choose(op, _override if impl == "auto" else impl, device.type, best)


def implementations_used() -> dict[str, dict[str, int]]:
    """Calls so far in this process: op -> implementation -> count (a compiled graph counts once)."""
    used: dict[str, dict[str, int]] = {}
    for (op, impl), count in sorted(_used.items()):
        used.setdefault(op, {})[impl] = count
    return used


def _version() -> str:
    from fastgen import __version__

    return __version__


def info() -> str:
    """A table op x implementation with the reason for each absence, and what this machine is. Builds nothing."""
    build = _build.status()
    lines = [
        f"fastgen {_version()}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"CPU instruction set: {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}",
        f"C++ kernels: {f'{build.how}, {build.path}' if build.path else build.reason}; compiler: {build.compiler or 'none'}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}",
        "",
        f"{'op':32}" + "".join(f"{impl:>11}" for impl in IMPLEMENTATIONS),
    ]
    notes: dict[str, int] = {}
    for op, written in _WRITTEN.items():
        cells = []
        for impl in IMPLEMENTATIONS:
            if impl == "cpp" and impl in written:
                reason = None if build.path else build.reason
            else:
                reason = why_not(op, impl, "cpu" if impl in ("reference", "cpp") else "cuda")
            cells.append("yes" if reason is None else f"no [{notes.setdefault(reason, len(notes) + 1)}]")
        lines.append(f"{op:32}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines + [f"[{number}] {reason}" for reason, number in notes.items()])
