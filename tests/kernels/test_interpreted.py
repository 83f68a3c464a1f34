"""Every kernel in Triton's interpreter, against the reference: the ops' own tests with triton in place of cpp, in a
separate process.

All of them: TRITON_INTERPRET=1 FASTGEN_IMPL=triton pytest tests/ops -k "parity and not float64"
"""

import os
import subprocess
import sys

import pytest

# The interpreter's time is proportional to the programs, of which wide-rows has four times as many as any other case:
# it runs in one layout. Several tiles of rows with partial statistics are in cyclegan-first, vae and patchgan-middle.
CHOSEN = {
    "test_cases.py": "test_parity and (float32 or (bfloat16 and channels_last)) and not winograd and not "
    "real_layers and not "
    "(wide-rows and channels_last)",
    "test_convolution_weight_grad.py": "",
    "test_reparameterize.py": "test_parity and (float32 or bfloat16)",
    "test_spectral_norm.py": "test_parity and (float32 or (bfloat16 and channels_last)) and not "
    "(wide or parts or tall)",
}


@pytest.mark.parametrize("file", CHOSEN)
def test_against_the_reference(file):
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", f"tests/ops/{file}", "-k", CHOSEN[file]]
    # A requested implementation also computes all gradients.
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTGEN_IMPL": "triton"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
