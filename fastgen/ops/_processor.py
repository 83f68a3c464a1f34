"""What the rules for the CPU ask of a processor."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fastgen._build import native
from fastgen.ops._memory import constant

# Whether this processor has an instruction for pairs of bfloat16 that fastgen's kernels may use.
torch.library.define("fastgen::multiplies_bf16", "() -> bool")
# The algorithm, as a number of cpu::Algorithm (csrc/cpu/algorithm.h), by which fastgen's kernel for the CPU computes a
# convolution or the gradient of its weight, whatever instructions the processor has and the environment asks for.
torch.library.define(
    "fastgen::algorithm",
    "(int n, int in_channels, int in_height, int in_width, int out_channels, int out_height, int out_width, "
    "int kernel_height, int kernel_width, int[2] stride, int[2] padding, int[2] dilation, int groups, bool transposed, "
    "ScalarType dtype, bool batch_stats, bool weight_gradient) -> int",
)


class Processor(NamedTuple):
    """A processor as PyTorch's kernels (oneDNN's among them) and fastgen's use it, limits of the environment
    included."""

    vectors: str = "AVX2"  # PyTorch's: torch.backends.cpu.get_cpu_capability()
    torch_bf16: bool = False  # PyTorch's convolutions have instructions for bfloat16,
    torch_fp16: bool = False  # and for float16
    own_bf16: bool = False  # fastgen's kernels multiply pairs of bfloat16

    def torch_multiplies(self, dtype: torch.dtype) -> bool:
        """Whether PyTorch's convolutions have instructions for a dtype. Without, they take up to a hundred times as
        long as fastgen's, which multiply in float32."""
        return {torch.bfloat16: self.torch_bf16, torch.float16: self.torch_fp16}.get(dtype, True)


@constant
def here() -> Processor:
    """The processor at hand. A constant of compiled graphs."""
    return _found()


@functools.cache
def _found() -> Processor:
    tracing = torch._C._get_tracing_state()
    # torch.jit.trace records every operator, and knows none that returns a bool.
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return Processor(
            torch.backends.cpu.get_cpu_capability(),
            torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.ops.mkldnn._is_mkldnn_fp16_supported(),
            native.load() is None and torch.ops.fastgen.multiplies_bf16(),
        )
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
