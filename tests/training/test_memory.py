import subprocess
import sys

import pytest
import torch

from fastgen._build import native

pytestmark = pytest.mark.skipif(native.load() is not None, reason="the native ops could not be built here")

HEAD = """
import os, resource, threading
import torch
import torch.nn.functional as F
from fastgen.training import keep_freed_memory

def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def step(size=2**22):  # eight tensors of 16 MiB, written and freed together
    held = [torch.ones(size) for _ in range(8)]
"""
KEPT = """
step()
fresh = faults(step)
assert keep_freed_memory() and keep_freed_memory()
step()
later = sum(faults(step) for _ in range(4))
assert fresh > 5000, "the memory was kept without the call: the test measures nothing"
assert later < 1000, (fresh, later)
"""
BOUNDED = """
def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

assert keep_freed_memory()
step()
most = held()
for i in range(40):
    step(2**22 - i * 40_000)
assert held() < most + 200, (most, held())  # twice the 128 MiB of a step, not forty times
"""
WHOLE = """
before, image, weight = torch.ones(2**20), torch.randn(4, 32, 32, 32), torch.randn(32, 32, 3, 3)
expected = F.conv2d(image, weight)  # oneDNN keeps memory of its own from here on
storage = torch.empty(2**20).untyped_storage()
assert keep_freed_memory()
del before
assert torch.equal(F.conv2d(image, weight), expected)
storage.resize_(2**24)
storage.resize_(0)

with torch.profiler.profile(profile_memory=True) as profile:
    torch.ones(2**20)
assert any(event.cpu_memory_usage == 2**22 for event in profile.events())

def work(found):
    x = torch.full((2**18,), 3.0)
    for _ in range(200):
        x = (x + 1) - 1
    found.append(bool((x == 3).all()))

found = []
threads = [threading.Thread(target=work, args=(found,)) for _ in range(4)]
for thread in threads:
    thread.start()
children = []
for _ in range(4):  # while the threads allocate
    # It allocates and no more: other locks than the allocator's may be held for ever in it.
    if not (child := os.fork()):
        os._exit(0 if torch.empty(2**20).numel() == 2**20 else 1)
    children.append(child)
assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
for thread in threads:
    thread.join()
assert found == [True] * 4

try:
    torch.empty(2**60, dtype=torch.uint8)
except RuntimeError as error:
    assert "not enough memory" in str(error), error
else:
    raise AssertionError("2**60 bytes")
"""


@pytest.mark.parametrize("script", [KEPT, BOUNDED, WHOLE], ids=["kept", "bounded", "whole"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's counters")
def test_freed_memory(script):
    run = subprocess.run([sys.executable, "-c", HEAD + script], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr


def test_another_version_of_pytorch():
    major, minor = map(int, torch.__version__.split(".")[:2])
    import fastgen.training.memory  # noqa: F401

    assert not torch.ops.fastgen.keep_freed_memory(major, minor + 1)
