"""The C++ kernels write nothing outside their outputs: every tensor is allocated between guard zones."""

import ctypes
import hashlib
import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastgen import ops
from fastgen._build import cache, toolchain
from fastgen.ops import _policy
from fastgen.ops._question import Choice
from tests.cases import SAMPLER, SMALL, SPECTRAL, TESTED, UNIT_ROUNDOFF, OpCase

SOURCE = Path(__file__).parent / "guard_zones.cpp"

pytestmark = pytest.mark.skipif(TESTED != "cpp", reason="the C++ kernels are replaced")


def build(folder: str) -> str:
    from torch.utils import cpp_extension

    torch_library = Path(torch.__file__).parent / "lib"
    command = [*toolchain.compiler_command(), "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE)]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{torch_library}", f"-Wl,-rpath,{torch_library}", "-lc10", "-o", f"{folder}/guard_zones.so"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return f"{folder}/guard_zones.so"


@contextmanager
def guard_zones():
    """Allocates tensors between guard zones; yields a function that counts the tensors whose zones have been
    overwritten."""
    made_from = hashlib.sha256(SOURCE.read_bytes() + repr((torch.__version__, toolchain.compiler())).encode())
    key = f"guard-zones-{made_from.hexdigest()[:16]}"
    library = next(cache.cached(f"{key}.so"), None) or toolchain.make(key, [SOURCE], build, requested=True)
    zones = ctypes.CDLL(str(library))
    zones.violations.restype = ctypes.c_int64
    zones.install()
    try:
        yield zones.violations
    finally:
        zones.uninstall()


def run(case: OpCase, dtype: torch.dtype, channels_last: bool) -> None:
    """Forward and backward."""
    tensors = {
        name: t.requires_grad_(not name.startswith("running")) for name, t in case.tensors(dtype, channels_last).items()
    }
    with ops.use_impl(TESTED):
        outputs = case.call(tensors) if "x" in tensors else getattr(ops, case.op)(**tensors, **case.options)
        outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.requires_grad]
        inputs = [t for t in tensors.values() if t.requires_grad]
        torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True)


def check_all() -> None:
    """Every op of the case table with each algorithm, dtype and memory order."""
    _policy._fastest = lambda *_: Choice(TESTED)  # for the gradients too
    with guard_zones() as violations:
        for winograd, amx in (("0", ""), ("always", ""), ("0", "emulate")):
            os.environ["FASTGEN_WINOGRAD"], os.environ["FASTGEN_AMX"] = winograd, amx
            dtypes = (torch.bfloat16,) if amx else UNIT_ROUNDOFF
            for case, dtype, last in itertools.product((*SMALL, *SAMPLER, *SPECTRAL), dtypes, (False, True)):
                run(case, dtype, last)
                assert not violations(), f"{case.id} in {dtype}, channels_last {last}, Winograd {winograd}, AMX {amx}"


def test_an_out_of_bounds_write_is_found():
    with guard_zones() as violations:
        before = violations()
        for offset in (-1, 5):
            x = torch.zeros(5)
            ctypes.c_float.from_address(x.data_ptr() + offset * x.element_size()).value = 1.0
        del x
        assert violations() == before + 2


@pytest.mark.parametrize("isa", ("avx512", "avx2", "baseline"))
def test_kernels_stay_inside(isa):
    code = "from tests.ops.test_guard_zones import check_all; check_all()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"FASTGEN_CPU_ISA": isa}
    )
    assert done.returncode == 0, done.stderr
