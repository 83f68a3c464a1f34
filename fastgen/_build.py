"""The native code's one list of sources and flags, and its build at first use.

`setup.py` builds `sources()` with `CFLAGS` ahead of time into `fastgen/_native_<digest>.abi3.so`, and where there is a CUDA
toolkit `cuda_sources()` into `fastgen/_cuda_<digest>.abi3.so`. Where that is missing
or was made from other sources, `load()` builds the same list just in time into a cache folder. torch is imported when
something is loaded, not before. `runtime_sources()` become `fastgen/_runtime_<digest>.*.so` in the same two ways,
without torch: see `load_runtime()`.
"""

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import re
import shlex
import stat
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fastgen.errors import FastgenError

# shutil and subprocess are imported where something is built: a plan that starts needs neither.

PACKAGE = Path(__file__).resolve().parent
CSRC = next((folder for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if folder.is_dir()), PACKAGE / "csrc")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11: one binary serves every later torch
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
_OF_CUDA = ("-DUSE_CUDA", "-DFASTGEN_CUDA=CUDA")
CUDA_CFLAGS = (*CFLAGS, *_OF_CUDA)  # of the C++ files that register the CUDA kernels
NVCC_FLAGS = ("-O3", "--expt-relaxed-constexpr", STABLE_ABI, *_OF_CUDA)
RUNTIME_CFLAGS = (*CFLAGS, "-std=c++17", "-fvisibility=hidden", "-pthread")
MEMORY_PER_JOB = 2 << 30  # bytes that one compiler process may take

logger = logging.getLogger("fastgen")


@dataclass(frozen=True)
class Status:
    """Where the native ops stand: what `fastgen info` prints."""

    loaded: bool
    reason: str | None  # why they are not loaded
    path: Path | None  # the shared library
    how: str | None  # "ahead of time" or "just in time"
    compiler: str | None


Libraries = Callable[[], Iterator[tuple[Path, str]]]
_lock = threading.Lock()
_outcomes: dict[str, Status] = {}  # of the first load() and load_cuda() in this process: "native", "cuda"
_runtime: ModuleType | None = None


def load() -> str | None:
    """Make the native ops available, once a process; return None, or in one line why they are not."""
    return _load("native", lambda: _open_or_build(_libraries, _make))


def load_cuda() -> str | None:
    """The same for the CUDA kernels, as torch.ops.fastgen_cuda."""
    return _load("cuda", _open_or_build_cuda)


def _load(which: str, open_or_build: Callable[[], Status]) -> str | None:
    if which not in _outcomes:
        with _lock:
            if which not in _outcomes:
                try:
                    _outcomes[which] = open_or_build()
                except FastgenError as error:
                    _outcomes[which] = Status(False, str(error), None, None, compiler())
                    if which == "native":
                        logger.warning("the native ops are not available, PyTorch's own are used: %s", error)
    return _outcomes[which].reason


def build(force: bool = False, verbose: bool = False) -> Path:
    """Build the native ops now unless they are there, and load them; return the library's path.

    An earlier failure is tried again. `force` builds anew in any case, `verbose` logs all that a failing compiler says.
    Raises FastgenError with the first compiler error.
    """
    with _lock:
        return _build("native", _libraries, _make, force, verbose)


def build_cuda(force: bool = False, verbose: bool = False) -> Path:
    """The same for the CUDA kernels."""
    with _lock:
        return _build("cuda", _cuda_libraries, _make_cuda, force, verbose)


def _build(which: str, libraries: Libraries, make: Callable[..., Path], force: bool, verbose: bool) -> Path:
    found = None if force else next(libraries(), None)
    path, how = found or (make(asked=True, force=force, verbose=verbose), "just in time")
    if which not in _outcomes or not _outcomes[which].loaded:
        _outcomes[which] = _open(path, how)
    return path


