"""The inference plan's module (csrc/runtime.cpp), which needs neither torch nor torch's build tools."""

import importlib.machinery
import importlib.util
import os
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

from fastgen._build import cache, environment, toolchain
from fastgen._build.toolchain import CFLAGS, CSRC
from fastgen.errors import FastgenError

name = "runtime"
FLAGS = (*CFLAGS, "-std=c++17", "-fvisibility=hidden", "-pthread")

_lock = threading.Lock()
_module: ModuleType | None = None


def load(build: bool = False) -> ModuleType:
    """The module, built at first use.

    `build`: the user requests a build, which overrides FASTGEN_BUILD and an earlier failure. Raises FastgenError.
    """
    global _module
    with _lock:
        if _module is None:
            environment.check()
            made_from, suffixes = digest(), importlib.machinery.EXTENSION_SUFFIXES
            # The first suffix names this Python. The compiler's version is not queried, so that a plan starts at once.
            key = f"runtime-{made_from}-{suffixes[0].strip('.').removesuffix('.so')}"
            names = [f"_runtime_{made_from}{suffix}" for suffix in suffixes]
            prebuilt = [toolchain.PACKAGE / name for name in names if (toolchain.PACKAGE / name).is_file()]
            prebuilt += cache.cached(f"{key}.so")
            path = prebuilt[0] if prebuilt else toolchain.make(key, sources(), _compile_into, requested=build)
            loader = importlib.machinery.ExtensionFileLoader("fastgen._runtime", str(path))
            spec = importlib.util.spec_from_file_location("fastgen._runtime", path, loader=loader)
            assert spec is not None
            try:
                module = importlib.util.module_from_spec(spec)
                loader.exec_module(module)
            except ImportError as error:
                raise FastgenError(f"the inference plan's module does not load: {error}") from error
            _module = module
    return _module


def sources() -> list[Path]:
    """The C++ files of the inference plan, which link no torch."""
    kernels = [file for name in ("norm_act", "packed_convolution") for file in (CSRC / "cpu").glob(f"{name}.cpp")]
    return [*CSRC.glob("runtime.cpp"), *sorted((CSRC / "plan").rglob("*.cpp")), *kernels]


def digest() -> str:
    """A hash of everything that determines what the library does. One library serves one version of Python."""
    return toolchain.digest(sources(), FLAGS, [CSRC])


def _compile_into(folder: str) -> str:
    """Run the compiler; return the library's path. Raises RuntimeError with all of its output."""
    from concurrent.futures import ThreadPoolExecutor

    import pybind11

    library = os.path.join(folder, "runtime.so")
    includes = (str(CSRC), pybind11.get_include(), sysconfig.get_path("include"))
    command = [*toolchain.compiler_command(), *FLAGS, "-fPIC", *(f"-I{folder}" for folder in includes)]

    def run(*arguments: str) -> None:
        import subprocess

        done = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(done.stderr or f"{command[0]} failed with exit code {done.returncode}")

    files = {os.path.join(folder, f"{i}.o"): str(file) for i, file in enumerate(sources())}  # two may share a name
    with ThreadPoolExecutor(toolchain.jobs()) as jobs:
        list(jobs.map(lambda target: run("-c", files[target], "-o", target), files))
    run("-shared", *files, "-o", library)
    return library
