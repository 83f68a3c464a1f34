"""The shim finds what it is there to find, and multiplies matrices as tensor cores do."""

import subprocess

import pytest

from fastgen import _build
from tests.cuda import executed

pytestmark = pytest.mark.skipif(
    _build.compiler() is None, reason="no C++ compiler to build the kernels for the CPU with"
)

FAULTS = {
    "none": "",
    "no barrier": "race for byte",
    "no warp barrier": "race for byte",
    "half a barrier": "ended where others of its block wait",
    "half a warp": "wait for ever",
    "no wait": "had not arrived",
    "too much shared memory": "not every GPU",
    "beyond the end": "heap-buffer-overflow",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    for check in executed.CHECKS:
        executed.compile_program("tests/cuda/faulty.cu", check, folder / check)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(programs, fault):
    check = "bounds" if fault == "beyond the end" else "races"
    done = subprocess.run([programs / check, fault], capture_output=True, text=True)
    assert (done.returncode == 0) == (fault == "none"), done.stdout + done.stderr
    assert FAULTS[fault] in done.stdout + done.stderr
