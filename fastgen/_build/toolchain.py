"""The compiler, the flags that all libraries share, and the build of a library into the cache."""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastgen._build import cache
from fastgen.errors import FastgenError

PACKAGE = Path(__file__).resolve().parents[1]
CSRC = next((folder for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if folder.is_dir()), PACKAGE / "csrc")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: one binary works with every later torch
CFLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",  # the simd pragmas of reductions; needs no OpenMP runtime
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # false alarms about buffers that a called loop fills
    STABLE_ABI,
)
MEMORY_PER_JOB = 2 << 30  # bytes that one compiler process may take

logger = logging.getLogger("fastgen")


def digest(files: list[Path], flags: tuple[str, ...], includes: list[Path]) -> str:
    """A hash of everything that determines what a library does: sources, headers in `includes`, flags, machine."""
    state = hashlib.sha256(repr((flags, sys.platform, platform.machine())).encode())
    headers = (header for folder in includes for pattern in ("*.h", "*.cuh") for header in folder.rglob(pattern))
    for file in [*files, *sorted(headers)]:
        state.update(f"\0{file.relative_to(CSRC)}\0".encode() + file.read_bytes())
    return state.hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler's version line, or None if there is no compiler."""
    import shutil
    import subprocess

    command = compiler_command()
    if shutil.which(command[0]) is None:
        return None
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError:  # it exists, but cannot be executed
        version = ""
    return next(iter(version.splitlines()), command[0])


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """The environment of a build: no more jobs than memory allows, ninja on PATH, messages in English."""
    settings = {
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(jobs()),
        "PATH": search_path(),
        "LC_ALL": "C",
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # the stable ABI works with any compiler
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY_PER_JOB))


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def search_path() -> str:
    """PATH, then the folder of a ninja that pip installed, since the virtual environment may not be activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def obstacle(sources: list[Path], requested: bool = False) -> str | None:
    """Why no build can be tried here, or None. `requested` by the user, a build overrides FASTGEN_BUILD."""
    import shutil

    if os.name != "posix":
        return f"the native ops are not built on {platform.system()}"
    if os.environ.get("FASTGEN_BUILD") == "0" and not requested:
        return "building is turned off (FASTGEN_BUILD=0)"
    if not sources:
        return f"no C++ sources in {CSRC}"
    if compiler() is None:
        return f"no C++ compiler on PATH ({compiler_command()[0]} not found)"
    if shutil.which("ninja", path=search_path()) is None:
        return "no ninja on PATH (`pip install ninja` installs it)"
    return None


def remembered_failure(key: str) -> str | None:
    failures = [file.read_text() for file in cache.cached(f"{key}.failed")]
    return f"an earlier build failed (`fastgen build` tries again): {failures[0]}" if failures else None


def make(
    key: str,
    sources: list[Path],
    compile_into: Callable[[str], str],
    requested: bool = False,
    force: bool = False,
    verbose: bool = False,
) -> Path:
    """Build into the cache, unless another process has meanwhile; return the library's path."""
    import shutil

    if reason := obstacle(sources, requested):
        raise FastgenError(reason)
    with cache.locked() as folder:
        library, failed = folder / f"{key}.so", folder / f"{key}.failed"
        if library.is_file() and not force:
            return library
        if not requested and (failure := remembered_failure(key)):
            raise FastgenError(failure)
        for left_behind in folder.glob("build-*"):  # by a killed process: this one holds the lock now
            shutil.rmtree(left_behind, ignore_errors=True)
        import tempfile  # here: a plan that only loads starts sooner

        logger.warning("building the native ops, once, into %s: this can take a few minutes", folder)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as private, environment():
            try:
                os.replace(compile_into(private), library)
            except (RuntimeError, ValueError) as error:  # ValueError: of TORCH_CUDA_ARCH_LIST
                if verbose:
                    logger.error("%s", error)
                reason = first_error(str(error))
                failed.write_text(reason)
                raise FastgenError(reason) from None
        failed.unlink(missing_ok=True)
        logger.info("built the native ops in %.0f s", time.monotonic() - start)
    return library


def compile_extension(name: str, sources: list[Path], folder: str, **options: Any) -> str:
    """Build an extension with torch's build tools; return the library's path. Raises RuntimeError with all of the
    compilers' output."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:  # setuptools is missing: a failure that must not be cached
        raise OSError(f"torch.utils.cpp_extension cannot be imported: {error}") from error
    # "Standalone" yet shared: a plain library that does not link Python. Its path is returned, and it is not loaded.
    return cpp_extension.load(
        name=name,
        sources=[str(file) for file in sources],
        extra_ldflags=["-shared"],
        extra_include_paths=[str(CSRC)],
        build_directory=folder,
        is_python_module=False,
        is_standalone=True,
        **options,
    )


def first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = (line for line in lines if re.search(r"\berror:|undefined reference|cannot find -l|^nvcc fatal", line))
    return next(telling, lines[-1])
