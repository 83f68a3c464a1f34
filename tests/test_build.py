"""The build, tested in a copy of the tree with one tiny op, in fresh processes with an empty cache."""

import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from fastgen._build import cuda, toolchain

ROOT = Path(__file__).parents[1]
HEADER = "inline float twice(float x) { return 2 * x; }\n"
KERNEL = """#include "shared/twice.h"
void twice(const float* in, float* out, long n) { for (long i = 0; i < n; ++i) out[i] = twice(in[i]); }
"""
OPS = """#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
void twice(const float* in, float* out, long n);
torch::stable::Tensor twice_of(const torch::stable::Tensor& x) {
  auto out = torch::stable::empty_like(x);
  twice(static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()), x.numel());
  return out;
}
STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) { m.def("twice(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("twice", TORCH_BOX(&twice_of)); }
"""
FILES = {"README.md": "", "csrc/ops.cpp": OPS, "csrc/cpu/twice.cpp": KERNEL, "csrc/shared/twice.h": HEADER}
# A compiler that logs each source it compiles, and executes the file next to it, if there is one.
COMPILER = """#!/bin/sh
case "$*" in *ops.cpp*) echo ops.cpp >> "$0.log"; [ ! -f "$0.first" ] || . "$0.first" ;; esac
exec c++ "$@"
"""
LOAD = "from fastgen._build import native; print(native.load())"
USE = """import torch
from fastgen._build import native
reason = native.load()
print(reason or torch.ops.fastgen.twice(torch.ones(2)).tolist())
print(native.status().how)
"""
WORKS = "[2.0, 2.0]"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the installed files, with the tiny op instead of csrc."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "fastgen", copy / "fastgen", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for name, text in {
        "README.md": "",
        "csrc/ops.cpp": OPS,
        "csrc/cpu/twice.cpp": KERNEL,
        "csrc/shared/twice.h": HEADER,
    }.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    return copy


@pytest.fixture
def env(tmp_path: Path, tree: Path) -> dict[str, str]:
    """An environment in which `import fastgen` finds the copy, and its cache is empty."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FASTGEN_", "XDG_", "CXX"))}
    return inherited | {"PYTHONPATH": str(tree), "FASTGEN_CACHE_DIR": str(tmp_path / "cache")}


@pytest.fixture
def cxx(tmp_path: Path, env: dict[str, str]) -> Path:
    """Makes env name the compiler of COMPILER."""
    script = tmp_path / "bin" / "cxx"
    script.parent.mkdir()
    script.write_text(COMPILER)
    script.chmod(0o755)
    env["CXX"] = str(script)
    return script


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """The interpreter of a new virtual environment that is empty but can see this one's packages."""
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    import torch

    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return str(tmp_path / "venv" / "bin" / "python")


def start(code: str, env: dict[str, str], python: str = sys.executable) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [python, "-c", code], env=env, cwd="/", text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )


def run(code: str, env: dict[str, str], python: str = sys.executable) -> tuple[list[str], str]:
    """Runs code; returns the lines it printed, and what it logged."""
    process = start(code, env, python)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines(), err


