"""The table that `fastgen info` prints, and the counts of implementations_used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import threading
from collections import Counter

import torch

from fastgen import __version__
from fastgen._build import environment, native
from fastgen.ops import _processor, _requested, _tiers
from fastgen.ops._requested import IMPLEMENTATIONS

_used: Counter[tuple[str, str]] = Counter()
_counting = threading.Lock()


def count(op: str, implementation: str) -> None:
    """Adds a call to implementations_used."""
    with _counting:
        _used[op, implementation] += 1


if hasattr(os, "register_at_fork"):  # a forked child starts with a free lock, whichever thread held it
    os.register_at_fork(before=_counting.acquire, after_in_parent=_counting.release, after_in_child=_counting.release)


def implementations_used() -> dict[str, dict[str, int]]:
    """The calls so far in this process: op -> implementation -> count (a compiled graph counts once).

    Implementations are fastgen's kernels "cpp", "cuda" and "triton"; "reference", the op in plain PyTorch; "unfused",
    PyTorch's convolution and then fastgen's norm_act; and "modules", a fused layer's PyTorch modules one by one.
    """
    used: dict[str, dict[str, int]] = {}
    with _counting:
        counts = sorted(_used.items())
    for (op, implementation), calls in counts:
        used.setdefault(op, {})[implementation] = calls
    return used


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_AMX = {
    "none": "not used: the processor has none, the system or FASTGEN_AMX=0 forbids it, or no C++ kernels are loaded",
    "emulated": "emulated (FASTGEN_AMX=emulate), which is slow",
    "instructions": "tiles of bfloat16",
}


def _amx(is_built: bool) -> str:
    return _AMX[_processor.amx()] if is_built else "unknown until the C++ kernels are built"


def info() -> str:
    """A table of ops by implementations with the reason why one cannot run, and facts about the machine. Builds
    nothing.

    Raises UsageError for an environment variable with a meaningless value.
    """
    environment.check()
    _requested.checked(_requested.requested_impl(), "FASTGEN_IMPL")
    build = native.status()
    lines = [
        f"fastgen {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"CPU instruction set: {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}",
        f"AMX: {_amx(build.path is not None)}",
        f"C++ kernels: {f'{build.how}, {build.path}' if build.path else build.reason}; compiler: "
        f"{build.compiler or 'none'}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}",
        f"Triton: {_triton_version()}",
        "",
        f"{'op':32}" + "".join(f"{impl:>11}" for impl in IMPLEMENTATIONS),
    ]
    notes: dict[str, int] = {}
    for op, tiers in _tiers.ops().items():
        cells = []
        for name in IMPLEMENTATIONS:
            reason = _tiers.TIERS[name].obstacle() if name in tiers else _tiers.why_not(op, name, "cpu")
            cells.append("yes" if reason is None else f"no [{notes.setdefault(reason, len(notes) + 1)}]")
        lines.append(f"{op:32}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines + [f"[{number}] {reason}" for reason, number in notes.items()])
