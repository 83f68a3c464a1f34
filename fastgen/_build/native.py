"""The C++ kernels, as torch.ops.fastgen."""

import logging
import os
from pathlib import Path

from fastgen._build.library import Library
from fastgen._build.toolchain import CFLAGS, CSRC, compile_extension

logger = logging.getLogger("fastgen")

PLAN_ONLY = ("packed_convolution",)  # kernels that no op calls: fastgen._build.runtime compiles them


class Native(Library):
    name, flags, headers = "native", CFLAGS, ("cpu", "ops", "shared")

    def sources(self) -> list[Path]:
        kernels = [file for file in sorted((CSRC / "cpu").glob("*.cpp")) if file.stem not in PLAN_ONLY]
        return [*CSRC.glob("ops.cpp"), *sorted((CSRC / "ops").glob("*.cpp")), *kernels]

    def made_for(self) -> tuple[object, ...]:
        import torch

        return (torch.compiled_with_cxx11_abi(),)

    def compile_into(self, folder: str) -> str:
        return compile_extension("fastgen", self.sources(), folder, extra_cflags=list(CFLAGS))

    def warn(self, reason: str) -> None:
        logger.warning("the native ops are not available, PyTorch's own are used: %s", reason)


library = Native()
build, status = library.build, library.status
# With TRITON_INTERPRET=1 Triton's interpreter runs its kernels on the CPU; they then replace the C++ kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The CUDA kernels built by the host compiler (tests/cuda), which then replace the C++ kernels on the CPU.
CUDA_ON_CPU = os.environ.get("FASTGEN_CUDA_ON_CPU", "")


def load() -> str | None:
    """Loads the kernels, after building them if necessary; returns why they cannot be used, or None.

    If other kernels replace them, they must not be loaded, since that would register them for the CPU.
    """
    if INTERPRETED:
        return "TRITON_INTERPRET=1 runs the triton kernels on the CPU in their place"
    if CUDA_ON_CPU:
        return "FASTGEN_CUDA_ON_CPU runs the cuda kernels on the CPU in their place"
    return library.load()