def load_runtime(build: bool = False) -> ModuleType:
    """The inference plan's module (csrc/runtime.cpp), built at first use; imports no torch.

    `build`: by the user's wish, which overrules FASTGEN_BUILD and an earlier failure. Raises FastgenError.
    """
    global _runtime
    with _lock:
        if _runtime is None:
            digest, suffixes = runtime_digest(), importlib.machinery.EXTENSION_SUFFIXES
            # The first suffix names this Python. No compiler is asked for its version, so that a plan starts at once.
            key = f"runtime-{digest}-{suffixes[0].strip('.').removesuffix('.so')}"
            names = [f"_runtime_{digest}{suffix}" for suffix in suffixes]
            made = [PACKAGE / name for name in names if (PACKAGE / name).is_file()]
            made += cached(f"{key}.so")
            path = made[0] if made else _compile(key, _compile_runtime_into, asked=build)
            loader = importlib.machinery.ExtensionFileLoader("fastgen._runtime", str(path))
            spec = importlib.util.spec_from_file_location("fastgen._runtime", path, loader=loader)
            assert spec is not None
            try:
                module = importlib.util.module_from_spec(spec)
                loader.exec_module(module)
            except ImportError as error:
                raise FastgenError(f"the inference plan's module does not load: {error}") from error
            _runtime = module
    return _runtime


def _open_or_build_cuda() -> Status:
    if on_cpu := os.environ.get("FASTGEN_CUDA_ON_CPU"):
        return _open(Path(on_cpu), "for the CPU")
    return _open_or_build(_cuda_libraries, _make_cuda)


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, in one line, or None."""
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
        version = f"is {release}" if release else "says no version"
        wanted = f"PyTorch was built with {torch.version.cuda}: install a toolkit of its major version"
        return f"the CUDA toolkit in {home} {version}, {wanted}"
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.device_count():
        return "no GPU is here to build the CUDA kernels for, and TORCH_CUDA_ARCH_LIST names none"
    return None


def nvcc_release(nvcc: Path | str) -> str | None:
    """Of the CUDA toolkit, "13.0", as its compiler says, or None."""
    import subprocess

    try:
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError:  # found, but no program
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else None


def status() -> Status:
    """Where the native ops stand; builds and loads nothing."""
    return _status("native", _libraries, _key, lambda: None)


def cuda_status() -> Status:
    """The same for the CUDA kernels."""
    return _status("cuda", _cuda_libraries, _cuda_key, cuda_obstacle)


def _status(which: str, libraries: Libraries, key: Callable[[], str], obstacle: Callable[[], str | None]) -> Status:
    if which in _outcomes:
        return _outcomes[which]
    if found := next(libraries(), None):
        return Status(False, "not loaded yet", *found, compiler())
    reason = obstacle() or _obstacle() or _remembered_failure(key())
    reason = reason or "not built yet: built at first use, or by `fastgen build`"
    return Status(False, reason, None, None, compiler())


def sources() -> list[Path]:
    """The C++ files of the native ops."""
    return [*CSRC.glob("ops.cpp"), *sorted((CSRC / "ops").glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]


def cuda_sources() -> list[Path]:
    """The files of the CUDA kernels."""
    return [*CSRC.glob("ops.cpp"), *sorted((CSRC / "cuda").glob("*.cu"))]


def runtime_sources() -> list[Path]:
    """The C++ files of the inference plan, which link no torch."""
    return [*CSRC.glob("runtime.cpp"), *sorted((CSRC / "plan").glob("*.cpp")), *(CSRC / "cpu").glob("norm_act.cpp")]


def digest() -> str:
    """A hash of all that decides what the library does: sources, headers, flags, machine."""
    return _digest(sources(), CFLAGS, [CSRC / "cpu", CSRC / "ops", CSRC / "shared"])


def cuda_digest() -> str:
    """The same for the CUDA kernels."""
    return _digest(cuda_sources(), (*CUDA_CFLAGS, *NVCC_FLAGS), [CSRC / "cuda", CSRC / "ops", CSRC / "shared"])


def runtime_digest() -> str:
    """The same for the inference plan, whose library serves one version of Python."""
    return _digest(runtime_sources(), RUNTIME_CFLAGS, [CSRC])


def _digest(files: list[Path], flags: tuple[str, ...], includes: list[Path]) -> str:
    state = hashlib.sha256(repr((flags, sys.platform, platform.machine())).encode())
    headers = (header for folder in includes for pattern in ("*.h", "*.cuh") for header in folder.rglob(pattern))
    for file in [*files, *sorted(headers)]:
        state.update(f"\0{file.relative_to(CSRC)}\0".encode() + file.read_bytes())
    return state.hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler's version line, or None where there is no compiler."""
    import shutil
    import subprocess

    command = _compiler_command()
    if shutil.which(command[0]) is None:
        return None
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError:  # found, but no program
        version = ""
    return next(iter(version.splitlines()), command[0])


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """The environment of a build: no more jobs than memory allows, ninja within reach, messages in English."""
    settings = {
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(_jobs()),
        "PATH": _search_path(),
        "LC_ALL": "C",
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # the stable ABI asks for no particular compiler
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


def _jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY_PER_JOB))


