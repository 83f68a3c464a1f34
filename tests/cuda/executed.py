"""The CUDA kernels built by the host's compiler with the shim (tests/cuda/shim), to run on the CPU."""

from __future__ import annotations

import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from fastgen._build import cuda, toolchain

SHIM = Path(__file__).parent / "shim"
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-DFASTGEN_CUDA=CPU", toolchain.STABLE_ABI, "-Wall", "-Wno-unknown-pragmas")
# Every memory access of a kernel calls the shim, which looks for races in shared memory and asks the library of the
# address sanitizer, which knows what is allocated, whether the access is in bounds.
CHECKED = ("-fsanitize=thread,alignment", "-fsanitize-undefined-trap-on-error")


def library() -> Path:
    """The library of all CUDA kernels, built once."""
    key = hashlib.sha256(
        repr((cuda.library.digest(), FLAGS, CHECKED, toolchain.compiler(), torch.__version__)).encode()
    )
    for file in sorted(SHIM.iterdir()):
        key.update(file.read_bytes())
    return toolchain.make(f"executed-{key.hexdigest()[:16]}", cuda.library.sources(), _compile_into, requested=True)


def _compile_into(folder: str) -> str:
    torch_folders = cpp_extension.include_paths()
    include = [f"-I{path}" for path in (SHIM, toolchain.CSRC, *torch_folders)]

    def compile_(source: Path) -> str:
        target = f"{folder}/{source.parent.name}-{source.stem}.o"
        checked = CHECKED if source.suffix == ".cu" else ()
        command = [*toolchain.compiler_command(), *FLAGS, *checked, *include, "-x", "c++", "-c", source, "-o", target]
        _run(command)
        return target

    sources = [*cuda.library.sources(), SHIM / "shim.cpp"]
    with ThreadPoolExecutor(toolchain.jobs()) as jobs:
        objects = list(jobs.map(compile_, sources))
    where = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{where}", f"-Wl,-rpath,{where}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*toolchain.compiler_command(), *objects, *link, "-o", f"{folder}/executed.so"])
    return f"{folder}/executed.so"


def compile_program(source: str, target: Path) -> None:
    """A program of one CUDA file and the shim."""
    command = [*toolchain.compiler_command(), *FLAGS, f"-I{SHIM}", f"-I{toolchain.CSRC}"]
    objects = []
    for file, checked in ((source, CHECKED), (SHIM / "shim.cpp", ())):
        objects.append(f"{target}-{Path(file).stem}.o")
        _run([*command, *checked, "-x", "c++", "-c", file, "-o", objects[-1]])
    _run([*toolchain.compiler_command(), *objects, "-fsanitize=address", "-o", target])


def _run(command: list) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise RuntimeError(result.stderr or f"{command[0]} failed with exit code {result.returncode}")


def environment() -> dict[str, str]:
    """The environment of a process that runs the kernels, also for gradients."""
    return {
        "FASTGEN_CUDA_ON_CPU": str(library()),
        "FASTGEN_IMPL": "cuda",
        # libstdc++ too: the sanitizer must find its functions that throw.
        "LD_PRELOAD": ":".join(map(_file_of_compiler, ("libasan.so", "libstdc++.so"))),
        # No leak check: Python does not free everything at exit. New memory is filled with NaN.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:malloc_fill_byte=255:"
        "max_malloc_fill_size=1073741824",
    }


def _file_of_compiler(name: str) -> str:
    command = [*toolchain.compiler_command(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":  # python -m tests.cuda.executed: what to export
    print(*(f"{name}={value}" for name, value in environment().items()))
