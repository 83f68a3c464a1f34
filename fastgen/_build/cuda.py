"""The CUDA kernels, as torch.ops.fastgen_cuda."""

import os
import re
from pathlib import Path

from fastgen._build.library import Library, Status
from fastgen._build.toolchain import CFLAGS, CSRC, STABLE_ABI, compile_extension

_MACROS = ("-DUSE_CUDA", "-DFASTGEN_CUDA=CUDA")
CXX_FLAGS = (*CFLAGS, *_MACROS)  # for the C++ files that register the kernels
NVCC_FLAGS = ("-O3", "--expt-relaxed-constexpr", STABLE_ABI, *_MACROS)


class Cuda(Library):
    """Built for this machine's GPUs, or for those of TORCH_CUDA_ARCH_LIST. Running the built library needs no
    toolkit."""

    name, flags, headers = "cuda", (*CXX_FLAGS, *NVCC_FLAGS), ("cuda", "ops", "shared")

    def sources(self) -> list[Path]:
        return [*CSRC.glob("ops.cpp"), *sorted((CSRC / "cuda").glob("*.cu"))]

    def made_for(self) -> tuple[object, ...]:
        import torch

        devices = range(torch.cuda.device_count())
        chips = os.environ.get("TORCH_CUDA_ARCH_LIST") or sorted({torch.cuda.get_device_capability(i) for i in devices})
        return torch.version.cuda, chips

    def compile_into(self, folder: str) -> str:
        flags = {"extra_cflags": list(CXX_FLAGS), "extra_cuda_cflags": list(NVCC_FLAGS)}
        return compile_extension("fastgen_cuda", self.sources(), folder, with_cuda=True, **flags)

    def usable(self) -> bool:
        import torch

        return torch.version.cuda is not None

    def obstacle(self) -> str | None:
        import torch
        from torch.utils import cpp_extension

        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        home = cpp_extension.CUDA_HOME
        nvcc = Path(home or "", "bin", "nvcc")
        if home is None or not nvcc.is_file():
            return f"no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is {home or 'not set'}"
        release = nvcc_release(nvcc)
        if release is None or release.split(".")[0] != torch.version.cuda.split(".")[0]:
            version = f"is {release}" if release else "reports no version"
            advice = f"PyTorch was built with {torch.version.cuda}: install a toolkit of its major version"
            return f"the CUDA toolkit in {home} {version}, {advice}"
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.device_count():
            return "this machine has no GPU to build the CUDA kernels for, and TORCH_CUDA_ARCH_LIST names none"
        return None

    def open_or_build(self) -> Status:
        if on_cpu := os.environ.get("FASTGEN_CUDA_ON_CPU"):  # built by the host compiler, for the tests: tests/cuda
            return self.open(Path(on_cpu), "for the CPU")
        return super().open_or_build()


def nvcc_release(nvcc: Path | str) -> str | None:
    """The CUDA toolkit's version, such as "13.0", according to its compiler, or None."""
    import subprocess

    try:
        output = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError:  # it exists, but cannot be executed
        return None
    found = re.search(r"release (\d+\.\d+)", output)
    return found[1] if found else None


library = Cuda()
load, build, status, obstacle = library.load, library.build, library.status, library.obstacle
