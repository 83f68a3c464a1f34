"""The properties of a CPU that the rules depend on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastgen._build import native
from fastgen.ops._geometry import Geometry
from fastgen.ops._memo import dynamo_constant

# Whether this processor has a bfloat16 dot product instruction that fastgen's kernels may use.
torch.library.define("fastgen::multiplies_bf16", "() -> bool")
# Which tiles of bfloat16 fastgen's kernels multiply: an index of AMX (csrc/cpu/amx.h: cpu::Amx).
torch.library.define("fastgen::amx", "() -> int")
AMX = ("none", "emulated", "instructions")
# The algorithm that the C++ kernels use: an index of ALGORITHMS (csrc/cpu/algorithm.h: cpu::Algorithm, choose).
torch.library.define(
    "fastgen::algorithm",
    "(int n, int in_channels, int in_height, int in_width, int out_channels, int out_height, int out_width, "
    "int kernel_height, int kernel_width, int[2] stride, int[2] padding, int[2] dilation, int groups, bool transposed, "
    "ScalarType dtype, bool batch_stats, bool weight_gradient) -> int",
)
ALGORITHMS = (
    "direct", "rows", "winograd_4x2", "winograd_4x3", "direct_bf16", "rows_bf16", "amx_bf16", "amx_bf16x3",
    "amx_bf16x6",
)  # fmt: skip
WINOGRAD = ("winograd_4x2", "winograd_4x3")


class Processor(NamedTuple):
    """The instructions of a processor that PyTorch's kernels (including oneDNN's) and fastgen's use, within the limits
    that the environment sets."""

    vectors: str = "AVX2"  # PyTorch's: torch.backends.cpu.get_cpu_capability()
    torch_bf16: bool = False  # PyTorch's convolutions have instructions for bfloat16,
    torch_fp16: bool = False  # and for float16
    fastgen_bf16: bool = False  # fastgen's kernels multiply pairs of bfloat16
    fastgen_amx: bool = False  # fastgen's kernels multiply tiles of bfloat16

    def torch_multiplies(self, dtype: torch.dtype) -> bool:
        """Whether PyTorch's convolutions have instructions for a dtype. Without them they take up to a hundred times as
        long as fastgen's kernels, which multiply in float32."""
        return {torch.bfloat16: self.torch_bf16, torch.float16: self.torch_fp16}.get(dtype, True)


@dynamo_constant
def here() -> Processor:
    """This machine's processor. A constant of compiled graphs."""
    return _found()


@functools.cache
def _found() -> Processor:
    with _untraced():
        return Processor(
            torch.backends.cpu.get_cpu_capability(),
            torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.ops.mkldnn._is_mkldnn_fp16_supported(),
            native.load() is None and torch.ops.fastgen.multiplies_bf16(),
            amx() == "instructions",
        )


def amx() -> str:
    """Which of AMX fastgen's kernels use. The system is asked for permission once per process."""
    if native.load() is not None:
        return "none"
    with _untraced():
        return AMX[torch.ops.fastgen.amx()]


def algorithm(
    geometry: Geometry, x: Sequence[int], weight: Sequence[int], dtype: torch.dtype, weight_gradient: bool
) -> str:
    """Which of ALGORITHMS fastgen's C++ kernel uses for a convolution of x's shape, or for its weight's gradient."""
    if native.load() is not None:
        return "direct"
    n, channels, height, width = x
    _, out_channels, out_height, out_width = geometry.sizes(x, weight)
    sizes = (n, channels, height, width, out_channels, out_height, out_width, *weight[2:])
    arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.transposed)
    with _untraced():
        return ALGORITHMS[torch.ops.fastgen.algorithm(*sizes, *arguments, dtype, False, weight_gradient)]


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Hides op calls from torch.jit.trace, which would record them and supports no op that returns no tensor, and from
    modes such as FakeTensorMode."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
