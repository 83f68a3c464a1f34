"""The resources of each kernel according to nvcc; `python -m tests.cuda.compiled` records them for the test."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fastgen._build import cuda, toolchain

# Architecture -> KiB of shared memory per multiprocessor; a block takes 1 KiB more than it requests.
ARCHITECTURES = {"80": 164, "90a": 228, "100": 228}
RECORDED = Path(__file__).with_name("resources.json")
_FLAGS = (*cuda.NVCC_FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v")


def nvcc() -> str | None:
    """nvcc, as cpp_extension would find it, or None."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None)


@functools.cache
def resources(source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """For each kernel of the file, by its name: registers per thread, bytes of its stack and spills, shared memory per
    block (the dynamic part if takes_shared_memory names it), threads per block, and how many blocks one multiprocessor
    can then run.

    Raises RuntimeError with the compiler's output if it fails or warns. The host's part of the file, which is the
    same for all, is compiled for the first of the ARCHITECTURES only.
    """
    parts = "-c" if architecture == next(iter(ARCHITECTURES)) else "-cubin"
    gencode = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        keep = ("--keep", "--keep-dir", folder)
        command = [nvcc(), parts, *_FLAGS, *keep, gencode, f"-I{toolchain.CSRC}", source, "-o", f"{folder}/object.o"]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if result.returncode or "warning" in result.stderr:
            raise RuntimeError(result.stderr or result.stdout)
        ptx = "\n".join(file.read_text() for file in Path(folder).glob("*.ptx"))
    blocks = re.split(r"Compiling entry function '", result.stdout + result.stderr)[1:]
    kernels = {}
    for block in blocks:
        name = block[: block.index("'")]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        body = ptx.split(f".entry {name}(")[1].split(".entry ")[0]
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", block) + re.findall(r"// shared memory: (\d+)", body)))
        bound = re.search(rf"\.entry {name}\(.*?\)\s*\.maxntid (\d+)", ptx, re.S)
        threads = int(bound[1]) if bound else 1024
        kernels[name] = {
            "registers": registers,
            "local": stack + stores + loads,
            "shared": shared,
            "threads": threads,
            "blocks": min(
                65536 // (-(-registers * 32 // 256) * 256) // (threads // 32),
                (ARCHITECTURES[architecture] << 10) // (shared + 1024),
                2048 // threads,
                32,
            ),
        }
    if not kernels:  # without arguments c++filt would read its standard input
        return {}
    names = subprocess.run(["c++filt", *kernels], capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(sorted(zip(map(_short, names), kernels.values(), strict=True)))


def _short(name: str) -> str:
    """A kernel's demangled name without namespaces, result and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("fastgen::cuda::", "").removeprefix("void ")
    return name[: name.rindex("(")] if "(" in name else name


def main() -> None:
    kernels = {
        architecture: {
            source.stem: resources(source, architecture) for source in cuda.library.sources() if source.suffix == ".cu"
        }
        for architecture in ARCHITECTURES
    }
    text = json.dumps({"nvcc": cuda.nvcc_release(nvcc()), **kernels}, indent=1)
    RECORDED.write_text(re.sub(r"\n {4,}|\n {3}(?=\})", "", text).replace(',"', ', "') + "\n")  # one line per kernel


if __name__ == "__main__":
    main()
