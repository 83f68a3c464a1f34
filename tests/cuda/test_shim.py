"""The shim finds the faults that it is meant to find, and multiplies matrices as tensor cores do."""

import subprocess

import pytest

from fastgen._build import toolchain
from tests.cuda import executed

pytestmark = pytest.mark.skipif(
    toolchain.compiler() is None, reason="no C++ compiler to build the kernels for the CPU with"
)

FAULTS = {
    "none": "",
    "no barrier": "race for byte",
    "no warp barrier": "race for byte",
    "half a barrier": "ended while others of its block wait",
    "half a warp": "deadlock",
    "no wait": "before it arrived",
    "a copy too early": "race for byte",
    "block after block": "in any order",
    "too much shared memory": "not every GPU",
    "beyond the end": "heap-buffer-overflow",
    "a copy beyond the end": "heap-buffer-overflow",
    "not aligned": "",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    target = tmp_path_factory.mktemp("shim") / "faulty"
    executed.compile_program("tests/cuda/faulty.cu", target)
    return target


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(program, fault):
    result = subprocess.run([program, fault], capture_output=True, text=True)
    assert (result.returncode == 0) == (fault == "none"), result.stdout + result.stderr
    assert FAULTS[fault] in result.stdout + result.stderr
