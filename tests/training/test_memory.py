import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from fastgen.training import keep_freed_memory

def faults():  # of eight tensors of 16 MiB, written and freed together
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**22) for _ in range(8)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
fresh = faults()
kept = keep_freed_memory()
faults()
print(fresh, kept, faults(), sum(faults() for _ in range(4)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's switches")
def test_freed_memory_is_kept():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    fresh, kept, *later = run.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(fresh) > 5000, "the memory was kept without the switch: the test measures nothing"
    assert sum(map(int, later)) < int(fresh)