def _compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _search_path() -> str:
    """PATH, then the folder of a ninja that pip installed: a virtual environment in use need not be active."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def _open_or_build(libraries: Libraries, make: Callable[..., Path]) -> Status:
    damaged = False
    for path, how in libraries():
        try:
            return _open(path, how)
        except FastgenError as error:
            logger.warning("%s", error)
            damaged |= how == "just in time"
    path = make(force=damaged)
    try:
        return _open(path, "just in time")
    except FastgenError as error:  # a symbol is missing: the next process need not build it to learn that
        path.with_suffix(".failed").write_text(str(error))
        path.unlink()
        raise


def _open(path: Path, how: str) -> Status:
    import torch

    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise FastgenError(f"the native ops built {how} do not load: {error.__cause__ or error}") from error
    return Status(True, None, path, how, compiler())


def _libraries() -> Iterator[tuple[Path, str]]:
    """The libraries made from these very sources, and how each was built; the ahead-of-time one first."""
    if sources():
        yield from ((path, "ahead of time") for path in PACKAGE.glob(f"_native_{digest()}*.so"))
        if os.name == "posix" and compiler() is not None:
            yield from ((path, "just in time") for path in cached(f"{_key()}.so"))


def _cuda_libraries() -> Iterator[tuple[Path, str]]:
    """The same for the CUDA kernels; what is built needs no toolkit."""
    import torch

    if cuda_sources() and torch.version.cuda is not None:
        yield from ((path, "ahead of time") for path in PACKAGE.glob(f"_cuda_{cuda_digest()}*.so"))
        yield from ((path, "just in time") for path in cached(f"{_cuda_key()}.so"))


def _make(**options: bool) -> Path:
    return _compile(_key(), _compile_into, **options)


def _make_cuda(**options: bool) -> Path:
    if obstacle := cuda_obstacle():
        raise FastgenError(obstacle)
    return _compile(_cuda_key(), _compile_cuda_into, **options)


def _obstacle(asked: bool = False) -> str | None:
    """Why no build can be tried here, or None. `asked`: by the user, who overrules FASTGEN_BUILD."""
    import shutil

    if os.name != "posix":
        return f"the native ops are not built on {platform.system()}"
    if os.environ.get("FASTGEN_BUILD") == "0" and not asked:
        return "building is turned off (FASTGEN_BUILD=0)"
    if not sources():
        return f"no C++ sources in {CSRC}"
    if compiler() is None:
        return f"no C++ compiler on PATH ({_compiler_command()[0]} not found)"
    if shutil.which("ninja", path=_search_path()) is None:
        return "no ninja on PATH (`pip install ninja` brings it)"
    return None


def _remembered_failure(key: str) -> str | None:
    failures = [file.read_text() for file in cached(f"{key}.failed")]
    return f"an earlier build failed (`fastgen build` tries again): {failures[0]}" if failures else None


def _compile(
    key: str, compile_into: Callable[[str], str], asked: bool = False, force: bool = False, verbose: bool = False
) -> Path:
    """Build into the cache, if no other process has by now; return the library's path."""
    import shutil

    if obstacle := _obstacle(asked):
        raise FastgenError(obstacle)
    with locked_cache() as folder:
        library, failed = folder / f"{key}.so", folder / f"{key}.failed"
        if library.is_file() and not force:
            return library
        if not asked and (failure := _remembered_failure(key)):
            raise FastgenError(failure)
        for left_behind in folder.glob("build-*"):  # by a builder that was killed: the lock is ours now
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
                reason = _first_error(str(error))
                failed.write_text(reason)
                raise FastgenError(reason) from None
        failed.unlink(missing_ok=True)
        logger.info("built the native ops in %.0f s", time.monotonic() - start)
    return library