def compilations(cxx: Path) -> int:
    log = Path(f"{cxx}.log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_first_use_builds_and_the_next_process_finds_it(env, cxx):
    assert run("from fastgen._build import native; print(native.status().reason)", env)[0][0].startswith(
        "not built yet"
    )
    assert compilations(cxx) == 0
    out, log = run(USE, env)
    assert out == [WORKS, "just in time"]
    assert log.count("\n") == 1 and "building the native ops, once" in log
    assert run(USE, env) == ([WORKS, "just in time"], "")
    assert compilations(cxx) == 1


def test_two_processes_build_once(env, cxx):
    Path(f"{cxx}.first").write_text("sleep 2\n")
    both = [start(USE, env) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in both]
    assert [out.splitlines()[0] for out, _ in results] == [WORKS, WORKS], results
    assert compilations(cxx) == 1


def test_killed_builder_leaves_no_lock(env, cxx):
    Path(f"{cxx}.first").write_text("sleep 600\n")
    builder = start(LOAD, env)
    deadline = time.monotonic() + 100
    while compilations(cxx) == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    Path(f"{cxx}.first").unlink()
    assert run(USE, env)[0][0] == WORKS
    assert not list(Path(env["FASTGEN_CACHE_DIR"]).glob("build-*"))


def test_failed_build_is_shown_once_and_remembered_until_forced(env, cxx):
    broken = Path(f"{cxx}.first")
    broken.write_text("echo 'ops.cpp:1:2: error: no such luck'; echo 'ops.cpp:3:4: error: nor here'; exit 1\n")
    out, log = run(LOAD, env)
    assert out == ["ops.cpp:1:2: error: no such luck"]
    assert [line.split(":")[0] for line in log.splitlines()] == [
        f"building the native ops, once, into {env['FASTGEN_CACHE_DIR']}",
        "the native ops are not available, PyTorch's own are used",
    ]
    assert log.count("no such luck") == 1 and "nor here" not in log

    broken.unlink()
    out, log = run(LOAD, env)
    assert out[0].startswith("an earlier build failed (`fastgen build` tries again): ops.cpp:1:2: error")
    assert log.count("\n") == 1 and compilations(cxx) == 1

    out, _ = run(f"{LOAD}; print(native.build(force=True)); print(native.load())", env)
    assert out[1].endswith(".so") and out[2] == "None"
    assert run(USE, env) == ([WORKS, "just in time"], "")


def test_build_raises_the_first_error(env, tree):
    (tree / "csrc" / "ops.cpp").write_text("int f() { return nonsense; }\n")
    code = f"{LOAD}\nfrom fastgen.errors import FastgenError\ntry: native.build()\nexcept FastgenError as e: print(e)"
    out, _ = run(code, env)
    assert len(out) == 2 and out[0] == out[1]
    assert "csrc/ops.cpp:1:18: error:" in out[1] and "nonsense" in out[1]


def test_missing_symbol_is_remembered(env, cxx, tree):
    (tree / "csrc" / "cpu" / "twice.cpp").unlink()
    assert "undefined symbol" in run(LOAD, env)[0][0]
    assert run(LOAD, env)[0][0].startswith("an earlier build failed")
    assert compilations(cxx) == 1


def test_without_a_compiler(env, tmp_path):
    out, log = run(LOAD, env | {"PATH": str(tmp_path)})
    assert out == ["no C++ compiler on PATH (c++ not found)"]
    assert log == f"the native ops are not available, PyTorch's own are used: {out[0]}\n"


def test_without_ninja(env, cxx, bare_python):
    out, log = run(LOAD, env | {"PATH": str(cxx.parent)}, bare_python)
    assert out == ["no ninja on PATH (`pip install ninja` installs it)"]
    assert log.count("\n") == 1


def test_with_ninja_in_an_environment_that_is_not_active(env, bare_python):
    ninja = shutil.which("ninja", path=toolchain.search_path())
    assert ninja is not None
    (Path(bare_python).parent / "ninja").symlink_to(ninja)
    compilers = Path(bare_python).parent.parent / "compilers"
    compilers.mkdir()
    for tool in ("c++", "g++", "as", "ld", "sh"):
        if found := shutil.which(tool):
            (compilers / tool).symlink_to(found)
    assert run(USE, env | {"PATH": str(compilers)}, bare_python)[0][0] == WORKS


def test_building_turned_off(env, cxx):
    assert run(LOAD, env | {"FASTGEN_BUILD": "0"})[0] == ["building is turned off (FASTGEN_BUILD=0)"]
    assert compilations(cxx) == 0
    run(LOAD, env)
    assert run(USE, env | {"FASTGEN_BUILD": "0"})[0][0] == WORKS


def test_unwritable_cache_falls_back_to_a_private_temporary_folder(env, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    env |= {"FASTGEN_CACHE_DIR": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    assert run(USE, env)[0][0] == WORKS
    fallback = tmp_path / "tmp" / f"fastgen-{os.geteuid()}"
    assert fallback.stat().st_mode & 0o777 == 0o700
    out, log = run("from fastgen._build import native; native.load(); print(native.status().path.parent)", env)
    assert out == [str(fallback)] and log == ""

    fallback.chmod(0o777)  # like a folder that another user planted for us to load from
    out, _ = run(LOAD, env)
    assert out[0].startswith(f"cannot write in {env['FASTGEN_CACHE_DIR']}: ")


def test_read_only_cache_serves_what_it_has(env, tmp_path):
    run(LOAD, env)
    read_only = """import os
access, cache = os.access, os.environ["FASTGEN_CACHE_DIR"]
os.access = lambda path, mode: str(path) != cache and access(path, mode)
"""  # chmod does not stop root
    assert run(read_only + USE, env | {"TMPDIR": str(tmp_path)}) == ([WORKS, "just in time"], "")


def test_damaged_library_is_built_again(env, cxx):
    run(LOAD, env)
    next(Path(env["FASTGEN_CACHE_DIR"]).glob("*.so")).write_text("no library")
    out, log = run(USE, env)
    assert out[0] == WORKS and "do not load" in log
    assert compilations(cxx) == 2


@pytest.mark.parametrize(
    ("built_with", "release", "reason"),
    (
        (None, "13.0", "this PyTorch is built without CUDA"),
        ("13.0", None, "no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is not set"),
        ("12.8", "13.0", " is 13.0, PyTorch was built with 12.8: install a toolkit of its major version"),
        ("13.0", "13.2", None),
    ),
)
def test_cuda_obstacle(built_with, release, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", built_with)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    if release:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
        nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path) if release else None)
    found = cuda.obstacle()
    assert found == reason or (reason is not None and found.endswith(reason) and "\n" not in found)


@pytest.fixture
def with_cuda(env, tree, tmp_path):
    """The start of a program in which PyTorch seems built with CUDA, and whose toolkit has no compiler for nvcc."""
    (tree / "csrc" / "ops.cpp").write_text(f"{OPS}{KERNEL}")
    toolkit = tmp_path / "toolkit"
    for folder in ("bin", "lib64"):
        (toolkit / folder).mkdir(parents=True)
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho release 13.0\n")
    (toolkit / "bin" / "nvcc").chmod(0o755)
    env |= {"TORCH_CUDA_ARCH_LIST": "9.0", "LIBRARY_PATH": f"{toolkit}/lib64", "LD_LIBRARY_PATH": f"{toolkit}/lib64"}
    return f"""import torch
from fastgen._build import cuda
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", "{toolkit}"
"""


def test_cuda_kernels_that_cannot_be_built(env, cxx, with_cuda, tmp_path):
    """One line says why, `fastgen build` tries again, and once built the kernels need no toolkit."""
    load = f"{with_cuda}print(cuda.load())"
    assert run(load, env | {"TORCH_CUDA_ARCH_LIST": "sm_90"})[0] == ["Unknown CUDA arch (sm_90) or GPU not supported"]
    none = run(load, {name: value for name, value in env.items() if name != "TORCH_CUDA_ARCH_LIST"})[0]
    assert none == ["this machine has no GPU to build the CUDA kernels for, and TORCH_CUDA_ARCH_LIST names none"]
    assert "cannot find -l" in run(load, env)[0][0]
    assert run(load, env)[0][0].startswith("an earlier build failed") and compilations(cxx) == 1

    for name in ("c10_cuda", "torch_cuda", "cudart"):
        library = tmp_path / "toolkit" / "lib64" / f"lib{name}.so"
        subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", library], check=True)
    out, _ = run(f"{with_cuda}print(cuda.status().reason); print(cuda.build().suffix)", env)
    assert out[0].startswith("an earlier build failed") and out[1] == ".so" and compilations(cxx) == 2
    (tmp_path / "toolkit" / "bin" / "nvcc").unlink()
    out, _ = run(f"{with_cuda}print(cuda.status().how); print(cuda.load())", env)
    assert out == ["just in time", "None"] and compilations(cxx) == 2


def test_the_first_error_of_nvcc():
    output = "FAILED: a.cuda.o\nnvcc fatal   : Unsupported gpu architecture 'compute_70'\nninja: build stopped."
    assert toolchain.first_error(output) == "nvcc fatal   : Unsupported gpu architecture 'compute_70'"


def test_nvcc_that_cannot_be_executed(tmp_path):
    (tmp_path / "nvcc").touch(0o755)
    assert cuda.nvcc_release(tmp_path / "nvcc") is None


def test_environment_is_put_back(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    before = dict(os.environ)
    with toolchain.environment():
        assert 1 <= int(os.environ["MAX_JOBS"]) <= (os.cpu_count() or 1)
    assert dict(os.environ) == before


def install(python: str, env: dict[str, str], *arguments: str) -> Path:
    """Runs pip install in python's environment; returns the folder of the installed package."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *arguments], env=env, cwd="/", capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("no package index to get setuptools from for an isolated build")
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(run("import fastgen; print(fastgen.__path__[0])", env, python)[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["copied", "editable"])
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "no-isolation"])
def test_pip_install(tree, env, bare_python, editable, isolated):
    (tree / "kernels").mkdir()
    (tree / "kernels" / "__init__.py").touch()
    (tree / "kernels" / "an_op.py").touch()
    del env["PYTHONPATH"]
    options = [] if isolated else ["--no-build-isolation"]
    package = install(bare_python, env, *options, *(["-e"] if editable else []), str(tree))
    assert (package == tree / "fastgen") == editable
    assert bool(list(package.glob("_native_*.so"))) != isolated  # an isolated build sees no torch
    assert run("import fastgen.kernels.an_op", env, bare_python) == ([], "")
    without_compiler = {} if isolated else {"CXX": "no-such-compiler"}
    out, _ = run(USE, env | without_compiler, bare_python)
    assert out == [WORKS, "just in time" if isolated else "ahead of time"]

    source = next((package if not editable else tree).glob("csrc/cpu/twice.cpp"))
    source.write_text(f"{KERNEL}// edited\n")
    out, _ = run("from fastgen._build import native; print(native.status().path)", env, bare_python)
    assert out == ["None"]  # a library of other sources is not used


@pytest.mark.slow
def test_pip_install_leaves_out_what_does_not_compile(tree, env, bare_python, tmp_path):
    del env["PYTHONPATH"]
    package = install(bare_python, env | {"PATH": str(tmp_path)}, "--no-build-isolation", str(tree))
    assert not list(package.glob("_native_*.so"))
    assert run(USE, env, bare_python)[0] == [WORKS, "just in time"]
