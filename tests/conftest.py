import os
import tempfile

# A thread of torch that waits gives its core away, read when torch is loaded: else it spins where the other workers
# compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What torch.compile keeps is code for the vectors of the process that made it, and is taken by processes with other
# ones too (PyTorch 2.13), where it writes out of bounds.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(
        tempfile.gettempdir(), f"fastgen-inductor-{os.getuid()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'best')}"
    ),
)

import pytest
import torch

from fastgen._build.native import CUDA_ON_CPU
from fastgen.ops import _memo, _rules


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN: an output that is not written wholly shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def ieee():
    """float32 is multiplied as float32 also by kernels that know TF32, where tests run such."""
    if not CUDA_ON_CPU:
        yield
        return
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.fixture(autouse=True, scope="session")
def nothing_is_measured():
    """What the user of this machine measured decides no test, nor the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGEN_CHOICES", "0")
        yield


@pytest.fixture
def fused_when_small(monkeypatch):
    """The layers run the fused ops for the small images of tests too, which by default PyTorch's modules compute."""
    monkeypatch.setattr(_rules, "SMALL", 0)
    monkeypatch.setattr(_rules, "SMALL_WITH_GRADIENTS", 0)
    _memo.forget()
    yield
    _memo.forget()
