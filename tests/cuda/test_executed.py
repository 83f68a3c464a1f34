"""Every CUDA kernel, executed on the CPU from its source, against the reference: the ops' own tests with cuda in place
of cpp, in a separate process that looks for races in shared memory and accesses out of bounds.

All of them: env $(python -m tests.cuda.executed) pytest tests/ops -k "parity and not float64"
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen._build import toolchain
from tests.cuda import executed

CHOSEN = {
    "tests/cuda/check_tf32.py": "test_tf32",
    "tests/ops/test_cases.py": "test_parity and (float32 or (bfloat16 and channels_last)) and not winograd and not "
    "real_layers",
    "tests/ops/test_noise.py": "(test_noise or draw_the_same) and not float64",
    "tests/ops/test_reparameterize.py": "test_parity and not float64",
    "tests/ops/test_spectral_norm.py": "test_parity and (float32 or (bfloat16 and channels_last)) and not "
    "(wide or parts)",
}


def test_against_the_reference():
    if toolchain.compiler() is None:
        pytest.skip("no C++ compiler to build the CUDA kernels for the CPU with")
    chosen = " or ".join(f"({Path(file).name} and ({which}))" for file, which in CHOSEN.items())
    options = ("-q", "-x", "-rp", "-p", "no:xdist", "--capture=sys")  # which also shows the address sanitizer's output
    command = [sys.executable, "-m", "pytest", *options, *CHOSEN, "-k", chosen]
    environment = os.environ | executed.environment()
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f"PASSED {file}::" in result.stdout for file in CHOSEN)
