"""Launches compiled ahead of time for GPUs that need not be present."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgen.ops import _tiers

Launch = _tiers.triton.kernels("_launch").Launch

# Compute capability -> bytes of shared memory per program; code for 80 also runs on 86 and 89, which have less.
TARGETS = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports about a kernel."""

    ptx: str
    registers: int  # per thread
    local: int  # bytes per thread: spills and arrays
    shared: int  # bytes per program

    @property
    def matrix_instructions(self) -> set[str]:
        """The instructions for tensor cores, by their PTX names."""
        return set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", self.ptx))


def compiled(launch: Launch, capability: int) -> Compiled:
    """The launch's kernel, compiled for a GPU of this compute capability."""
    kernel, _, arguments, options = launch
    return _compiled(
        kernel, tuple((name, *_kind(value)) for name, value in arguments.items()), tuple(options.items()), capability
    )


def _kind(value: Any) -> tuple[str, Any, bool]:
    """As in a launch: an argument's type, its value if it is compiled in, and whether it is a multiple of 16."""
    if isinstance(value, tuple):
        return tuple(_kind(v)[0] for v in value), None, True
    if isinstance(value, Tensor):
        return _NAMES[value.dtype], None, True
    if isinstance(value, bool | str | None) or (isinstance(value, int) and value == 1):
        return "constexpr", value, False
    if isinstance(value, float):
        return "fp32", None, False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value, value % 16 == 0


@functools.cache
def _compiled(kernel, kinds, options, capability) -> Compiled:
    constant = {p.name for p in kernel.params if p.is_constexpr}
    by_name = {name: (kind, value, multiple) for name, kind, value, multiple in kinds}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind, value, multiple = by_name[name]
        if name in constant or kind == "constexpr":
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = kind
            if multiple:
                paths = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
                attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    resources = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(built.asm["ptx"], resources["REG"], resources["STACK"] + resources["LOCAL"], built.metadata.shared)