def _compile_into(folder: str) -> str:
    """Run the compiler; return the library's path. Raises RuntimeError with all that the compiler said."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:  # setuptools is not there: nothing that a cache should remember
        raise OSError(f"torch.utils.cpp_extension cannot be imported: {error}") from error
    # "Standalone" yet shared: a plain library that does not link Python, and that is returned rather than loaded.
    return cpp_extension.load(
        name="fastgen",
        sources=[str(file) for file in sources()],
        extra_cflags=list(CFLAGS),
        extra_ldflags=["-shared"],
        extra_include_paths=[str(CSRC)],
        build_directory=folder,
        is_python_module=False,
        is_standalone=True,
    )


def _compile_cuda_into(folder: str) -> str:
    """The same for the CUDA kernels, for the GPUs that are here (TORCH_CUDA_ARCH_LIST: for others)."""
    from torch.utils import cpp_extension

    return cpp_extension.load(
        name="fastgen_cuda",
        sources=[str(file) for file in cuda_sources()],
        extra_cflags=list(CUDA_CFLAGS),
        extra_cuda_cflags=list(NVCC_FLAGS),
        extra_ldflags=["-shared"],
        extra_include_paths=[str(CSRC)],
        build_directory=folder,
        with_cuda=True,
        is_python_module=False,
        is_standalone=True,
    )


def _compile_runtime_into(folder: str) -> str:
    """The same for the inference plan, by the compiler alone."""
    from concurrent.futures import ThreadPoolExecutor

    import pybind11

    library = os.path.join(folder, "runtime.so")
    includes = (str(CSRC), pybind11.get_include(), sysconfig.get_path("include"))
    command = [*_compiler_command(), *RUNTIME_CFLAGS, "-fPIC", *(f"-I{folder}" for folder in includes)]

    def run(*arguments: str) -> None:
        import subprocess

        done = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(done.stderr or f"{command[0]} failed with exit code {done.returncode}")

    files = {os.path.join(folder, f"{file.stem}.o"): str(file) for file in runtime_sources()}
    with ThreadPoolExecutor(_jobs()) as jobs:
        list(jobs.map(lambda target: run("-c", files[target], "-o", target), files))
    run("-shared", *files, "-o", library)
    return library


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = (line for line in lines if re.search(r"\berror:|undefined reference|cannot find -l|^nvcc fatal", line))
    return next(telling, lines[-1])


def _key() -> str:
    """The name of a just-in-time build: the digest, and what it was built against and with."""
    import torch

    made_with = repr((torch.__version__, torch.compiled_with_cxx11_abi(), compiler()))
    return f"{digest()}-{hashlib.sha256(made_with.encode()).hexdigest()[:8]}"


def _cuda_key() -> str:
    """The same for the CUDA kernels, which are built for the GPUs that are here."""
    import torch

    devices = range(torch.cuda.device_count())
    chips = os.environ.get("TORCH_CUDA_ARCH_LIST") or sorted({torch.cuda.get_device_capability(i) for i in devices})
    made_with = repr((torch.__version__, torch.version.cuda, compiler(), chips))
    return f"cuda-{cuda_digest()}-{hashlib.sha256(made_with.encode()).hexdigest()[:8]}"


def cached(name: str) -> Iterator[Path]:
    """The files of this name in the cache folders."""
    return (folder / name for folder in _cache_folders() if os.path.isfile(folder / name))


def _cache_folders() -> list[Path]:
    """Where builds are kept: the chosen folder; if that cannot be written, also this user's own temporary one."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = Path(os.environ.get("FASTGEN_CACHE_DIR") or Path(cache, "fastgen")).absolute()
    there = next(folder for folder in (chosen, *chosen.parents) if os.path.exists(folder))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return [chosen]
    import tempfile

    own = Path(tempfile.gettempdir(), f"fastgen-{os.geteuid()}")
    with contextlib.suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        facts = own.lstat()  # the name can be guessed: load nothing from a folder that somebody else made
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077:
            return [chosen, own]
    return [chosen]


@contextlib.contextmanager
def locked_cache() -> Iterator[Path]:
    """The cache folder to write in, locked against other writers; a lock dies with the process that holds it."""
    import fcntl

    folder = _cache_folders()[-1]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that builds or tunes")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    except OSError as error:
        raise FastgenError(f"cannot write in {folder}: {error}") from error
