import os
import tempfile

# Torch reads this when it is loaded: its waiting threads then yield their core instead of spinning on one that other
# workers need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch.compile's cache holds code for the vector width of the process that compiled it, but serves processes with
# another width too (PyTorch 2.13), where that code writes out of bounds.
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
    """The same random numbers in every run, whatever the order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN, which reveals an output that is not completely written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def ieee():
    """Kernels that support TF32 multiply float32 in full precision too."""
    if not CUDA_ON_CPU:
        yield
        return
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.fixture(autouse=True, scope="session")
def nothing_is_measured():
    """The user's measured choices affect no test, and no process that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGEN_CHOICES", "0")
        yield


@pytest.fixture
def fused_when_small(monkeypatch):
    """The layers run the fused ops for the tests' small images too, which PyTorch's modules compute by default."""
    monkeypatch.setattr(_rules, "SMALL", 0)
    monkeypatch.setattr(_rules, "SMALL_WITH_GRADIENTS", 0)
    _memo.forget()
    yield
    _memo.forget()
