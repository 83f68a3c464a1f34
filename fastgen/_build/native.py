"""The C++ kernels, as torch.ops.fastgen."""

import logging
from pathlib import Path

from fastgen._build.library import Library
from fastgen._build.toolchain import CFLAGS, CSRC, compile_extension

logger = logging.getLogger("fastgen")


class Native(Library):
    name, flags, headers = "native", CFLAGS, ("cpu", "ops", "shared")

    def sources(self) -> list[Path]:
        return [*CSRC.glob("ops.cpp"), *sorted((CSRC / "ops").glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]

    def made_for(self) -> tuple[object, ...]:
        import torch

        return (torch.compiled_with_cxx11_abi(),)

    def compile_into(self, folder: str) -> str:
        return compile_extension("fastgen", self.sources(), folder, extra_cflags=list(CFLAGS))

    def warn(self, reason: str) -> None:
        logger.warning("the native ops are not available, PyTorch's own are used: %s", reason)


library = Native()
load, build, status = library.load, library.build, library.status
