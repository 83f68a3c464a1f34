"""Every CUDA kernel, executed on the CPU from its own source, against the reference: the ops' own tests with cuda for cpp, in a
process of its own; once looking for races in shared memory, once for accesses out of bounds.

All of them: env $(python -m tests.cuda.executed races) pytest tests/ops -k "parity and not float64"
"""

import os
import subprocess
import sys

import pytest

from fastgen import _build
from tests.cuda import executed

CHOSEN = {
    "tests/cuda/check_tf32.py": "",
    "tests/ops/test_cases.py": "test_parity and (float32 or (bfloat16 and channels_last)) and not winograd and not real_layers",
    "tests/ops/test_reparameterize.py": "(test_parity or test_noise or draw_the_same) and not float64",
    "tests/ops/test_spectral_norm.py": "test_parity and (float32 or (bfloat16 and channels_last)) and not (wide or parts)",
}


@pytest.mark.parametrize("check", executed.CHECKS)
def test_against_the_reference(check):
    if _build.compiler() is None:
        pytest.skip("no C++ compiler to build the CUDA kernels for the CPU with")
    environment = os.environ | executed.environment(check)
    for file, chosen in CHOSEN.items():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", file, "-k", chosen]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout
